"""A DICOM series that stands for an image that was converted from it: what DICOM-SEG and RTSTRUCT refer to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medlore.data.volumes.dicom import read_dicom
from medlore.data.volumes.geometry import Array, Reorientation
from medlore.data.volumes.nifti import Volume
from medlore.errors import DataError

_SAME_MM = 0.05  # places went through the decimals of DICOM and of NIfTI
_SAME_SHARE = 0.5  # of the voxels that are no background; a face that was taken away, or a circle that was filled, changes fewer
_FIX = "name the series from which the image was converted, or segment the series itself"


@dataclass(frozen=True, eq=False)
class ReferenceSeries:
    """A series, and the way from the grid of an image to its own.

    Args:
        volume: the series.
        turn: axes of the image swapped and flipped.
    """

    volume: Volume
    turn: Reorientation

    def masks(self, masks: Mapping[str, Array]) -> Mapping[str, Array]:
        """Masks of the image on the grid of the series, each made when it is asked for."""
        return _Turned(masks, self.turn)


def read_reference(path: str | Path, image: Volume, *, series: str | None = None) -> ReferenceSeries:
    """The series that an image was converted from.

    Args:
        path: folder or zip of the series, or one of its files.
        image: as it was read.
        series: UID, where there are several.

    Raises:
        DataError: no series that can be read, or one that is not the image's: another UID, another grid, other grey values.
    """
    volume = read_dicom(path, series=series)
    own, other = (str(v.slices[0].get("SeriesInstanceUID")) if v.slices else None for v in (image, volume))
    if own not in (None, other):
        raise DataError(f"--dicom-reference {path}", f"series {other}", f"the series of {image.path}, {own}", _FIX)
    turn = _turn_between(image, volume)
    if turn is None:
        came = f"a series of {_size(volume)} voxels whose places are not those of {image.path} ({_size(image)})"
        raise DataError(f"--dicom-reference {path}", came, "the same grid up to the order and direction of its axes", _FIX)
    share = _same_values(turn.apply(image.array), volume.array)
    if share < _SAME_SHARE:
        came = f"a series on the grid of {image.path} whose grey values are others ({share:.0%} of them agree)"
        raise DataError(f"--dicom-reference {path}", came, "the series that the image was converted from", _FIX)
    return ReferenceSeries(volume, turn)


def _turn_between(image: Volume, series: Volume) -> Reorientation | None:
    """How the axes of the image become those of the series; None where both are no one grid."""
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)):
        turn = Reorientation(axes, flips, image.shape)  # type: ignore[arg-type]
        if turn.new_shape != series.shape:
            continue
        ends = np.array(list(itertools.product(*((0, n - 1) for n in series.shape)))).T
        apart = (turn.apply_to_affine(image.affine) - series.affine)[:3] @ np.vstack([ends, np.ones(8)])
        if np.abs(apart).max() <= _SAME_MM:
            return turn
    return None


def _same_values(image: Array, series: Array) -> float:
    """Share of the voxels that are no background in both and agree; converters may round."""
    counted = same = 0
    floor = series.min()
    for one, other in zip(np.moveaxis(image, 2, 0), np.moveaxis(series, 2, 0), strict=True):
        there = other > floor
        apart = np.abs(one[there].astype(np.float64) - other[there])
        counted += apart.size
        same += int((apart <= 0.51 + 1e-3 * np.abs(other[there])).sum())
    return same / counted if counted else 1.0


def _size(volume: Volume) -> str:
    return " x ".join(map(str, volume.shape))


class _Turned(Mapping[str, Array]):
    """Masks in another order of axes, one at a time."""

    def __init__(self, masks: Mapping[str, Array], turn: Reorientation) -> None:
        self._masks, self._turn = masks, turn

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, label: str) -> Array:
        return self._turn.apply(self._masks[label])
