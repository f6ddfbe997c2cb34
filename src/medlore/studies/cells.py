"""The grid of a study as a list of cells: contenders with their controls, settings of each, and its fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medlore.errors import InputError, UnknownNameError
from medlore.studies.settings import FIXED, GRID_NAMES, DataEntry, MethodEntry, Shots, StudySettings
from medlore.tuning.idle_settings import without_idle
from medlore.tuning.settings import FinetuneSettings

_SHARED_RANKS = ("targets", "granularity", "scale", "budget")  # what decides how many parameters the stable ranks cost


@dataclass(frozen=True)
class Contender:
    """A method under one set of its settings.

    Attributes:
        name: in tables; no two are alike.
        method: key of `METHODS`.
        changes: its own settings.
        rate: learning rate that the factors multiply; unless the study names one, that of the method at the start that is set.
        control_of: the contender whose parameters it matches; None for one that the study names.
    """

    name: str
    method: str
    changes: Mapping[str, Any]
    rate: float
    control_of: str | None = None


@dataclass(frozen=True)
class StudyCell:
    """One contender on one draw of one data set; plain enough to be sent to another machine.

    Attributes:
        data: name of the set.
        shots: labelled images per class, or `all`.
        draw: number of the draw, from 1.
        method: name of the contender.
        seed: of head, factors and order, beside the draw.
        entry: where the images are.
        rules: how parts are made: `validation_shots`, `data_seed`.
        measure: name of the score, or `auto`.
        settings: given settings of the tuning run.
        rates: learning rates to try; one is taken without trying.
        fingerprint: the same for the same cell of the same study.
    """

    data: str
    shots: Shots
    draw: int
    method: str
    seed: int
    entry: Mapping[str, Any]
    rules: Mapping[str, Any]
    measure: str
    settings: Mapping[str, Any]
    rates: tuple[float, ...]
    fingerprint: str

    @property
    def key(self) -> dict[str, Any]:
        """What names it."""
        return {name: getattr(self, name) for name in GRID_NAMES}

    def __str__(self) -> str:
        return f"{self.data}, {self.shots} shots, draw {self.draw}, seed {self.seed}, {self.method}"


def contenders_of(study: StudySettings) -> list[Contender]:
    """All contenders; beside each `sr-lora` one rank with as many parameters, unless the study names that itself."""
    found = [each for entry in study.methods for each in _expanded(entry, study.settings)]
    if not study.equal_controls:
        return found
    for each in list(found):
        control = _control_of(each, study.settings)
        if control is not None and not any(_same_lora(control, other, study.settings) for other in found):
            found.insert(found.index(each) + 1, control)
    return found


def _expanded(entry: MethodEntry, shared: FinetuneSettings) -> list[Contender]:
    given = entry.settings.stated()
    rate = entry.rate or merged_settings(shared, Contender("", entry.method, given, 0.0)).rates()[0]
    base = entry.name or entry.method
    made = []
    for values in itertools.product(*entry.grid.values()):
        tried = dict(zip(entry.grid, values, strict=True))
        words = " ".join(f"{name}={value}" for name, value in tried.items())
        made.append(Contender(f"{base} {words}".strip(), entry.method, given | tried, rate))
    return made


def _control_of(each: Contender, shared: FinetuneSettings) -> Contender | None:
    settings = merged_settings(shared, each)
    if each.method != "sr-lora" or settings.allocation.plan is not None or settings.allocation.ranks is not None:
        return None
    changes = {name: each.changes[name] for name in _SHARED_RANKS if name in each.changes} | {"rank": "equal"}
    own = {name: value for name, value in changes.items() if name != "rank"}
    words = " ".join(f"{name}={value}" for name, value in own.items())
    control = Contender(f"lora equal {words}".strip(), "lora", changes, 0.0, each.name)
    return replace(control, rate=merged_settings(shared, control).rates()[0])


def _same_lora(control: Contender, other: Contender, shared: FinetuneSettings) -> bool:
    if other.method != "lora":
        return False
    names = (*_SHARED_RANKS, "rank", "partial_update")
    mine, theirs = merged_settings(shared, control), merged_settings(shared, other)
    return all(mine.flat()[name] == theirs.flat()[name] for name in names)


def merged_settings(*layers: FinetuneSettings | Contender) -> FinetuneSettings:
    """Settings laid over each other, from left to right; only what was given counts."""
    values: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, Contender):
            values |= {**layer.changes, "method": layer.method}
        else:
            values |= layer.stated()
    return FinetuneSettings.model_validate(values)


def cells_of(study: StudySettings, *, trials: int | None = None) -> list[StudyCell]:
    """All cells, draw by draw, so that a study that is stopped early has whole draws of everything.

    Args:
        study: the grid.
        trials: at most so many hyper-parameter settings for each method; None tries all that the study names.
    """
    contenders = contenders_of(study)
    grid = itertools.product(range(1, study.draws + 1), study.seeds, study.shots, study.data, contenders)
    return [_cell(study, entry, shots, draw, seed, each, trials) for draw, seed, shots, entry, each in grid]


def _cell(
    study: StudySettings, entry: DataEntry, shots: Shots, draw: int, seed: int, contender: Contender, trials: int | None
) -> StudyCell:
    layers: list[FinetuneSettings | Contender] = [
        study.settings,
        *([study.shots_settings[shots]] if shots in study.shots_settings else []),
        contender,
    ]
    merged = merged_settings(*layers)
    # one seed for all contenders of a draw: they share the start of the head and the order of the images
    changes = {"flip": entry.flip, "seed": 1000 * seed + draw, **FIXED}
    settings = without_idle(merged.changed(**changes))
    given = settings.flat(stated=True, json=True)
    rates = tuple(contender.rate * factor for factor in study.tuning.rate_factors[:trials])
    facts: dict[str, Any] = {
        "entry": entry.model_dump(mode="json", exclude={"group"}),
        "rules": {"validation_shots": study.validation_shots, "data_seed": study.data_seed},
        "measure": study.measure,
        "settings": given,
        "rates": rates,
    }
    names: dict[str, Any] = {"data": entry.name, "shots": shots, "draw": draw, "method": contender.name, "seed": seed}
    return StudyCell(**names, **facts, fingerprint=_fingerprint(names | facts))


def _fingerprint(facts: Mapping[str, Any]) -> str:
    given = facts["settings"]
    decisive = {name: value for name, value in given.items() if name in FIXED or FinetuneSettings.facts(name).decides_for(())}
    return hashlib.sha256(json.dumps(dict(facts) | {"settings": decisive}, sort_keys=True).encode()).hexdigest()[:16]


def chosen_cells(cells: Sequence[StudyCell], only: Sequence[str]) -> list[StudyCell]:
    """The cells that all of `only` name: texts like `method=sr-lora` or `shots=1,5`.

    Raises:
        UnknownNameError: a name or value that no cell has.
        InputError: a text without `=`.
    """
    left = list(cells)
    for text in only:
        name, sign, values = text.partition("=")
        if not sign:
            raise InputError("--only", f"got {text!r}", "NAME=VALUE, e.g. method=sr-lora or shots=1,5", f"NAME is one of {GRID_NAMES}")
        if name not in GRID_NAMES:
            raise UnknownNameError("--only", name, GRID_NAMES)
        known = {str(getattr(cell, name)) for cell in cells}
        wanted = {value.strip() for value in values.split(",")}
        for value in sorted(wanted - known):
            raise UnknownNameError(f"--only {name}", value, sorted(known))
        left = [cell for cell in left if str(getattr(cell, name)) in wanted]
    return left
