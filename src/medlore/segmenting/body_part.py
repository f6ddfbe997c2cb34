"""Whether an image shows the part of the body and has the grey values that its labels need: a head, a trunk, Hounsfield units.

Told by the outline of the body in axial slices and, for CT, by the shares of air, tissue and bone. Conservative: what is not clearly
something else passes. The limits are those of adult anatomy with a margin; children's trunks and crops pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import scipy

from medlore.data.volumes.geometry import Array, reorientation_to, spacing_of
from medlore.data.volumes.intensity import hounsfield
from medlore.data.volumes.nifti import Volume

_GRID_MM = 3.0
_TRUNK = frozenset({"abdomen", "pelvis", "thorax"})
_WIDEST_HEAD_MM = 230.0  # heads are 130 to 170 mm wide; with ears, hair and a frame up to 200
_WIDEST_HEAD_AREA = 40_000.0  # mm2 of a slice; the largest of a head is about 31,000
_HEAD_MM = ((120.0, 205.0), (150.0, 260.0))  # width and length of a head with its scalp
_HEAD_LONGER = 1.08  # a head is longer than wide, a trunk is wider than deep
_HEAD_AREA = (12_000.0, 36_000.0)
_HEAD_BONE = 0.06  # share of a head that is denser than 250 HU; of a trunk it is half of it
_LEAST_SLICES = 5
_BODY_SHARE = 0.1


@dataclass(frozen=True)
class Looks:
    """What an image looks like, on a grid of about 3 mm.

    Args:
        modality: as asked.
        widths: from left to right in mm, of the body in each slice that has one.
        lengths: from front to back.
        areas: in mm2.
        free: share of the slices whose body touches no edge of the image from left to right or from front to back.
        hounsfield: whether grey values lie on the scale of CT: air near -1000 and soft tissue near 0.
        darker_than_water: share of values below -50.
        bone: share of the body above 250.
    """

    modality: str
    widths: Array
    lengths: Array
    areas: Array
    free: float
    hounsfield: bool
    darker_than_water: float
    bone: float


def looks_of(volume: Volume, modality: str) -> Looks:
    """Measure an image, thinned to about 3 mm."""
    turn = reorientation_to("RAS", volume.affine, volume.shape)
    spacing = spacing_of(turn.apply_to_affine(volume.affine))
    step = [max(round(_GRID_MM / float(mm)), 1) for mm in spacing]
    grey = turn.apply(volume.array)[tuple(slice(None, None, s) for s in step)]
    grey = np.asarray(np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0), np.float32)
    if modality == "ct":
        grey, offset, _ = hounsfield(grey)
        grey = grey + np.float32(offset)
    mm = spacing * step
    air, tissue = float(np.mean((grey > -1100) & (grey < -900))), float(np.mean((grey > -20) & (grey < 100)))
    on_scale = air > 0.02 and tissue > 0.05 and float(grey.min()) > -4000
    body = _largest(_body(grey, on_scale=on_scale))
    boxes = [(box, float(np.count_nonzero(plane)) * float(mm[0] * mm[1])) for plane in np.moveaxis(body, 2, 0) if (box := _box(plane))]
    kept = [(box, area) for box, area in boxes if area > 2000]
    free = [box[0] > 0 and box[1] < body.shape[0] and box[2] > 0 and box[3] < body.shape[1] for box, _ in kept]
    return Looks(
        modality,
        np.array([(box[1] - box[0]) * mm[0] for box, _ in kept]),
        np.array([(box[3] - box[2]) * mm[1] for box, _ in kept]),
        np.array([area for _, area in kept]),
        float(np.mean(free)) if free else 0.0,
        on_scale,
        float(np.mean(grey < -50)),
        float(np.mean(grey[body] > 250)) if body.any() else 0.0,
    )


def not_hounsfield(looks: Looks, regions: Collection[str]) -> str | None:
    """A CT without anything darker than water."""
    del regions
    odd = looks.modality == "ct" and looks.darker_than_water < 1e-3
    return "the image holds nothing darker than water, so it is no CT in Hounsfield units" if odd else None


def looks_like_ct(looks: Looks, regions: Collection[str]) -> str | None:
    """An image that was called MR and has air near -1000 and tissue near 0."""
    del regions
    if looks.modality != "mri" or not looks.hounsfield:
        return None
    return "the grey values are those of a CT (air near -1000, tissue near 0), but the modality is mri"


def no_head(looks: Looks, regions: Collection[str]) -> str | None:
    """Labels of the brain in an image whose body is too wide for a head in most of its slices."""
    if "brain" not in regions or len(looks.widths) < _LEAST_SLICES:
        return None
    width, area = float(np.percentile(looks.widths, 35)), float(np.percentile(looks.areas, 35))
    if width <= _WIDEST_HEAD_MM or area <= _WIDEST_HEAD_AREA:
        return None
    return f"labels of the brain, but the body is {float(np.median(looks.widths)):.0f} mm wide: this is no head"


def a_head(looks: Looks, regions: Collection[str]) -> str | None:
    """Labels of the trunk in an image of a head: longer than wide, of a head's size, and in CT with a skull."""
    if not set(regions) & _TRUNK or set(regions) - _TRUNK or len(looks.widths) < _LEAST_SLICES or looks.free < 0.5:
        return None
    width, length = (float(np.percentile(sizes, 75)) for sizes in (looks.widths, looks.lengths))
    area = float(np.percentile(looks.areas, 75))
    sized = all(low <= size <= high for size, (low, high) in zip((width, length), _HEAD_MM, strict=True))
    skull = looks.modality != "ct" or not looks.hounsfield or looks.bone > _HEAD_BONE
    if not (sized and length > _HEAD_LONGER * width and _HEAD_AREA[0] <= area <= _HEAD_AREA[1] and skull):
        return None
    return (
        f"labels of the {' and the '.join(sorted(set(regions) & _TRUNK))}, but the image looks like a head ({width:.0f} x {length:.0f} mm)"
    )


SIGNS: tuple[Callable[[Looks, Collection[str]], str | None], ...] = (not_hounsfield, looks_like_ct, no_head, a_head)


def oddities(volume: Volume, modality: str, regions: Collection[str]) -> list[str]:
    """What is odd about an image for labels of some regions; empty where nothing is.

    Args:
        volume: the whole image.
        modality: as asked.
        regions: of the labels, where they are known.
    """
    looks = looks_of(volume, modality)
    return [told for sign in SIGNS if (told := sign(looks, regions)) is not None]


def _body(grey: Array, *, on_scale: bool) -> Array:
    if on_scale:
        return np.asarray(grey > -300)
    low, high = np.percentile(grey, (0.5, 99.5))
    return np.asarray(grey > low + _BODY_SHARE * (high - low))


def _largest(body: Array) -> Array:
    """The largest connected part once thin bridges (a table, a coil) are cut."""
    opened = scipy.ndimage.binary_opening(body)
    parts, count = scipy.ndimage.label(opened)
    if not count:
        return np.zeros_like(body)
    sizes = np.bincount(parts.reshape(-1))
    sizes[0] = 0
    return np.asarray(parts == sizes.argmax())


def _box(plane: Array) -> tuple[int, int, int, int] | None:
    xs, ys = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
    return (int(xs[0]), int(xs[-1]) + 1, int(ys[0]), int(ys[-1]) + 1) if len(xs) else None
