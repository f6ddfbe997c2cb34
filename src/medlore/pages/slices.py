"""A volume and its masks, made small enough for a page: one byte per voxel, turned to RAS, thinned above a limit.

The masks of a page are one map of codes. A code stands for a set of labels, so that overlapping labels keep all their
voxels and one more label costs no more room.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from isal import igzip

from medlore.data.volumes.geometry import Array, Reorientation, Shape, orientation_of, reorientation_to, shear_degrees, spacing_of
from medlore.errors import DataError

VOXEL_LIMIT = 12_000_000  # a page of at most about 15 MB; the ICBM152 template at 1 mm has 8.7 million

_CT_LEVELS_HU = ((0, -1024.0), (56, -160.0), (184, 240.0), (255, 2000.0))  # finest where soft tissue lies
_CT_WINDOWS_HU = {"soft tissue": (-160.0, 240.0), "lung": (-1000.0, 200.0), "bone": (-200.0, 1300.0), "brain": (0.0, 80.0)}


@dataclass(frozen=True)
class Label:
    """A label of the viewer.

    Args:
        name: as it is shown.
        colour: red, green, blue from 0 to 255.
        volume_ml: of the full mask.
        centre: voxel of the page's grid that stands for it; None where the mask is empty.
        voxels: on the page's grid.
    """

    name: str
    colour: tuple[int, int, int]
    volume_ml: float | None = None
    centre: tuple[int, int, int] | None = None
    voxels: int = 0


@dataclass(frozen=True, eq=False)
class Slices:
    """Three planes through a volume, with its masks in colour.

    Args:
        image: x y z uint8, an index into `levels`; RAS.
        codes: x y z unsigned integers; 0 stands for no label.
        affine: voxel -> RAS mm.
        levels: what the 256 values of `image` stand for, rising.
        window: darkest and brightest value at the beginning.
        windows: further windows by name.
        unit: of the values.
        labels: in the order of the table.
        sets: code -> places in `labels`, smallest label first.
        notes: what was changed for the page.
    """

    image: Array = field(repr=False)
    codes: Array = field(repr=False)
    affine: Array = field(repr=False)
    levels: Array = field(repr=False)
    window: tuple[float, float]
    windows: dict[str, tuple[float, float]]
    unit: str
    labels: tuple[Label, ...]
    sets: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """Voxels along x, y and z."""
        x, y, z = self.image.shape
        return x, y, z

    def data(self) -> dict[str, Any]:
        """What the script of the page reads."""
        return {
            "shape": self.shape,
            "affine": np.round(self.affine, 6).tolist(),
            "spacing": np.round(spacing_of(self.affine), 6).tolist(),
            "levels": [float(f"{value:.6g}") for value in self.levels],
            "window": [float(f"{value:.6g}") for value in self.window],
            "windows": {name: list(ends) for name, ends in self.windows.items()},
            "unit": self.unit,
            "labels": [
                {"name": each.name, "colour": each.colour, "ml": _millilitres(each.volume_ml), "centre": each.centre}
                for each in self.labels
            ],
            "sets": self.sets,
            "bytes": self.codes.dtype.itemsize,
            "image": _packed(self.image),
            "codes": _packed(self.codes),
        }


def slices_of(
    image: Array,
    affine: Array,
    masks: Iterable[tuple[str, Array]],
    *,
    colours: Sequence[tuple[int, int, int]],
    modality: str | None = None,
    voxel_limit: int = VOXEL_LIMIT,
) -> Slices:
    """Prepare a volume and its masks for a page.

    Args:
        image: x y z, any real numbers.
        affine: voxel -> RAS mm.
        masks: names and Boolean (or 0 and 1) masks on the grid of the image; taken one at a time, so a generator keeps memory low.
        colours: of the labels, in their order; used again from the start where there are too few.
        modality: `ct` for Hounsfield units; None looks at the values.
        voxel_limit: above it, only every n-th voxel along an axis is shown.

    Raises:
        DataError: a mask on another grid.
    """
    turn = reorientation_to("RAS", affine, image.shape)
    steps = _steps(turn.new_shape, spacing_of(turn.apply_to_affine(affine)), voxel_limit)
    levels, window, windows, unit = _grey_levels(image, modality)
    small = _thin_image(turn.apply(image), steps, levels)
    codes, sets, labels = _code_masks(masks, turn, steps, colours, abs(float(np.linalg.det(np.asarray(affine, float)[:3, :3]))) / 1000)
    notes = _notes(steps, np.asarray(affine))
    return Slices(small, codes, _thin_affine(turn.apply_to_affine(affine), steps), levels, window, windows, unit, labels, sets, notes)


def _steps(shape: Sequence[int], spacing_mm: Array, limit: int) -> Shape:
    """The steps along x, y and z that bring the grid below the limit and its voxels nearest to cubes."""
    edge = float(min(spacing_mm))
    while True:
        steps = [max(1, round(edge / s)) for s in spacing_mm]
        if math.prod(-(-n // step) for n, step in zip(shape, steps, strict=True)) <= limit:
            return steps[0], steps[1], steps[2]
        edge *= 1.05


def _thin_affine(affine: Array, steps: Shape) -> Array:
    """First voxel of the new grid: the middle of the first block."""
    step = np.diag([*steps, 1]).astype(float)
    step[:3, 3] = [(n - 1) / 2 for n in steps]
    return np.asarray(affine @ step)


def _thin_image(image: Array, steps: Shape, levels: Array) -> Array:
    """Means of blocks as places in `levels`, one row of blocks at a time."""
    sx, sy, sz = steps
    middles = (levels[1:] + levels[:-1]) / 2
    new = [-(-n // s) for n, s in zip(image.shape, steps, strict=True)]
    out = np.empty(new, np.uint8)
    for z in range(new[2]):
        block = np.nan_to_num(np.asarray(image[:, :, z * sz : (z + 1) * sz], np.float32), posinf=float(levels[-1]), neginf=float(levels[0]))
        block = block.mean(axis=2)
        if sx * sy > 1:
            block = np.pad(block, ((0, new[0] * sx - block.shape[0]), (0, new[1] * sy - block.shape[1])), mode="edge")
            block = block.reshape(new[0], sx, new[1], sy).mean(axis=(1, 3))
        out[:, :, z] = np.searchsorted(middles, block)
    return out


def _grey_levels(image: Array, modality: str | None) -> tuple[Array, tuple[float, float], dict[str, tuple[float, float]], str]:
    """Levels, first window, named windows, unit."""
    skip = [max(1, n // 96) for n in image.shape]
    sample = np.asarray(image[:: skip[0], :: skip[1], :: skip[2]], np.float32)
    sample = sample[np.isfinite(sample)]
    low, first, last, high = (float(v) for v in np.percentile(sample, (0, 1, 99, 100))) if sample.size else (0.0, 0.0, 1.0, 1.0)
    if modality == "ct" or (modality is None and low < -300 < 0 < high):
        places, values = zip(*_CT_LEVELS_HU, strict=True)
        levels = np.interp(np.arange(256), places, values)
        return levels, _CT_WINDOWS_HU["soft tissue"], _CT_WINDOWS_HU, "HU"
    body = sample[sample > low]
    if body.size:
        last = max(last, float(np.percentile(body, 99.5)))
    top = max(last, min(high, first + 1.6 * (last - first)), low + 1e-6)
    return np.linspace(min(low, first), top, 256), (first, max(last, first + 1e-6)), {}, ""


def _code_masks(
    masks: Iterable[tuple[str, Array]], turn: Reorientation, steps: Shape, colours: Sequence[tuple[int, int, int]], voxel_ml: float
) -> tuple[Array, tuple[tuple[int, ...], ...], tuple[Label, ...]]:
    places = [np.minimum(np.arange(0, n, s) + s // 2, n - 1) for n, s in zip(turn.new_shape, steps, strict=True)]
    codes = np.zeros([len(p) for p in places], np.uint16)
    sets: list[tuple[int, ...]] = [()]
    labels: list[Label] = []
    for name, mask in masks:
        if mask.shape != turn.shape:
            accepted, fix = f"the grid of the image, {turn.shape}", "segment the image that the mask belongs to"
            raise DataError(name, f"a mask of shape {mask.shape}", accepted, fix)
        full = mask != 0
        thin = turn.apply(full)[np.ix_(*places)]
        for old in np.unique(codes[thin]).tolist():
            codes[thin & (codes == old)] = len(sets)
            sets.append((*sets[old], len(labels)))
        colour = colours[len(labels) % len(colours)]
        labels.append(Label(name, colour, np.count_nonzero(full) * voxel_ml, _centre(thin), int(np.count_nonzero(thin))))
    return (*_used(codes, sets, labels), tuple(labels))


def _used(codes: Array, sets: Sequence[tuple[int, ...]], labels: Sequence[Label]) -> tuple[Array, tuple[tuple[int, ...], ...]]:
    """Codes without gaps in the smallest type; in every set the smallest label comes first."""
    there = sorted({0, *np.unique(codes).tolist()})
    renumber = np.zeros(len(sets), np.uint8 if len(there) <= 256 else np.uint16)
    renumber[there] = np.arange(len(there))
    return renumber[codes], tuple(tuple(sorted(sets[code], key=lambda label: labels[label].voxels)) for code in there)


def _centre(mask: Array) -> tuple[int, int, int] | None:
    """A voxel of the mask near its middle, in the plane where most of it lies."""
    if not mask.any():
        return None
    z = int(np.argmax(mask.sum(axis=(0, 1))))
    x, y = np.nonzero(mask[:, :, z])
    nearest = int(np.argmin((x - x.mean()) ** 2 + (y - y.mean()) ** 2))
    return int(x[nearest]), int(y[nearest]), z


def _notes(steps: Shape, affine: Array) -> tuple[str, ...]:
    notes = []
    if max(steps) > 1:
        notes.append(
            f"To keep this page small, the viewer shows means of blocks of {steps[0]} × {steps[1]} × {steps[2]} voxels, and of the "
            "masks the voxel in the middle of each block. Volumes in ml are those of the full masks."
        )
    directions = np.abs(np.asarray(affine, float)[:3, :3] / spacing_of(affine))
    if directions.max(axis=0).min() < 0.996 or shear_degrees(affine) > 5:
        notes.append(
            f"The planes are those of the voxel grid ({orientation_of(affine)}), which is oblique; the letters name the nearest side."
        )
    return tuple(notes)


def _millilitres(volume: float | None) -> str:
    if volume is None:
        return ""
    return f"{volume:,.0f} ml" if volume >= 100 else f"{volume:.1f} ml" if volume >= 1 else f"{volume:.3f} ml"


def _packed(array: Array) -> str:
    """Bytes with x running fastest, gzip, base64."""
    flat = array.tobytes(order="F") if array.dtype.itemsize == 1 else array.astype("<u2").tobytes(order="F")
    return base64.b64encode(igzip.compress(flat, compresslevel=3)).decode()
