"""The quality verdict of a case: what the checks of its structures and of its image say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medlore.segmenting.checks import CHECKS
from medlore.segmenting.expectations import CheckLevel
from medlore.segmenting.scene import Structure


@dataclass(frozen=True)
class Flag:
    """One thing that is implausible.

    Args:
        label: of which structure.
        check: the name of the check; see `CHECKS`.
        says: in a few words.
    """

    label: str
    check: str
    says: str


@dataclass(frozen=True)
class Verdict:
    """What was looked at and what is implausible.

    Args:
        level: `quick` or `thorough`.
        flags: in the order of the labels.
        image: what is odd about the image as a whole: another part of the body, another modality.
        measured: label -> what was measured.
        not_judged: check -> reason -> labels that could not be judged.
    """

    level: CheckLevel
    flags: tuple[Flag, ...] = ()
    image: tuple[str, ...] = ()
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    not_judged: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    @property
    def flagged(self) -> bool:
        """Whether anything is implausible."""
        return bool(self.flags or self.image)

    def lines(self) -> list[str]:
        """One line for what is odd about the image, and one for each structure with flags; empty where all is plausible."""
        by_label: dict[str, list[str]] = {}
        for flag in self.flags:
            by_label.setdefault(flag.label, []).append(flag.says)
        return [*(f"check: {line}" for line in self.image), *(f"check: {label} {'; '.join(says)}" for label, says in by_label.items())]

    def record(self) -> dict[str, Any]:
        """Plain JSON, for `case.json`."""
        return {
            "level": self.level,
            "flagged": self.flagged,
            "says": self.lines(),
            "flags": [{"label": flag.label, "check": flag.check, "says": flag.says} for flag in self.flags],
            "image": list(self.image),
            "measured": {label: dict(values) for label, values in self.measured.items()},
            "not_judged": {check: {why: list(labels) for why, labels in told.items()} for check, told in self.not_judged.items()},
        }


def judge(structures: Iterable[Structure], *, level: CheckLevel, image: Sequence[str] = ()) -> Verdict:
    """Look at every structure with every check.

    Args:
        structures: in the order of the labels; gone through once, so that one mask is unpacked at a time.
        level: what the evidence was gathered for.
        image: what is odd about the image as a whole.
    """
    flags: list[Flag] = []
    measured: dict[str, dict[str, Any]] = {}
    not_judged: dict[str, dict[str, list[str]]] = {}
    for structure in structures:
        for check in CHECKS:
            finding = check.look(structure)
            measured.setdefault(structure.label, {}).update(finding.measured)
            if finding.says is not None:
                flags.append(Flag(structure.label, check.name, finding.says))
            if finding.not_judged is not None:
                not_judged.setdefault(check.name, {}).setdefault(finding.not_judged, []).append(structure.label)
    return Verdict(level, tuple(flags), tuple(image), measured, not_judged)
