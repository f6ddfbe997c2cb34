"""Every exception that MedLoRE raises.

::

    MedloreError
    ├── InputError              wrong use or wrong input           exit status 2
    │   ├── UnknownNameError    a name outside a list; the three nearest are given
    │   ├── CheckpointError     a weights file that does not fit, or is not one
    │   ├── TargetError         no weight, or no module, answers to a target or a plan
    │   ├── DataError           an image, list, table, case or volume that cannot be used
    │   └── MissingExtraError   an optional package that is not installed
    └── StepError               the input was right, a step failed  exit status 1

Every message has four parts in this order: **where** (file, line, argument), **what came**, **what is accepted**,
**what to do**. The constructor demands all four, so no message can leave one out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MedloreError(Exception):
    """An error with a place, a value, a rule and a way out.

    Args:
        where: file, line, layer or argument in which the fault lies.
        came: what was found there.
        accepted: what would have been right.
        fix: what the reader can do now.
        faults: every single fault, when one input has several; printed one a line, the first twenty in full.

    Examples:
        >>> str(InputError("--shots", "got 0", "a whole number from 1", "give --shots 5"))
        '--shots: got 0. Accepted: a whole number from 1. To do: give --shots 5.'
    """

    exit_status = 1
    shown_faults = 20

    def __init__(self, where: str, came: str, accepted: str, fix: str, *, faults: Sequence[str] = ()) -> None:
        self.where, self.came, self.accepted, self.fix = where, came, accepted, fix
        self.faults = tuple(faults)
        super().__init__(self._message())

    def _message(self) -> str:
        text = f"{self.where}: {self.came}. Accepted: {self.accepted}. To do: {self.fix}."
        shown = [f"  - {fault}" for fault in self.faults[: self.shown_faults]]
        hidden = len(self.faults) - len(shown)
        if hidden > 0:
            shown.append(f"  - and {hidden} more")
        return "\n".join([text, *shown])

    def at(self, where: str) -> MedloreError:
        """The same error seen from one door further out: `where` is put in front of the place."""
        self.where = f"{where}: {self.where}"
        self.args = (self._message(),)
        return self


class InputError(MedloreError):
    """Wrong use or wrong input; nothing was written."""

    exit_status = 2


class UnknownNameError(InputError):
    """A name that is not in a list of known ones.

    Args:
        where: the argument or file that held the name.
        name: the name that came.
        known: all names that would have been right.
        fix: what to do beside taking one of the nearest names; a default is given.

    Examples:
        >>> print(UnknownNameError("--targets", "atention", ["attention", "conv", "all-linear"]).accepted)
        3 names; the nearest are 'attention', 'conv', 'all-linear'
    """

    def __init__(self, where: str, name: str, known: Iterable[str], fix: str = "use one of them") -> None:
        names = list(known)
        near = ", ".join(repr(n) for n in nearest_names(name, names))
        accepted = f"{len(names)} names; the nearest are {near}" if names else "nothing: the list is empty"
        super().__init__(where, f"unknown name {name!r}", accepted, fix)
        self.name = name


class CheckpointError(InputError):
    """A weights file that is broken, unsafe, or belongs to another model."""


class TargetError(InputError):
    """No weight or module answers to a target, or a plan does not fit the model."""


class DataError(InputError):
    """An image, list, table, case or volume that cannot be used as it is."""


class MissingExtraError(InputError):
    """An optional package is needed and not installed.

    Examples:
        >>> print(MissingExtraError("reading DICOM", "pydicom", "dicom").fix)
        pip install 'medlore[dicom]'
    """

    def __init__(self, where: str, package: str, extra: str) -> None:
        super().__init__(
            where,
            f"the package {package!r} is not installed",
            f"an installation with the extra {extra!r}",
            f"pip install 'medlore[{extra}]'",
        )


class StepError(MedloreError):
    """The input was right, but a step could not be finished (disk full, loss not finite, case failed)."""


def reason_of(error: BaseException) -> str:
    r"""What a library said, in one line that fits a message of ours.

    Examples:
        >>> reason_of(ValueError("no header\nat all"))
        'ValueError: no header'
    """
    return f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0][:300]


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` known names that look most like `name`, best first.

    Examples:
        >>> nearest_names("livr", ["liver", "spleen", "left kidney"], 1)
        ['liver']
    """

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name.casefold(), candidate.casefold()).ratio()

    return sorted(known, key=likeness, reverse=True)[:count]
