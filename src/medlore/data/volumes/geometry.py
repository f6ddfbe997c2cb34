"""Grids and the ways between them: orientation, spacing and crop, each a record that undoes itself.

A grid is a shape and an affine (voxel index -> RAS+ millimetres). Three steps lead from the grid of a file to the grid of
a network: `Reorientation` (axes swapped and flipped, nothing interpolated), `Resampling` (another spacing along the same
axes; the first voxel centres coincide, as in SimpleITK and in MONAI's `Spacing`), `Crop`. `GridPath` holds all three and
knows, for each voxel of the file, where it lies on the network's grid.

Axes keep their directions: oblique and sheared (gantry-tilted) grids stay oblique and sheared, so no step loses anything
but resolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medlore.data.volumes.interpolation import Taps, linear_taps, resample_linear
from medlore.errors import DataError, UnknownNameError

Array = npt.NDArray[Any]
Shape = tuple[int, int, int]

SMALLEST_SPACING_MM, LARGEST_SPACING_MM = 0.005, 200.0
_SAME_AFFINE = 1e-3  # MONAI's tolerance: a grid that is nearer than this to the wanted one is left alone
_AXES = ("LR", "PA", "IS")

ORIENTATION_CODES = tuple(
    "".join(letters)
    for order in itertools.permutations(_AXES)
    for letters in itertools.product(*order)
)  # fmt: skip


def spacing_of(affine: Array) -> Array:
    """Voxel edge lengths in mm, along the voxel axes (they need not be orthogonal)."""
    return np.asarray(np.linalg.norm(np.asarray(affine, float)[:3, :3], axis=0))


def orientation_of(affine: Array) -> str:
    """The three letters of the directions in which the indices grow, e.g. `RAS`; for oblique grids the nearest ones.

    Examples:
        >>> orientation_of(np.diag([-1.0, -1.0, 3.0, 1.0]))
        'LPS'
    """
    return "".join(nib.aff2axcodes(np.asarray(affine, float)))


def shear_degrees(affine: Array) -> float:
    """How far the axes are from being orthogonal; a CT with gantry tilt has its tilt here.

    Examples:
        >>> shear_degrees(np.eye(4))
        0.0
    """
    directions = np.asarray(affine, float)[:3, :3] / spacing_of(affine)
    cosines = [abs(float(directions[:, i] @ directions[:, j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    return round(math.degrees(math.asin(min(max(cosines), 1.0))), 4)


def check_affine(affine: Array, where: str) -> None:
    """Refuse an affine that no scanner writes.

    Raises:
        DataError: it is not finite, not invertible, or a voxel edge is absurdly short or long.
    """
    affine = np.asarray(affine, float)
    accepted = f"voxel edges of {SMALLEST_SPACING_MM} to {LARGEST_SPACING_MM:g} mm along three different directions"
    fix = "correct the header (e.g. with nibabel or dcm2niix); sizes cannot be guessed"
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise DataError(where, "an affine that is not 4x4 and finite", accepted, fix)
    edges = spacing_of(affine)
    if (edges < SMALLEST_SPACING_MM).any() or (edges > LARGEST_SPACING_MM).any():
        raise DataError(where, f"voxel edges of {' x '.join(f'{e:.4g}' for e in edges)} mm", accepted, fix)
    if abs(np.linalg.det(affine[:3, :3] / edges)) < 0.05:
        raise DataError(where, "an affine whose axes lie in one plane", accepted, fix)


@dataclass(frozen=True)
class Reorientation:
    """Axes swapped and flipped: output axis `i` is input axis `axes[i]`, reversed where `flips[i]`.

    Args:
        axes: a permutation of 0, 1, 2.
        flips: for each output axis whether its direction is reversed.
        shape: of the input.
    """

    axes: Shape
    flips: tuple[bool, bool, bool]
    shape: Shape

    def apply(self, array: Array) -> Array:
        """A view of an x y z array in the new order."""
        return array.transpose(self.axes)[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]

    def undo(self, array: Array) -> Array:
        """A view of a reoriented array in the old order."""
        flipped = array[tuple(slice(None, None, -1) if flip else slice(None) for flip in self.flips)]
        return flipped.transpose(np.argsort(self.axes))

    def apply_to_affine(self, affine: Array) -> Array:
        """The affine of `apply(array)`."""
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for new, (old, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            step[old, new] = -1 if flip else 1
            step[old, 3] = self.shape[old] - 1 if flip else 0
        return np.asarray(affine, float) @ step

    @property
    def new_shape(self) -> Shape:
        """Shape of `apply(array)`."""
        return _shape(self.shape[a] for a in self.axes)


def check_orientation(code: str) -> None:
    """Refuse what is none of the 48 orientations.

    Raises:
        UnknownNameError: such a word; the nearest three are named.
    """
    if code.upper() not in ORIENTATION_CODES:
        raise UnknownNameError("orientation_code", code, ORIENTATION_CODES)


def reorientation_to(code: str, affine: Array, shape: Sequence[int]) -> Reorientation:
    """The way from a grid to the orientation `code` (any of the 48, e.g. `RAS`, `ASR`).

    Raises:
        UnknownNameError: `code` is none of the 48.
    """
    check_orientation(code)
    have = nib.io_orientation(np.asarray(affine, float))
    want = nib.orientations.axcodes2ornt(code.upper())
    change = nib.orientations.ornt_transform(have, want)  # row i: where input axis i goes, and its sign
    order = np.argsort(change[:, 0]).astype(int)
    flips = tuple(bool(change[a, 1] < 0) for a in order)
    return Reorientation(_shape(order), (flips[0], flips[1], flips[2]), _shape(shape))


@dataclass(frozen=True)
class Resampling:
    """Another spacing along the same axes; the centres of the first voxels coincide.

    Args:
        shape: of the input.
        new_shape: of the output: the rounded number of steps between first and last centre, plus one.
        step: distance of neighbouring output voxels, in input voxels, for each axis.
    """

    shape: Shape
    new_shape: Shape
    step: tuple[float, float, float]

    def apply(self, array: Array) -> Array:
        """Linear interpolation; beyond the last centre the last value. Returns float32, in the memory order of the input."""
        return resample_linear(array, self.new_shape, self.step)

    def apply_to_affine(self, affine: Array) -> Array:
        """The affine of `apply(array)`."""
        return np.asarray(affine, float) @ np.diag([*self.step, 1.0])

    @property
    def changes(self) -> bool:
        """False where the grid is already the wanted one."""
        return self.shape != self.new_shape or self.step != (1.0, 1.0, 1.0)


def resampling_to(spacing_mm: Sequence[float], affine: Array, shape: Sequence[int]) -> Resampling:
    """The way from a grid to the voxel edges `spacing_mm` (x y z of that grid).

    Source: the grid of `SimpleITK.Resample` from the same origin and of MONAI's `Spacing` (halves round to even).

    Examples:
        >>> resampling_to((1, 1, 3), np.diag([0.8, 0.8, 2.5, 1]), (60, 50, 24)).new_shape
        (48, 40, 20)
    """
    wanted = np.asarray(spacing_mm, float)
    edges = spacing_of(affine)
    size = np.asarray(shape, float)
    counts = np.round(np.round((size - 1) * edges / wanted, 6) + 1)
    step = wanted / edges
    if np.allclose(step, 1.0, atol=_SAME_AFFINE, rtol=0) and (counts == size).all():
        return Resampling(_shape(shape), _shape(shape), (1.0, 1.0, 1.0))
    return Resampling(_shape(shape), _shape(counts), (float(step[0]), float(step[1]), float(step[2])))


def spacing_for(
    spacing: Sequence[float] | Mapping[str, Sequence[float]], modality: str, *, where: str = "spacing_mm"
) -> tuple[float, float, float]:
    """The spacing of a network's grid for a modality: three numbers for all, or a mapping modality -> three numbers.

    Args:
        spacing: millimetres along x y z of the network's grid; a key `other` serves the modalities that are not named.
        modality: ct, mri, pet or us.
        where: name of the setting, for the error.

    Raises:
        DataError: not three lengths, or no entry for the modality.

    Examples:
        >>> spacing_for({"ct": [3, 3, 3], "mri": [1, 1, 1]}, "mri"), spacing_for([1, 1, 3], "ct")
        ((1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    """
    accepted, fix = "three lengths in mm, or {ct: [3, 3, 3], mri: [1, 1, 1]}", "correct the preprocessing of the pack or the settings"
    entry: Any = spacing
    if isinstance(spacing, Mapping):
        entry = spacing.get(modality, spacing.get("other"))
        if entry is None:
            raise DataError(where, f"no spacing for {modality} (there is one for {', '.join(spacing) or 'nothing'})", accepted, fix)
    try:
        x, y, z = (float(v) for v in entry)
    except (TypeError, ValueError) as error:
        raise DataError(where, f"got {entry!r}", accepted, fix) from error
    if not all(SMALLEST_SPACING_MM <= v <= LARGEST_SPACING_MM for v in (x, y, z)):
        raise DataError(where, f"got {entry!r}", accepted, fix)
    return x, y, z


@dataclass(frozen=True)
class Crop:
    """A box: `start` inclusive, `stop` exclusive."""

    start: Shape
    stop: Shape

    def apply(self, array: Array) -> Array:
        """A view of the box."""
        return array[tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))]

    def undo(self, array: Array, shape: Sequence[int], *, fill: float = 0) -> Array:
        """The box put back into an array of `shape` that is `fill` elsewhere."""
        whole = np.full(tuple(shape), fill, array.dtype)
        self.apply(whole)[...] = array
        return whole

    def apply_to_affine(self, affine: Array) -> Array:
        """The affine of the box."""
        moved = np.asarray(affine, float).copy()
        moved[:3, 3] = (np.asarray(affine, float) @ np.array([*self.start, 1.0]))[:3]
        return moved

    @property
    def new_shape(self) -> Shape:
        """Shape of the box."""
        return _shape(b - a for a, b in zip(self.start, self.stop, strict=True))


def bounding_box(mask: Array) -> Crop | None:
    """The smallest box around the true voxels; None where there is none."""
    box = [slice(0, size) for size in mask.shape]
    for axis in sorted(range(3), key=lambda a: -abs(mask.strides[a])):  # each axis within the box so far, slowest in memory first
        seen = np.flatnonzero(mask[tuple(box)].any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(seen):
            return None
        box[axis] = slice(int(seen[0]), int(seen[-1]) + 1)
    return Crop(_shape(side.start for side in box), _shape(side.stop for side in box))


@dataclass(frozen=True)
class GridPath:
    """The whole way from the grid of a file to the grid of a network, and back.

    Args:
        affine: of the file.
        reorientation: first step.
        resampling: second step.
        crop: third step.
    """

    affine: Array
    reorientation: Reorientation
    resampling: Resampling
    crop: Crop

    @property
    def oriented_affine(self) -> Array:
        """Affine after the first step."""
        return self.reorientation.apply_to_affine(self.affine)

    @property
    def network_affine(self) -> Array:
        """Affine after all steps."""
        return self.crop.apply_to_affine(self.resampling.apply_to_affine(self.oriented_affine))

    def taps(self, axis: int) -> Taps:
        """Where the voxels of the reoriented file lie on one axis of the network's grid."""
        positions = np.arange(self.resampling.shape[axis]) / self.resampling.step[axis]
        return linear_taps(positions, self.resampling.new_shape[axis], start=self.crop.start[axis], stop=self.crop.stop[axis])

    def record(self) -> dict[str, Any]:
        """Plain numbers for `case.json`."""
        return {
            "orientation": orientation_of(self.affine),
            "axes": list(self.reorientation.axes),
            "flips": list(self.reorientation.flips),
            "spacing_mm": [round(float(e), 6) for e in spacing_of(self.affine)],
            "network_orientation": orientation_of(self.network_affine),
            "network_spacing_mm": [round(float(e), 6) for e in spacing_of(self.network_affine)],
            "resampled_shape": list(self.resampling.new_shape),
            "crop_start": list(self.crop.start),
            "crop_stop": list(self.crop.stop),
            "shear_degrees": shear_degrees(self.affine),
        }


def _shape(values: Any) -> Shape:
    x, y, z = (int(v) for v in values)
    return x, y, z
