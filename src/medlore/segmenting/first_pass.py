"""A first pass: a small network that sees the whole head at once finds the brain and its halves; all else is looked for inside it.

A pack may name one (`preprocessing.first_pass`): a shipped pack that finds `brain` and both `halves`. Before the windows of the pack
itself, what lies further than `margin_mm` from the brain is set to 0, as a skull stripping does, so a skull, a face or a neck cannot be
taken for tissue. A label `left X` is X on the left side of the plane between the halves, `right X` on the right. An image with less than
`stripped_ml` of voxels that are not 0 was stripped before and is not cut again. One that is shorter than `least_mm` along an axis, or in
which less than `least_ml` of brain is found, is a crop: it stays as it is, and a note then names the labels that have a side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy

from medlore.data.volumes.geometry import Array, bounding_box, spacing_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import PackedMasks
from medlore.segmenting.midplane import midplane

_SIDE = re.compile(r"(left|right) ")
Held = dict[str, tuple[PackedMasks, int]]
Ask = Callable[[Volume, Sequence[str]], Mapping[str, Array]]


@dataclass(frozen=True)
class FirstPassRules:
    """What `preprocessing.first_pass` says.

    Args:
        pack: a shipped pack, `medlore:NAME`.
        brain: its label of the brain.
        halves: `left` and `right` -> its label of that half.
        margin_mm: how far around the brain the image is kept.
        least_mm: an image shorter than this along an axis is a crop.
        least_ml: a brain smaller than this is none.
        stripped_ml: an image with less that is not 0 holds no skull; the largest heads have about 1.9 l inside it.
    """

    pack: str
    brain: str
    halves: Mapping[str, str]
    margin_mm: float = 4.0
    least_mm: float = 110.0
    least_ml: float = 300.0
    stripped_ml: float = 2000.0


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What a first pass has found.

    Args:
        volume: to go on with: without what lies outside of the brain, or as it was, with a note.
        halves: `left` and `right` -> Boolean x y z of the file's grid; empty where no brain was found.
        brain_ml: the volume of the brain, before the margin.
        brain: Boolean x y z of the file's grid, what all structures are looked for inside: the brain with its margin, or what an earlier
            stripping left; None where none was found.
    """

    volume: Volume
    halves: Mapping[str, Array] = field(default_factory=dict)
    brain_ml: float = 0.0
    brain: Array | None = None


def look_first(volume: Volume, rules: FirstPassRules, labels: Sequence[str], ask: Ask) -> FirstPass:
    """Find the brain and its halves.

    Args:
        volume: the whole image.
        rules: of the pack.
        labels: that were asked for; those with a side are named where the sides cannot be distinguished.
        ask: labels of the first pass -> masks on the volume's grid.
    """
    spacing = spacing_of(volume.affine)
    sided = [label for label in labels if side_of(label) is not None]
    if min(n * mm for n, mm in zip(volume.shape, spacing, strict=True)) < rules.least_mm:
        return FirstPass(_with_sides_unknown(volume, sided, "the image is too small to show a whole head"))
    found = ask(volume, [rules.brain, *rules.halves.values()])
    brain = found[rules.brain]
    brain_ml = float(brain.sum()) * float(np.prod(spacing)) / 1000
    if brain_ml < rules.least_ml:
        came = f"the first pass found {brain_ml:.0f} ml of brain, and was not followed"
        return FirstPass(_with_sides_unknown(volume, sided, came), brain_ml=brain_ml)
    halves = two_halves(volume, brain, found[rules.halves["left"]], found[rules.halves["right"]])
    if float(np.count_nonzero(volume.array)) * float(np.prod(spacing)) / 1000 < rules.stripped_ml:
        return FirstPass(volume, halves, brain_ml, volume.array != 0)  # the coarse mask covers a stripped brain in part alone
    around = grown(brain, rules.margin_mm, spacing)
    kept = np.where(around, volume.array, np.zeros((), volume.array.dtype))
    return FirstPass(replace(volume, array=kept), halves, brain_ml, around)


def side_of(label: str) -> str | None:
    """`left` or `right` of a label that begins so, else None.

    Example:
        >>> side_of("left hippocampus"), side_of("hippocampus")
        ('left', None)
    """
    found = _SIDE.match(label)
    return found[1] if found else None


def in_their_halves(masks: Held, halves: Mapping[str, Array], undo: Callable[[Array], Array]) -> Held:
    """Masks of labels with a side, each in its own half; the others stay.

    Args:
        masks: label -> packed masks, in the frame in which they are held.
        halves: `left` and `right` -> Boolean x y z of the file's grid; nothing happens where there are none.
        undo: takes a volume of the file's grid to the frame of the masks.
    """
    framed = {side: undo(half) for side, half in halves.items()}
    return {label: cut_to(packed, index, framed.get(side_of(label) or "")) for label, (packed, index) in masks.items()}


def grown(mask: Array, by_mm: float, spacing: Array) -> Array:
    """A mask and all within a distance of it (x y z Boolean)."""
    box = bounding_box(mask)
    if box is None or by_mm <= 0:
        return mask
    reach = [int(np.ceil(by_mm / mm)) for mm in spacing]
    start = [max(a - r, 0) for a, r in zip(box.start, reach, strict=True)]
    stop = [min(b + r, n) for b, r, n in zip(box.stop, reach, mask.shape, strict=True)]
    part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    whole = np.zeros_like(mask)
    whole[part] = scipy.ndimage.distance_transform_edt(~mask[part], sampling=[float(mm) for mm in spacing]) <= by_mm
    return whole


def two_halves(volume: Volume, brain: Array, left: Array, right: Array) -> dict[str, Array]:
    """Every voxel on one of two sides of the plane between the halves; nothing where a half was not found."""
    plane = midplane(volume.array, brain, left, right, volume.affine)
    if plane is None:
        return {}
    on_the_left = plane.left_of((volume.shape[0], volume.shape[1], volume.shape[2]), volume.affine)
    return {"left": on_the_left, "right": ~on_the_left}


def cut_to(packed: PackedMasks, index: int, half: Array | None) -> tuple[PackedMasks, int]:
    """The part of a mask that lies in a half, or in any other Boolean volume of its frame; all of it where that is None."""
    found = None if half is None else packed.boxed(index)
    if found is None or half is None:
        return packed, index
    crop, mask = found
    kept = PackedMasks(packed.shape, 1)
    rows, columns = (slice(first, last) for first, last in zip(crop.start[1:], crop.stop[1:], strict=True))
    kept.set_planes(0, crop.start[0], (rows, columns), mask & crop.apply(half))
    return kept, 0


def _with_sides_unknown(volume: Volume, sided: Sequence[str], why: str) -> Volume:
    if not sided:
        return volume
    return volume.with_note(f"{why}: left and right cannot be distinguished, so {', '.join(sided)} hold both sides")


def first_pass_rules(rules: Any) -> FirstPassRules | None:
    """The rules that a pack's preprocessing holds; None where it holds none."""
    return FirstPassRules(**rules) if isinstance(rules, Mapping) else None
