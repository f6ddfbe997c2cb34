"""What a check looks at: the masks of a case with their places in the patient, the brain around them, and the plane between its halves."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medlore.data.volumes.geometry import Array, Crop, Shape, spacing_of
from medlore.segmenting.expectations import Expectation, Expectations
from medlore.segmenting.midplane import Plane, midplane_of_mask

_CUT_SHARE = 0.05  # of the area of a cube of the same volume: with more of it on the image's edge a structure is cut off there
Edges = tuple[tuple[bool, bool], ...]
Boxed = tuple[Crop, Array]


@dataclass(frozen=True, eq=False)
class Scene:
    """What all structures of a case share.

    Args:
        shape: of the frame in which the masks are held.
        affine: of it, to RAS mm.
        edges: by axis, whether its first and its last plane are the image's own edge.
        expected: by the pack.
        brain: the mask that all structures lie inside, in its box; None where there is none.
    """

    shape: Shape
    affine: Array
    edges: Edges
    expected: Expectations
    brain: Boxed | None = None

    @functools.cached_property
    def spacing(self) -> Array:
        """Voxel edges in mm."""
        return spacing_of(self.affine)

    @functools.cached_property
    def voxel_ml(self) -> float:
        """Of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000)

    @property
    def whole(self) -> bool:
        """Whether the image is long enough along each axis to show all that the pack's structures lie in."""
        return bool(min(n * mm for n, mm in zip(self.shape, self.spacing, strict=True)) >= self.expected.least_mm)

    @functools.cached_property
    def plane(self) -> Plane | None:
        """Between the halves of the brain; None where no brain is known."""
        return None if self.brain is None else midplane_of_mask(*self.brain, self.affine)

    @functools.cached_property
    def brain_is_cut(self) -> bool:
        """Whether the brain goes on beyond the edge of the image."""
        return self.brain is not None and self.is_cut(self.brain)

    def is_cut(self, found: Boxed) -> bool:
        """Whether a structure lies on the edge of the image with more than a rim."""
        crop, mask = found
        volume = float(np.count_nonzero(mask)) * self.voxel_ml * 1000
        on_edge = 0.0
        for axis, (first, last) in enumerate(self.edges):
            area = self.voxel_ml * 1000 / float(self.spacing[axis])
            at = [(0, first and crop.start[axis] == 0), (-1, last and crop.stop[axis] == self.shape[axis])]
            on_edge += sum(float(np.count_nonzero(np.take(mask, end, axis=axis))) * area for end, there in at if there)
        return bool(on_edge > _CUT_SHARE * volume ** (2 / 3) > 0)

    def inside_share(self, found: Boxed) -> float:
        """Share of a structure that lies inside the brain."""
        crop, mask = found
        return float(np.count_nonzero(mask & _part(self.brain, crop, mask.shape))) / max(int(np.count_nonzero(mask)), 1)

    def places(self, found: Boxed) -> Array:
        """Where the voxels of a mask lie (n 3, RAS mm)."""
        return _places(*found, self.affine)


@dataclass(frozen=True, eq=False)
class Structure:
    """What a check sees of one label.

    Args:
        label: its name.
        found: its mask in its box; None where it is empty.
        scene: what all share.
        expected: of this structure; None where the pack says nothing.
        partner: of a label with a side, the millilitres of the other side; None where that was not asked for.
        dropped_ml: stray parts that the pack's rules took away.
        entropy: mean of the border's, in bits; None where it was not measured.
        agreement: Dice with other ways to look at the same image; empty unless the check is thorough.
    """

    label: str
    found: Boxed | None
    scene: Scene
    expected: Expectation | None = None
    partner: float | None = None
    dropped_ml: float = 0.0
    entropy: float | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def ml(self) -> float:
        """Its volume."""
        return 0.0 if self.found is None else float(np.count_nonzero(self.found[1])) * self.scene.voxel_ml


def _places(crop: Crop, mask: Array, affine: Array) -> Array:
    voxels = np.argwhere(mask) + np.asarray(crop.start)
    return np.asarray(voxels @ np.asarray(affine, float)[:3, :3].T + np.asarray(affine, float)[:3, 3])


def _part(held: Boxed | None, crop: Crop, shape: tuple[int, ...]) -> Array:
    """The part of a boxed mask that lies in another box."""
    part = np.zeros(shape, np.bool_)
    if held is None:
        return part
    own, mask = held
    low = [max(a, b) for a, b in zip(own.start, crop.start, strict=True)]
    high = [min(a, b) for a, b in zip(own.stop, crop.stop, strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, crop.start, strict=True))
        part[there] = mask[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, own.start, strict=True))]
    return part
