"""Volumes on their way to a network and masks on their way back.

`read_volume` reads a file, folder or zip into a `Volume` (array + affine). `prepare` brings it to the network's grid and
grey values and keeps a `GridPath` and an `Intensity`; `MaskRestorer` takes the network's probabilities, slab by slab, back
to the voxels of the file. Nothing on the way back is larger than one bit per voxel and label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medlore.data.formats import ReadOptions, format_of, read_volume_as
from medlore.data.volumes.geometry import Array, Crop, GridPath, reorientation_to, resampling_to, shear_degrees
from medlore.data.volumes.intensity import (
    PUBLISHED_RULE,
    Intensity,
    IntensityRule,
    Modality,
    body_box,
    finite_values,
    hounsfield,
    intensity_of,
    published_foreground,
    saturated,
)
from medlore.data.volumes.interpolation import Taps
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.nifti_affine import AffineChoice
from medlore.errors import DataError

Resample = Literal["probability", "nearest"]
NETWORK_SPACING_MM = (1.0, 1.0, 3.0)
_TILT_NOTE_DEGREES = 0.1
_PLANES_AT_ONCE = 16  # brought back together: few calls, and still small beside the masks


def read_volume(
    path: str | Path,
    *,
    affine_from: AffineChoice = "auto",
    frame: int | None = None,
    series: str | None = None,
    most_bytes: int | None = None,
) -> Volume:
    """Read a volume in any format of `medlore.data.formats`: NIfTI, NRRD, MetaImage, FreeSurfer, or one DICOM series.

    Args:
        path: the file, or the folder or zip of a DICOM series.
        affine_from: which NIfTI matrix to believe.
        frame: which volume of a 4D file, from 0.
        series: which DICOM series, where the folder holds several.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        InputError: nothing is there, or a device or a pipe.
        DataError: it cannot be read as one grey volume; the message says why.
        MissingExtraError: it is DICOM and the extra `dicom` is not installed.
    """
    return read_volume_as(format_of(path), Path(path), ReadOptions(affine_from, frame, series, most_bytes))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A volume on the network's grid, in the network's grey values.

    Args:
        pixels: 1 x y z float32.
        path: the way there and back.
        intensity: the grey values' record.
        body: x y z, whether a voxel is body; None where every window is to be computed.
        notes: what was found odd and how it was handled.
    """

    pixels: Tensor
    path: GridPath
    intensity: Intensity
    body: Array | None
    notes: tuple[str, ...]


def prepare(
    volume: Volume,
    modality: Modality,
    *,
    orientation_code: str = "RAS",
    spacing_mm: Sequence[float] = NETWORK_SPACING_MM,
    rule: IntensityRule = PUBLISHED_RULE,
    published: bool = False,
) -> Prepared:
    """Orientation, spacing, crop and grey values.

    Args:
        volume: from `read_volume`.
        modality: chooses the intensity rule.
        orientation_code: of the network's grid; spine models of the SAT family use `ASR`.
        spacing_mm: of the network's grid, along its axes.
        rule: the intensity constants of the network's training.
        published: exactly the published rules: crop to values above 0, no correction of a lost CT intercept, no body mask.

    Raises:
        DataError: nothing but air, one value only, or no finite voxel.
    """
    where = str(volume.path)
    notes = list(volume.notes)
    array, note = finite_values(volume.array, where=where)
    notes += [note] if note else []
    notes += [note] if (note := saturated(volume.array)) else []
    array, offset, odd = hounsfield(array) if modality == "ct" and not published else (array, 0.0, ())
    notes += odd
    tilt = shear_degrees(volume.affine)
    if tilt > _TILT_NOTE_DEGREES:
        notes.append(
            f"the axes are {tilt:.1f} degrees from orthogonal (gantry tilt); the network sees them as they are, masks come back exactly"
        )
    turn = reorientation_to(orientation_code, volume.affine, volume.shape)
    change = resampling_to(spacing_mm, turn.apply_to_affine(volume.affine), turn.new_shape)
    grey = change.apply(turn.apply(array))
    if offset:
        grey += np.float32(offset)
    training_box = published_foreground(grey, rule.foreground_above)
    crop = training_box if published else body_box(grey, modality)
    if crop is None:
        raise DataError(where, "nothing but air", f"an image with a body in it ({modality})", "check modality, slope and intercept")
    intensity = intensity_of((training_box or crop).apply(grey), modality, where=where, rule=rule)
    cropped = crop.apply(grey)
    body = None if published else np.asarray(cropped > intensity.body)
    pixels = torch.from_numpy(intensity.apply(cropped))
    return Prepared(pixels[None], GridPath(volume.affine, turn, change, crop), intensity, body, tuple(notes))


class PackedMasks:
    """One bit per voxel and label, on one grid; memory is only touched where a mask has voxels.

    Args:
        shape: x y z.
        labels: how many.
    """

    def __init__(self, shape: Sequence[int], labels: int) -> None:
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.counts = np.zeros(labels, np.int64)
        self._bits = [np.zeros((self.shape[0], self.shape[1], -(-self.shape[2] // 8)), np.uint8) for _ in range(labels)]
        self._rows: list[list[int]] = [[self.shape[0], 0] for _ in range(labels)]

    def set_planes(self, label: int, x: int, box: tuple[slice, slice], mask: Array) -> None:
        """Store the true voxels of the planes from `x` on (x y z); outside `box` they are empty. `box[1]` starts at a multiple of 8."""
        count = int(np.count_nonzero(mask))
        if count:
            self.counts[label] += count
            packed = np.packbits(mask, axis=2)
            start = box[1].start // 8
            self._bits[label][x : x + len(mask), box[0], start : start + packed.shape[2]] = packed
            rows = self._rows[label]
            rows[0], rows[1] = min(rows[0], x), max(rows[1], x + len(mask))

    def boxed(self, label: int) -> tuple[Crop, Array] | None:
        """The box around a label and the mask in it; None where the label is empty."""
        first, last = self._rows[label]
        if last <= first:
            return None
        xs = first + np.flatnonzero(self._bits[label][first:last].any(axis=(1, 2)))
        first, last = int(xs[0]), int(xs[-1]) + 1
        bits = self._bits[label][first:last]
        ys = np.flatnonzero(bits.any(axis=(0, 2)))
        zs = np.flatnonzero(bits.any(axis=(0, 1)))
        y0, y1, z0, z1 = int(ys[0]), int(ys[-1]) + 1, int(zs[0]), int(zs[-1]) + 1
        mask = np.unpackbits(bits[:, y0:y1, z0:z1], axis=2).view(np.bool_)
        stop = min(z1 * 8, self.shape[2])
        return Crop((first, y0, z0 * 8), (last, y1, stop)), mask[:, :, : stop - z0 * 8]

    def whole(self, label: int) -> Array:
        """The mask of a label as a Boolean volume."""
        found = self.boxed(label)
        return np.zeros(self.shape, np.bool_) if found is None else found[0].undo(found[1], self.shape)


class _Box(NamedTuple):
    """Rows `y0:y1` and columns `z0:z1` of a plane."""

    y0: int
    y1: int
    z0: int
    z1: int


class MaskRestorer:
    """Turns slabs of probability on the network's grid into masks on the grid of the (reoriented) file.

    `probability` interpolates linearly and then thresholds: smooth borders. `nearest` thresholds first: the network's own
    voxels. Beyond the crop the probability is 0. Only voxels that can pass the threshold are computed.

    Args:
        path: of the prepared volume.
        labels: how many.
        resample: which of the two.
        threshold: a voxel belongs to a label above this probability.
    """

    def __init__(self, path: GridPath, labels: int, *, resample: Resample = "probability", threshold: float = 0.5) -> None:
        self.masks = PackedMasks(path.resampling.shape, labels)
        self.network_shape = path.crop.new_shape
        self._threshold = threshold
        self._taps = [_nearest(path.taps(axis)) if resample == "nearest" else path.taps(axis) for axis in range(3)]
        self._nearest = resample == "nearest"
        self._next = 0
        self._last: Tensor | None = None  # of the slab before: q 1 y z

    def add(self, start: int, probability: Tensor) -> None:
        """Take the finished rows from `start` on (q rows y z); slabs come in the order of x."""
        slab = probability.cpu()
        stop = start + slab.shape[1]
        x = self._taps[0]
        following = int(np.searchsorted(np.maximum(x.lower, x.upper), stop))  # the first plane that needs a later slab
        pieces = [(start, slab)] if self._last is None else [(start - 1, self._last), (start, slab)]
        hot = [_rows_above(part, self._threshold) for _, part in pieces]
        for first in range(self._next, following, _PLANES_AT_ONCE):
            planes = slice(first, min(first + _PLANES_AT_ONCE, following))
            rows = [_within(x.read(planes), at, part.shape[1]) for at, part in pieces]
            found = np.any([passes[:, seen].any(axis=1) for passes, seen in zip(hot, rows, strict=True)], axis=0)
            for label in np.flatnonzero(found):
                parts = [(part[label, seen], passes[label, seen]) for (_, part), passes, seen in zip(pieces, hot, rows, strict=True)]
                self._restore(int(label), planes, parts)
        self._next = max(self._next, following)
        self._last = slab[:, -1:].clone()  # the slab's memory is used again

    def _restore(self, label: int, planes: slice, parts: list[tuple[Tensor, Array]]) -> None:
        """Interpolate the part of some planes whose neighbours include a voxel above the threshold.

        Args:
            label: whose.
            planes: of the file.
            parts: all rows that they lie between (rows y z), and which of them pass the threshold.
        """
        boxes = [_box_above(part[_span(passes)], self._threshold) for part, passes in parts if passes.any()]
        y0, y1, z0, z1 = (fold(sides) for fold, sides in zip((min, max, min, max), zip(*boxes, strict=True), strict=True))
        y, z = self._taps[1].reached(y0, y1), self._taps[2].reached(z0, z1)
        if y.stop <= y.start or z.stop <= z.start:
            return
        z = slice(z.start // 8 * 8, z.stop)
        seen = self._taps[1].read(y), self._taps[2].read(z)
        values = np.concatenate([self._values(part[:, *seen]) for part, _ in parts])
        for axis, (taps, kept) in enumerate(zip(self._taps, (planes, y, z), strict=True)):
            values = taps.gather(values, kept, axis=axis)
        self.masks.set_planes(label, planes.start, (y, z), values > self._threshold)

    def _values(self, part: Tensor) -> Array:
        values = (part > self._threshold).float() if self._nearest else part.float()
        return values.numpy()


def _span(passes: Array) -> slice:
    """From the first to the last that passes."""
    found = np.flatnonzero(passes)
    return slice(int(found[0]), int(found[-1]) + 1)


def _within(rows: slice, first: int, count: int) -> slice:
    """Rows of the network's grid as rows of a piece of it that begins at `first`."""
    return slice(min(max(rows.start - first, 0), count), min(max(rows.stop - first, 0), count))


def _bits(values: Tensor, threshold: float) -> tuple[Array, Any]:
    """Numbers and a limit that compare as `values > threshold` does, but faster.

    Half-precision numbers from 0 up are ordered like their bits.
    """
    if values.dtype != torch.float16:
        return values.numpy(), threshold
    limit = np.float16(threshold)
    limit = np.nextafter(limit, np.float16(0)) if float(limit) > threshold else limit
    return values.numpy().view(np.int16), limit.view(np.int16)


def _rows_above(values: Tensor, threshold: float) -> Array:
    """Whether a row of a label passes the threshold anywhere: (q rows y z) -> (q rows)."""
    numbers, limit = _bits(values, threshold)
    return np.asarray(numbers.reshape(*numbers.shape[:2], -1).max(axis=2) > limit)


def _box_above(values: Tensor, threshold: float) -> _Box:
    """The box in y and z of what passes the threshold in some rows (x y z), in which something does."""
    numbers, limit = _bits(values, threshold)
    plane = numbers.max(axis=0)
    ys = np.flatnonzero(plane.max(axis=1) > limit)
    zs = np.flatnonzero(plane[ys[0] : ys[-1] + 1].max(axis=0) > limit)
    return _Box(int(ys[0]), int(ys[-1]) + 1, int(zs[0]), int(zs[-1]) + 1)


def _nearest(taps: Taps) -> Taps:
    index = taps.nearest()
    found = np.where(index >= 0, index, taps.lower)  # beyond the crop any neighbour will do, as long as they ascend
    return Taps(found, found, (index >= 0).astype(float), np.zeros(len(index)))
