"""One training patch of a cached case: where it lies, what is asked for, and how image and masks are changed together.

A patch is a function of the case, the rules and the seed words alone; so a run that was cut off goes on with the very
patches that it would have had, whatever process draws them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.augmentation import GreyRules, Places, WarpRules, change_greys, cut, draw_places, draw_view, take
from medlore.data.volumes.geometry import Array, Shape, bounding_box, spacing_of
from medlore.data.volumes.intensity import PUBLISHED_RULE, IntensityRule, intensity_of
from medlore.data.volumes.masks import code_table
from medlore.data.volumes.synthesis import (
    FIRST_OUTSIDE,
    OUTER_FLUID,
    Contrast,
    SynthesisRules,
    dilated,
    draw_contrast,
    draw_point_spread,
    majority_of_tissues,
    strip_raggedly,
    strip_skull,
    synthesise,
)
from medlore.data.volumes.training_cache import CachedCase
from medlore.errors import InputError

_SIDED = re.compile(r"(^|\W)(left|right)(\W|$)", re.IGNORECASE)
View = tuple[slice, slice, slice]
_OTHER_SHARE = 0.25  # how often a label that cannot be in the volume is asked for, against one that lies elsewhere in it
_VIEW = 0.3  # by how much of its length a field of view may be longer than the head, on either side
_SOFT_EDGE = 0.4  # how often the edge of a stripped brain is blurred
_COARSE_MM = 6.25  # at which distance a whole label map is looked at for its grey statistics
_WHOLE_MM = 180.0  # a patch of this size shows a whole head, and is normalised by itself
_NECK_LOW, _NECK_HIGH = 0.0, 0.3  # how much of a patch may lie below the label map
_SHOULDERS = 1.5  # by how much a body is wider at most, a patch below the label map


@dataclass(frozen=True)
class PatchRules:
    """How patches are drawn.

    Args:
        foreground: the chance that a patch is centred on a voxel of any label, voxel by voxel.
        by_label: the chance that a label is drawn first (each alike), then one of its voxels; the rest lies anywhere.
        jitter: a centre moves by up to this share of the patch's edge.
        negatives: at most this many absent labels for each present one, and always at least one if there is one.
        least_voxels: a label counts as present in a patch from this many voxels on.
        weights: label -> how much it counts in the loss, beside 1 for the others.
        augment: whether anything but the place is random.
        warp: geometry.
        grey: grey values.
        synthesis: of cases without an image.
        intensity: constants of the normalisation, for synthesised images.
    """

    foreground: float = 0.3
    by_label: float = 0.5
    jitter: float = 0.25
    negatives: float = 0.5
    least_voxels: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)
    augment: bool = True
    warp: WarpRules = field(default_factory=WarpRules)
    grey: GreyRules = field(default_factory=GreyRules)
    synthesis: SynthesisRules = field(default_factory=SynthesisRules)
    intensity: IntensityRule = PUBLISHED_RULE


@dataclass(frozen=True, eq=False)
class Patch:
    """A training example.

    Args:
        image: 1 x y z float32.
        targets: q x y z Boolean.
        labels: the q prompts: those in the patch first, then absent ones.
        positives: how many of them are in the patch.
        weight: q, or None where all count alike.
    """

    image: Tensor
    targets: Tensor
    labels: tuple[str, ...]
    positives: int
    weight: Tensor | None = None


def draw_patch(
    case: CachedCase, *, size: Shape, labels: Sequence[str], max_prompts: int, seed_words: Sequence[int], rules: PatchRules
) -> Patch:
    """Draw a patch.

    Args:
        case: from the cache.
        size: of the patch; volumes may be smaller and are then placed anywhere in it, with air around them.
        labels: that may be asked for; at least one must be annotated in the case or known to be absent from it.
        max_prompts: at most so many prompts.
        seed_words: non-negative whole numbers (seed, step, position in the batch).
        rules: how.

    Raises:
        InputError: the case has none of the labels.
    """
    rng = np.random.default_rng([*seed_words])
    asked = [label for label in labels if label in case.labels]
    others = [label for label in labels if label in case.absent]
    if not asked and not others:
        accepted = f"at least one of the labels that it annotates: {', '.join(case.labels)}"
        raise InputError(case.name, f"none of the {len(labels)} label(s) asked for is known in it", accepted, "leave the case out")
    centre = _centre(case, size, asked, rng, rules)
    places = draw_places(centre, size, rng, rules.warp, flip=_has_partners(case, asked)) if rules.augment else Places(None)
    coordinates = places.coordinates
    if case.synthesise and coordinates is not None and rng.random() < rules.synthesis.longer_neck:
        _lengthen_neck(coordinates, rng)
    start = [int(np.floor(c - n / 2 + 0.5)) for c, n in zip(centre, size, strict=True)]
    if coordinates is None:
        codes = cut(case.codes, start, size, outside=0)
    else:
        codes = take(case.codes, coordinates, outside=0, nearest=True).astype(case.codes.dtype)
    view = draw_view(rng, size) if rules.augment and rng.random() < rules.grey.view_probability else None
    if case.synthesise:
        codes, image = _synthesised(case, codes, rng, rules, view)
    else:
        codes, image = _seen(view, codes, _taken(case, coordinates, start, size, rng, rules), case.air)
    members = {label: case.members[other_side(label) if places.mirrored else label] for label in asked}
    return _with_prompts(codes, image, members, others, max_prompts, rng, rules)


def other_side(label: str) -> str:
    """The name of the same structure on the other side; a name without a side is its own.

    Example:
        >>> other_side("left hippocampus"), other_side("vermis")
        ('right hippocampus', 'vermis')
    """
    return _SIDED.sub(lambda found: found[1] + ("right" if found[2].lower() == "left" else "left") + found[3], label)


def _has_partners(case: CachedCase, asked: Sequence[str]) -> bool:
    """Whether a mirror image of the case can be labelled: each label with a side has its partner."""
    return all(other_side(label) in case.members for label in asked)


def _lengthen_neck(coordinates: Array, rng: np.random.Generator) -> None:
    """Move a patch down, and let what would lie below the label map be its lowest plane, wider and wider: neck and shoulders (in place)."""
    across = coordinates.shape[3]
    coordinates[2] -= np.float32(rng.uniform(_NECK_LOW, _NECK_HIGH) * across)
    depth = np.clip(1 - coordinates[2], 0, None)
    wider = 1 + depth * np.float32(rng.uniform(0, _SHOULDERS) / across)
    for row, share in zip(coordinates, (wider, np.sqrt(wider)), strict=False):  # shoulders are wide, a chest is not as deep
        middle = row.mean()
        row[...] = (row - middle) / share + middle
    np.maximum(coordinates[2], 1, out=coordinates[2])


def _centre(case: CachedCase, size: Shape, asked: Sequence[str], rng: np.random.Generator, rules: PatchRules) -> list[float]:
    """Middle of the patch in voxels; where the volume is larger than the patch, the patch stays inside it."""
    chance = rng.random()
    here = [label for label in asked if label in case.points]
    target: Sequence[float] | None = None
    if here and chance < rules.foreground + rules.by_label:
        share = np.array([case.voxels[label] for label in here], float) if chance < rules.foreground else np.ones(len(here))
        points = case.points[here[int(rng.choice(len(here), p=share / share.sum()))]]
        target = points[int(rng.integers(len(points)))]
    centre = []
    moves, places = rng.uniform(-rules.jitter, rules.jitter, 3), rng.random(3)
    for axis, (n, whole) in enumerate(zip(size, case.shape, strict=True)):
        low, high = sorted((n / 2 - 0.5, whole - n / 2 - 0.5))  # a small volume may lie anywhere in the patch
        wanted = low + (high - low) * places[axis] if target is None or whole <= n else target[axis] + moves[axis] * n
        centre.append(float(np.clip(wanted, low, high)))
    return centre


def _taken(
    case: CachedCase, coordinates: Array | None, start: Sequence[int], size: Shape, rng: np.random.Generator, rules: PatchRules
) -> Array:
    volume = case.image
    assert volume is not None  # noqa: S101  # nosec B101 # only cases to be synthesised have none
    if coordinates is None:
        image = cut(volume, start, size, outside=case.air).astype(np.float32)
    else:
        image = take(volume, coordinates, outside=case.air, nearest=False)
    return change_greys(image, rng, rules.grey, air=case.air, bias=case.modality == "mri") if rules.augment else image


def _synthesised(case: CachedCase, codes: Array, rng: np.random.Generator, rules: PatchRules, view: View | None) -> tuple[Array, Array]:
    """Codes (without what was stripped, or lies out of view) and normalised image."""
    contrast = draw_contrast(rng, rules.synthesis)
    kept = _stripped(case, codes, rng, rules.synthesis)
    stripped = kept is not codes
    spread = draw_point_spread(rng, (codes.shape[0], codes.shape[1], codes.shape[2]), rules.synthesis)
    if stripped and rng.random() < _SOFT_EDGE:  # blurred after the stripping, as averages of many heads and resampled images are
        image = synthesise(kept, rng, rules.synthesis, contrast=contrast, keep=dilated(kept > 0, 1), spread=spread)
        kept = majority_of_tissues(kept, spread)
    else:
        image = synthesise(codes, rng, rules.synthesis, contrast=contrast, keep=kept > 0 if stripped else None, spread=spread)
        kept = np.where(kept > 0, majority_of_tissues(codes, spread), 0).astype(codes.dtype)
    if all(n * mm >= _WHOLE_MM for n, mm in zip(codes.shape, spacing_of(case.affine), strict=True)):
        kept, image = _seen(view, kept, image, 0.0)
        box = bounding_box(image > 0)
        intensity = intensity_of(image if box is None else box.apply(image), "mri", where=case.name, rule=rules.intensity)
        return kept, intensity.apply(image)
    reference = _reference(case, contrast, rng, stripped=stripped)
    intensity = intensity_of(reference, "mri", where=case.name, rule=rules.intensity)
    image = intensity.apply(image)
    air = ((0.0 if stripped else float(contrast.mean[0])) - intensity.mean) / intensity.deviation
    if rules.augment:  # what the coarse statistics leave out: bias, blur and noise over the whole head
        image *= np.float32(rng.uniform(1 - rules.grey.gain / 2, 1 + rules.grey.gain / 2))
        image += np.float32(rng.uniform(-rules.grey.shift, rules.grey.shift) / 2)
    return _seen(view, kept, image, air)


def _stripped(case: CachedCase, codes: Array, rng: np.random.Generator, rules: SynthesisRules) -> Array:
    """What a skull stripping leaves, or the same array where there is none."""
    if rng.random() >= rules.skull_strip:
        return codes
    if rng.random() < rules.ragged_strip:
        return strip_raggedly(codes, rng, voxel_mm=float(spacing_of(case.affine)[0]))
    return strip_skull(codes, rng)


def _reference(case: CachedCase, contrast: Contrast, rng: np.random.Generator, *, stripped: bool) -> Array:
    """Grey values over the box of all values above 0, as a whole scan would have it: the patch alone does not determine them."""
    codes = _coarse(str(case.codes_file), max(round(_COARSE_MM / float(spacing_of(case.affine)[0])), 1))
    if stripped:
        brain = bounding_box((codes > 0) & (codes < FIRST_OUTSIDE) & (codes != OUTER_FLUID))
        codes = codes if brain is None else np.where(brain.apply(codes) < FIRST_OUTSIDE, brain.apply(codes), 0)
    elif rng.random() < 0.5:  # many scans end above the neck
        codes = codes[:, :, int(rng.uniform(0, 0.4) * codes.shape[2]) :]
    if not stripped and contrast.noisy_air:  # noise fills the whole field of view
        codes = np.pad(codes, [(int(rng.uniform(0, _VIEW) * n), int(rng.uniform(0, _VIEW) * n)) for n in codes.shape])
    elif not stripped:
        box = bounding_box(codes > 0)
        codes = codes if box is None else box.apply(codes)
    grey = contrast.draw(codes, rng, texture=np.asarray(rng.standard_normal(codes.shape)))
    return contrast.correct(np.where(codes > 0, grey, 0) if stripped else grey)


@functools.lru_cache(maxsize=256)
def _coarse(path: str, step: int) -> Array:
    """Every few voxels of a whole label map; read once by each process."""
    return np.ascontiguousarray(np.load(path, mmap_mode="r", allow_pickle=False)[::step, ::step, ::step])


def _seen(view: View | None, codes: Array, image: Array, air: float) -> tuple[Array, Array]:
    """Codes and image without what lies out of view."""
    if view is None:
        return codes, image
    seen_codes, seen = np.zeros_like(codes), np.full_like(image, air)
    seen_codes[view], seen[view] = codes[view], image[view]
    return seen_codes, seen


def _with_prompts(
    codes: Array,
    image: Array,
    members: Mapping[str, tuple[int, ...]],
    others: Sequence[str],
    max_prompts: int,
    rng: np.random.Generator,
    rules: PatchRules,
) -> Patch:
    """Prompts: labels in the patch first, then labels that are known to be absent from it."""
    counts = np.bincount(codes.reshape(-1))
    asked = list(members)
    tables = dict(zip(asked, code_table(members, asked, len(counts)), strict=True))
    present = [label for label in asked if counts[tables[label]].sum() >= rules.least_voxels]
    elsewhere = [label for label in asked if label not in present]
    room = max(1, int(rules.negatives * len(present))) if elsewhere or others else 0
    positives = _some(present, max_prompts - (1 if room and max_prompts > 1 else 0), rng)  # a full list still has one that is absent
    # Labels that lie elsewhere in this very volume teach more than those of another region.
    share = [1.0] * len(elsewhere) + [_OTHER_SHARE] * len(others)
    negatives = _some([*elsewhere, *others], min(room, max_prompts - len(positives)), rng, share)
    targets = np.zeros((len(positives) + len(negatives), *codes.shape), np.bool_)
    index = codes.astype(np.intp)
    for row, label in zip(targets, (*positives, *negatives), strict=True):
        if label in tables:  # an absent label may have fewer voxels than `least_voxels`: they are true all the same
            tables[label].take(index, out=row, mode="clip")
    labels = (*positives, *negatives)
    weight = torch.tensor([float(rules.weights.get(label, 1.0)) for label in labels]) if rules.weights else None
    return Patch(torch.from_numpy(np.ascontiguousarray(image))[None], torch.from_numpy(targets), labels, len(positives), weight)


def _some(labels: Sequence[str], most: int, rng: np.random.Generator, share: Sequence[float] | None = None) -> list[str]:
    if len(labels) <= most:
        return list(labels)
    chances = None if share is None else np.asarray(share) / np.sum(share)
    return [labels[i] for i in sorted(rng.choice(len(labels), most, replace=False, p=chances))]
