"""What is looked at to tell a mask that is wrong: one table of checks; a new check is one more object in `CHECKS`.

A check sees a structure and its scene and returns a `Finding`: what it measured, what it says where that is implausible, and why it could
not judge. Nothing here knows of a file, a page or a command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy

from medlore.segmenting.scene import Structure


@dataclass(frozen=True)
class Finding:
    """What a check found of one structure.

    Args:
        measured: name -> number, for `case.json`.
        says: what is implausible, in a few words; None where nothing is.
        not_judged: why it could not judge; None where it could.
    """

    measured: dict[str, Any] = field(default_factory=dict)
    says: str | None = None
    not_judged: str | None = None


NOTHING = Finding()


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Args:
        name: under which `case.json` has its flags.
        about: one line for people.
        look: structure -> finding.
    """

    name: str
    about: str
    look: Callable[[Structure], Finding]


def volume(structure: Structure) -> Finding:
    """Millilitres against the range that the pack states; too small and on the edge of the image is cut, not small."""
    expected, scene, ml = structure.expected, structure.scene, structure.ml
    measured: dict[str, Any] = {"volume_ml": round(ml, 3)}
    if expected is None or expected.ml is None:
        return Finding(measured, not_judged="the pack states no range of volumes")
    low, high = expected.ml
    measured["expected_ml"] = [low, high]
    if ml > high:
        return Finding(measured, f"{_ml(ml)} ml, expected {low:g} to {high:g}")
    if ml >= low:
        return Finding(measured)
    if not scene.whole:
        return Finding(measured, not_judged=f"the image is shorter than {scene.expected.least_mm:g} mm, so a part of it may lie outside")
    if structure.found is None:
        why = "; the brain is cut by the edge of the image" if scene.brain_is_cut else ""
        return Finding(measured, f"not found, expected {low:g} to {high:g} ml{why}")
    if scene.is_cut(structure.found):
        return Finding(measured | {"cut": True}, f"{_ml(ml)} ml, cut by the edge of the image")
    return Finding(measured, f"{_ml(ml)} ml, expected {low:g} to {high:g}")


def apart(structure: Structure) -> Finding:
    """What lies apart from the pieces that the structure comes in (26 neighbours)."""
    expected, found = structure.expected, structure.found
    if found is None or expected is None or expected.pieces is None:
        return NOTHING
    parts, _ = scipy.ndimage.label(found[1], structure=np.ones((3, 3, 3)))
    sizes = np.sort(np.bincount(parts.reshape(-1))[1:])[::-1]
    away = float(sizes[expected.pieces :].sum()) * structure.scene.voxel_ml
    limits = structure.scene.expected.limits
    says = f"{_ml(away)} ml apart" if away > max(limits["apart_ml"], limits["apart_share"] * structure.ml) else None
    return Finding({"apart_ml": round(away, 3)}, says)


def outside(structure: Structure) -> Finding:
    """The share that lies outside of what the pack's structures lie inside (the brain)."""
    scene = structure.scene
    around = scene.expected.inside
    if structure.found is None or structure.expected is None or structure.label == around:
        return NOTHING
    if scene.brain is None:
        return Finding(not_judged=f"no {around or 'brain'} was found around it")
    share = 1 - scene.inside_share(structure.found)
    says = f"{share:.0%} of it outside of the {around or 'brain'}" if share > scene.expected.limits["outside_share"] else None
    return Finding({"outside_share": round(share, 4)}, says)


def sides(structure: Structure) -> Finding:
    """Left against right: of a pair in one mask by the mid plane of the brain, of a label with a side by its partner."""
    expected, scene = structure.expected, structure.scene
    if structure.partner is not None:
        return _compared(structure, (structure.ml, structure.partner), ("here", "the other side"))
    if structure.label.startswith(("left ", "right ")):
        return Finding(not_judged="its partner on the other side was not asked for")
    if structure.found is None or expected is None or not expected.paired:
        return NOTHING
    if scene.plane is None:
        return Finding(not_judged="no brain is known, so neither is its mid plane")
    left = scene.plane.is_left(scene.places(structure.found))
    one, other = (float(np.count_nonzero(side)) * scene.voxel_ml for side in (~left, left))
    return _compared(structure, (one, other), ("right", "left"))


def _compared(structure: Structure, ml: tuple[float, float], names: tuple[str, str]) -> Finding:
    """Two sides, in millilitres."""
    (one, other), (first, second) = ml, names
    if not structure.scene.whole:
        return Finding(not_judged=f"the image is shorter than {structure.scene.expected.least_mm:g} mm: one side may lie outside")
    share = min(one, other) / max(one, other) if max(one, other) > 0 else 1.0
    measured = {"side_ml": [round(one, 3), round(other, 3)], "smaller_side": round(share, 3)}
    uneven = share < structure.scene.expected.limits["smaller_side"]
    return Finding(measured, f"{_ml(one)} ml {first}, {_ml(other)} ml {second}" if uneven else None)


def dropped(structure: Structure) -> Finding:
    """Stray parts that the pack's rules took away: many of them say that the network was lost."""
    if not structure.dropped_ml:
        return NOTHING
    most = structure.scene.expected.limits["dropped_share"] * structure.ml
    says = f"{_ml(structure.dropped_ml)} ml of stray parts dropped" if structure.dropped_ml > most else None
    return Finding({"dropped_ml": round(structure.dropped_ml, 3)}, says)


def border(structure: Structure) -> Finding:
    """Mean entropy of the probabilities along the border of the mask, in bits: 0 is a sharp border, 1 is a coin."""
    if structure.entropy is None:
        return NOTHING
    measured = {"border_entropy": round(structure.entropy, 4)}
    most = structure.scene.expected.limits.get("border_entropy")
    if most is None:
        return Finding(measured, not_judged="the pack states no limit of the border's entropy")
    says = f"a vague border (entropy {structure.entropy:.2f} bits, at most {most:g} expected)" if structure.entropy > most else None
    return Finding(measured, says)


def agreement(structure: Structure) -> Finding:
    """Dice with the same image seen through shifted windows, and seen in a mirror (thorough only)."""
    least = structure.scene.expected.limits["agreement"]
    low = [f"Dice {dice:.2f} with {way}" for way, dice in structure.agreement.items() if dice < least]
    measured = {"agreement": {way: round(dice, 4) for way, dice in structure.agreement.items()}} if structure.agreement else {}
    return Finding(measured, ", ".join(low) or None)


CHECKS = (
    Check("volume", "volume against the range of adults", volume),
    Check("apart", "pieces that lie apart", apart),
    Check("outside", "share outside of the brain", outside),
    Check("sides", "left against right", sides),
    Check("dropped", "stray parts that were dropped", dropped),
    Check("border", "entropy of the border", border),
    Check("agreement", "agreement with shifted windows and with the mirror image", agreement),
)


def _ml(value: float) -> str:
    """Three digits are enough.

    Examples:
        >>> _ml(241.4), _ml(3.14), _ml(0.0)
        ('241', '3.1', '0')
    """
    return f"{value:.0f}" if value >= 20 or value == 0 else f"{value:.1f}"
