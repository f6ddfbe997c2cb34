"""Faults that real heads have, put on a head whose labels are known: what a check has to notice, or a segmenter to bear.

Each is a function of a head and a generator of draws; it returns a head with its labels on the same grid. `faults` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks._head_labels import Head, codes_of
from benchmarks._volumes import on_another_grid
from medlore.data.volumes.augmentation import along_axes, blur_matrix, smooth_field
from medlore.data.volumes.geometry import Array, bounding_box, orientation_of, reorientation_to, spacing_of
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.synthesis import FIRST_OUTSIDE, OUTER_FLUID, SynthesisRules, draw_contrast

Fault = Callable[[Head, np.random.Generator], Head]
_BIAS = 0.35  # deviation of the field's logarithm
_NOISE = 0.12  # deviation, as a share of the grey value of white matter
_SLICE_MM = 5.0
_TILT_DEGREES = 20.0
_VESSELS = 1.4  # bright vessels, in units of white matter
_LESIONS = 3
_LESION_MM = (4.0, 10.0)
_CUT = 0.3  # share of the height that a short field of view loses


def with_image(head: Head, image: Array) -> Head:
    """The same head with other grey values, in its type."""
    kind = head.volume.array.dtype
    limits = np.iinfo(kind) if np.issubdtype(kind, np.integer) else None
    stored = image if limits is None else np.clip(np.rint(image), limits.min, limits.max)
    return replace(head, volume=replace(head.volume, array=stored.astype(kind)))


def on_grid(head: Head, image: Array, manual: Array, affine: Array) -> Head:
    """Another image and its labels (x y z), where the affine says."""
    kept = with_image(head, image)
    return replace(kept, volume=on_another_grid(kept.volume, kept.volume.array, affine), manual=manual)


def white_level(head: Head) -> float:
    """The median of cerebral white matter."""
    return float(np.median(head.volume.array[np.isin(head.manual, codes_of("cerebral white matter"))]))


def bias_field(head: Head, rng: np.random.Generator) -> Head:
    """A strong, smooth multiplicative field."""
    return with_image(head, head.volume.array * np.exp(np.float32(_BIAS) * smooth_field(rng, head.volume.shape, 2)))


def noise(head: Head, rng: np.random.Generator) -> Head:
    """Noise as magnitude images have it, in the air too."""
    level = _NOISE * white_level(head)
    real, imaginary = (rng.normal(0, level, head.volume.shape) for _ in range(2))
    return with_image(head, np.hypot(head.volume.array + real, imaginary))


def thick_slices(head: Head, rng: np.random.Generator) -> Head:
    """Slices of 5 mm, stored at 5 mm: fewer planes; labels by the plane's middle."""
    del rng
    step = max(round(_SLICE_MM / float(spacing_of(head.volume.affine)[2])), 1)
    planes = head.volume.shape[2] // step
    image = head.volume.array[:, :, : planes * step].astype(np.float32)
    image = image.reshape(*image.shape[:2], planes, step).mean(axis=3)
    affine = np.asarray(head.volume.affine, float) @ np.diag([1, 1, step, 1]).astype(float)
    affine[:3, 3] += np.asarray(head.volume.affine, float)[:3, 2] * (step - 1) / 2
    return on_grid(head, image, head.manual[:, :, step // 2 :: step][:, :, :planes], affine)


def tilt(head: Head, rng: np.random.Generator) -> Head:
    """The head nods by 20 degrees in its field of view."""
    sign = 1 if rng.random() < 0.5 else -1
    turn = {"angle": sign * _TILT_DEGREES, "axes": (1, 2), "reshape": False}
    image = ndimage.rotate(head.volume.array.astype(np.float32), order=1, **turn)
    return replace(with_image(head, image), manual=ndimage.rotate(head.manual, order=0, **turn))


def bright_vessels(head: Head, rng: np.random.Generator) -> Head:
    """Bright threads in the sulci and beside them, as contrast medium makes them."""
    image = head.volume.array.astype(np.float32)
    sulci = (head.manual > 0) & (image < head.fluid_below())
    threads = np.abs(smooth_field(rng, head.volume.shape, 24)) < 0.15  # sheets of a rough field meet the sulci in threads
    return with_image(head, np.where(sulci & threads, _VESSELS * white_level(head), image))


def lesion(head: Head, rng: np.random.Generator) -> Head:
    """A few round, dark lesions of white matter; their labels stay those of the tissue that was there."""
    image = head.volume.array.astype(np.float32)
    white = np.argwhere(np.isin(head.manual, codes_of("cerebral white matter")))
    spacing = spacing_of(head.volume.affine)
    at = np.stack(np.meshgrid(*[np.arange(n) for n in head.volume.shape], indexing="ij"), axis=-1)
    for _ in range(_LESIONS):
        distance = np.linalg.norm((at - white[rng.integers(len(white))]) * spacing, axis=-1)
        share = np.clip(rng.uniform(*_LESION_MM) - distance, 0, 2) / 2
        image += share * (head.fluid_below() - image) * (image > 0)
    return with_image(head, image)


def short_view(head: Head, rng: np.random.Generator) -> Head:
    """The field of view ends in the brain, below or above."""
    box = bounding_box(head.manual > 0)
    assert box is not None
    lost = int(_CUT * (box.stop[2] - box.start[2]))
    kept = slice(box.start[2] + lost, None) if rng.random() < 0.5 else slice(0, box.stop[2] - lost)
    affine = np.array(head.volume.affine, float)
    affine[:3, 3] += affine[:3, 2] * (kept.start or 0)
    return on_grid(head, head.volume.array[:, :, kept], head.manual[:, :, kept], affine)


def stored_otherwise(head: Head, rng: np.random.Generator) -> Head:
    """The same head in another storage order: the answer has to be the same."""
    code = ("ASL", "PIR", "SPL", "IRA")[int(rng.integers(4))]
    turn = reorientation_to(code, head.volume.affine, head.volume.shape)
    image, manual = (np.ascontiguousarray(turn.apply(array)) for array in (head.volume.array, head.manual))
    return on_grid(head, image, manual, turn.apply_to_affine(head.volume.affine))


def skull_of(maps: Path) -> Fault:
    """Skull, scalp, face and neck of a whole-head label map, put around a stripped head by the boxes of the two brains.

    Args:
        maps: folder of the label maps of whole heads.
    """

    def put_back(head: Head, rng: np.random.Generator) -> Head:
        files = sorted(maps.glob("training_seg_*.nii.gz"))
        source = read_volume(files[int(rng.integers(len(files)))])
        turn = reorientation_to(orientation_of(head.volume.affine), source.affine, source.shape)
        codes = np.asarray(np.rint(turn.apply(source.array)), np.uint16)
        around = _fitted(codes, head)
        rules = SynthesisRules(t1_like=1.0, t2_like=0.0, flair_like=0.0)
        contrast = draw_contrast(rng, rules)
        grey = contrast.draw(around, rng, texture=smooth_field(rng, head.volume.shape, 12))
        grey = along_axes(grey, [blur_matrix(n, 0.6) for n in head.volume.shape]) * np.float32(white_level(head) / max(contrast.mean[2], 1))
        outside = (around >= FIRST_OUTSIDE) | (around == OUTER_FLUID)
        return with_image(head, np.where((head.volume.array > 0) | ~outside, head.volume.array, grey))

    return put_back


def _fitted(codes: Array, head: Head) -> Array:
    """A label map in the same storage order, on a head's grid: the box of its brain on the box of the head's brain (nearest voxel)."""
    brain = bounding_box((codes > 0) & (codes < FIRST_OUTSIDE) & (codes != OUTER_FLUID))
    own = bounding_box(head.volume.array > 0)
    assert brain is not None
    assert own is not None
    index, inside = [], []
    for axis, n in enumerate(head.volume.shape):
        step = (brain.stop[axis] - brain.start[axis]) / (own.stop[axis] - own.start[axis])
        place = np.rint(brain.start[axis] + (np.arange(n) - own.start[axis]) * step).astype(int)
        index.append(np.clip(place, 0, codes.shape[axis] - 1))
        inside.append((place >= 0) & (place < codes.shape[axis]))
    found = codes[np.ix_(*index)]
    found[~np.logical_and.outer(np.logical_and.outer(inside[0], inside[1]), inside[2])] = 0
    return found


FAULTS: dict[str, Fault] = {
    "bias field": bias_field,
    "noise": noise,
    "slices of 5 mm": thick_slices,
    "tilt of 20 degrees": tilt,
    "bright vessels": bright_vessels,
    "lesions": lesion,
    "short field of view": short_view,
    "other storage order": stored_otherwise,
}


def faults(maps: Path) -> dict[str, Fault]:
    """All faults, with the skull of the label maps in `maps`."""
    return {"skull put back": skull_of(maps), **FAULTS}
