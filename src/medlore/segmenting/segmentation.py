"""The masks of one volume and what is known of them: what a model hands on to the checks, the files and the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array, Crop, GridPath, Reorientation, Shape, bounding_box
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

    def box(self, label: str) -> Crop | None:
        """The box of a label on the output grid; None where it is empty."""
        found = self.boxed(label)
        if found is None:
            return None
        turn, (crop, mask) = self.reorientation, found
        tight = bounding_box(mask)  # the crop may begin before the first voxel: it is packed in bytes
        if tight is None:
            return None
        lows = [first + begin for first, begin in zip(crop.start, tight.start, strict=True)]
        highs = [first + end for first, end in zip(crop.start, tight.stop, strict=True)]
        start, stop = [0, 0, 0], [0, 0, 0]
        for axis, flipped, low, high in zip(turn.axes, turn.flips, lows, highs, strict=True):
            size = turn.shape[axis]
            start[axis], stop[axis] = (size - high, size - low) if flipped else (low, high)
        return Crop((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def mask(self, label: str) -> Array:
        """The mask of a label on the output grid, Boolean."""
        packed, index = self.masks[label]
        return self.reorientation.undo(packed.whole(index))

    def voxel_ml(self) -> float:
        """Volume of one voxel of the output grid in millilitres."""
        affine = self.volume.affine if self.affine is None else self.affine
        return float(abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1000)


def canvas_of(result: Segmentation, kind: type) -> tuple[Array, Array]:
    """Zeros on the output grid, in the memory order of the file, and the view of them in which the masks are held."""
    shape = result.reorientation.shape
    values: Array = np.zeros(shape, kind, order="F")
    return values, result.reorientation.apply(values)
