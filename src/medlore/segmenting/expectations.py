"""What a pack expects of its answers (`preprocessing.checks`), and which evidence a run gathers to look at them (no torch).

A pack states, for each modality, the volume that a structure has in an adult (both sides together), in how many pieces it comes, whether
it has a part on either side of the mid plane, and the label that all of them lie inside. Sources stand beside them. Packs without it load
as before: then only what needs no expectation is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

CheckLevel = Literal["none", "quick", "thorough"]
# Beyond these a check speaks up; a pack may state its own (`limits`). Set on synthetic heads and on the template, see docs/evidence.md.
LIMITS: Mapping[str, float] = MappingProxyType({
    "apart_ml": 1.0,  # that lie apart from the largest pieces, and
    "apart_share": 0.03,  # as a share of the structure
    "smaller_side": 0.5,  # of the larger one; 0.68 is the least of five heads with manually corrected labels
    "outside_share": 0.15,  # of a structure outside of what it lies inside
    "dropped_share": 0.5,  # of what is kept, as stray parts
    "agreement": 0.7,  # Dice with the windows shifted, or with the image mirrored
})  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """What is expected of one structure.

    Args:
        ml: least and most of an adult's; None where no range is stated.
        pieces: in how many connected pieces it comes; None where it may have any number.
        paired: whether it has a part on either side of the mid plane.
    """

    ml: tuple[float, float] | None = None
    pieces: int | None = None
    paired: bool = False


@dataclass(frozen=True)
class Expectations:
    """What a pack expects of its answers in one modality.

    Args:
        structures: label -> expectation.
        inside: the label that all of them lie inside, e.g. `brain`; None where there is none.
        least_mm: an image shorter than this along an axis shows a part: what is small or on one side only in it is no fault.
        limits: beyond which a check speaks up; `LIMITS` with what the pack states laid over them.
    """

    structures: Mapping[str, Expectation] = field(default_factory=dict)
    inside: str | None = None
    least_mm: float = 0.0
    limits: Mapping[str, float] = field(default_factory=lambda: LIMITS)


def expectations_of(preprocessing: Mapping[str, Any], modality: str) -> Expectations:
    """What a pack expects in a modality; nothing where it states nothing.

    Examples:
        >>> told = {"checks": {"mri": {"structures": {"brain": {"ml": [850, 1750], "pieces": 1}}, "inside": "brain"}}}
        >>> expectations_of(told, "mri").structures["brain"].ml, expectations_of(told, "ct").structures
        ((850.0, 1750.0), {})
    """
    told = preprocessing.get("checks", {}).get(modality, {})
    return Expectations(
        {label: _expectation(entry) for label, entry in told.get("structures", {}).items()},
        told.get("inside"),
        float(told.get("least_mm", 0.0)),
        {**LIMITS, **told.get("limits", {})},
    )


def _expectation(entry: Mapping[str, Any]) -> Expectation:
    low, high = entry.get("ml", (None, None))
    return Expectation(None if low is None or high is None else (float(low), float(high)), entry.get("pieces"), entry.get("paired", False))
