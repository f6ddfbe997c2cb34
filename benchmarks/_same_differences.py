"""Where two records of `same_results` differ, and which changes were stated beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks._same_digests import volatile

Flat = dict[tuple[str, str], dict[str, Any]]  # (step, file or command) -> name -> value
_ABSENT = "<absent>"
_KEYS = {"why", "step", "file", "entry", "to", "drop"}


@dataclass
class Rule:
    r"""One stated change; patterns are regular expressions that must match the whole name.

    Attributes:
        why: the reason, printed with every comparison.
        step, file, entry: what it is about, by the names of the first record (with `drop` of either).
        to: name of the entry in the second record, or of the file where no entry is given; may hold `\1`.
        drop: leave the entries out of the comparison.
        used: how many entries or files it was applied to.
    """

    why: str
    step: str = ".*"
    file: str = ".*"
    entry: str | None = None
    to: str | None = None
    drop: bool = False
    used: int = field(default=0, init=False)

    def says(self) -> str:
        """The rule in one line."""
        about = f"{self.step} / {self.file}" + ("" if self.entry is None else f" # {self.entry}")
        what = "left out" if self.drop else f"is called {self.to}"
        return f"{about} {what} ({self.why}): {self.used} times"


def read_rules(path: Path | None) -> list[Rule]:
    """Stated changes from a YAML list of mappings; each needs `why`, and either `drop: true` or `to`."""
    if path is None:
        return []
    rules = []
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or (), 1):
        strange = set(entry) - _KEYS
        if strange or not str(entry.get("why", "")).strip() or bool(entry.get("drop")) == bool(entry.get("to")):
            raise SystemExit(
                f"{path}, rule {number}: needs `why` and one of `to` and `drop`; may have step, file, entry; has {sorted(entry)}"
            )
        rules.append(Rule(**entry))
    return rules


def flat_record(steps: Mapping[str, Any]) -> Flat:
    """Commands and files of a record, side by side; what became volatile after it was recorded is left out."""
    found: Flat = {}
    for step, record in steps.items():
        for label, command in record["commands"].items():
            found[step, f"$ {label}"] = {"exit status": command["status"], **_steady(command["stdout"])}
        for name, values in record["files"].items():
            found[step, name] = _steady(values)
    return found


def _steady(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not any(volatile(part) for part in name.split("."))}


def applied(flat: Flat, rules: Sequence[Rule], *, first: bool) -> Flat:
    """A record under the names of the second one."""
    found: Flat = {}
    for (step, file), values in flat.items():
        about = [rule for rule in rules if re.fullmatch(rule.step, step) and re.fullmatch(rule.file, file)]
        new_file = file
        kept = dict(values)
        dropped = False
        for rule in about:
            if rule.entry is None:
                dropped = dropped or rule.drop
                if first and rule.to is not None:
                    new_file = re.sub(rule.file, rule.to, file, count=1)
                rule.used += first or rule.drop
            elif rule.drop or first:
                kept = _renamed(kept, rule)
        if not dropped:
            found[step, new_file] = kept
    return found


def _renamed(values: dict[str, Any], rule: Rule) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        match = re.fullmatch(rule.entry or "", name)
        if match is None:
            found[name] = value
            continue
        rule.used += 1
        if rule.to is not None:
            found[match.expand(rule.to)] = value
    return found


@dataclass(frozen=True)
class Difference:
    """One file or command that is not the same: what differs, name by name."""

    step: str
    file: str
    lines: tuple[str, ...]


def differences(a: Flat, b: Flat) -> Iterator[Difference]:
    """Every file and command of either record that differs."""
    for step, file in sorted(a.keys() | b.keys()):
        if (step, file) not in b or (step, file) not in a:
            yield Difference(step, file, (f"only in the {'first' if (step, file) in a else 'second'} record",))
            continue
        lines = tuple(_lines(a[step, file], b[step, file]))
        if lines:
            yield Difference(step, file, lines)


def _lines(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    gone, new = {n: a[n] for n in a if n not in b}, {n: b[n] for n in b if n not in a}
    if gone and sorted(map(repr, gone.values())) == sorted(map(repr, new.values())):
        yield f"{len(gone)} entries have the same values under other names: {_first(gone)} -> {_first(new)}"
        gone, new = {}, {}
    for name in [*a, *new]:
        if name in gone or name in new or (name in a and name in b and not _equal(a[name], b[name])):
            yield f"{name}: {a.get(name, _ABSENT)!r} -> {b.get(name, _ABSENT)!r}"


def _equal(x: Any, y: Any) -> bool:
    return type(x) is type(y) and (x == y or (x != x and y != y))  # noqa: PLR0124 - not a number is itself here


def _first(names: Mapping[str, Any], most: int = 3) -> str:
    return ", ".join(list(names)[:most]) + (" ..." if len(names) > most else "")
