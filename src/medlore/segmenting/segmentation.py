"""The masks of one volume and what is known of them: what a model hands on to the checks, the files and the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array, Crop, GridPath, Reorientation, Shape
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import PackedMasks, Prepared
from medlore.segmenting.labels import Routes
from medlore.segmenting.plan import CasePlan
from medlore.segmenting.sweep import axis_order
from medlore.segmenting.verdict import Verdict
from medlore.segmenting.watch import ProbabilityWatch


@dataclass(eq=False)
class Segmentation:
    """The masks of one volume.

    Args:
        volume: what was segmented.
        routes: labels, in the order of the label map's values, and who answered for them.
        plan: what it was expected to cost.
        prepared: the record of the way to the network.
        path: from the output grid to the network's, its axes in the order of the windows.
        affine: of the output grid; None for the volume's own.
        masks: label -> packed masks and its index in them.
        windows: gone through, all passes together.
        skipped: of them, without body.
        seconds: where the time went.
        tissues: how the borders of tissues were redrawn, for `case.json`; None where none were.
        maps: what was kept of the probabilities.
        brain: the mask of a first pass on the output grid; None where there was none.
        verdict: what the checks say; None without them.
    """

    volume: Volume
    routes: Routes
    plan: CasePlan
    prepared: Prepared
    path: GridPath
    affine: Array | None
    masks: dict[str, tuple[PackedMasks, int]] = field(default_factory=dict)
    windows: int = 0
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tissues: dict[str, Any] | None = None
    maps: ProbabilityWatch | None = None
    brain: Array | None = None
    verdict: Verdict | None = None

    @property
    def reorientation(self) -> Reorientation:
        """From the output grid to the frame in which the masks are held."""
        return self.path.reorientation

    @property
    def order(self) -> Shape:
        """The axes of the network's grid in the order in which the masks are held."""
        return axis_order(self.plan.axis)

    def voxels(self, label: str) -> int:
        """Number of voxels of a label."""
        packed, index = self.masks[label]
        return int(packed.counts[index])

    def boxed(self, label: str) -> tuple[Crop, Array] | None:
        """The box of a label, in the reoriented frame, and the mask in it; None where it is empty."""
        packed, index = self.masks[label]
        return packed.boxed(index)

    def mask(self, label: str) -> Array:
        """The mask of a label on the output grid, Boolean."""
        packed, index = self.masks[label]
        return self.reorientation.undo(packed.whole(index))

    def voxel_ml(self) -> float:
        """Volume of one voxel of the output grid in millilitres."""
        affine = self.volume.affine if self.affine is None else self.affine
        return float(abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1000)
