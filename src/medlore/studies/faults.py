"""What is wrong with a study before anything runs: names, settings without effect, data, cells that cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pydantic

from medlore.errors import InputError, MedloreError, nearest_names
from medlore.runs.settings import Place, lines_in, read_settings
from medlore.studies.cells import contenders_of
from medlore.studies.parts import parts_of
from medlore.studies.settings import DECIDED, StudySettings
from medlore.tuning.idle_settings import idle_settings
from medlore.tuning.settings import FinetuneSettings

_SINGLE_ONLY = ("balanced_accuracy",)
Fault = tuple[Place, str]


def read_study(file: str | Path) -> StudySettings:
    """A study that can be run.

    Raises:
        InputError: all faults of the file, each with its line: first those of its words, then those of what it asks for.
    """
    study = read_settings(StudySettings, file)
    lines = lines_in(file)
    named = list(_of_names(study))
    # contenders that cannot be built would only say the same faults again
    faults = named + list(_of_settings(study)) or [*_of_rules(study), *_of_data(study, Path(file).parent)]
    if faults:
        told = [_with_line(place, text, lines) for place, text in faults]
        count = f"{len(told)} fault" + ("s" if len(told) > 1 else "")
        raise InputError(str(file), count, "a study whose cells can all be run", "correct what is listed", faults=told)
    return study


def _with_line(place: Place, text: str, lines: Mapping[Place, int]) -> str:
    line = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    return text if line is None else f"line {line}, {text}"


def _of_names(study: StudySettings) -> Iterator[Fault]:
    """Two things of one name, and settings that belong elsewhere."""
    for name, count in Counter(entry.name for entry in study.data).items():
        if count > 1:
            last = max(i for i, entry in enumerate(study.data) if entry.name == name)
            yield ("data", last, "name"), f"data.{last}.name: {name!r} is the name of {count} data sets"
    for word, values in (("shots", study.shots), ("seeds", study.seeds)):
        if len(set(values)) < len(values):
            yield (word,), f"{word}: {list(values)} names one of them twice"
    for shots in study.shots_settings:
        if shots not in study.shots:
            yield ("shots_settings", str(shots)), f"shots_settings.{shots}: no such number in shots {list(study.shots)}"
    for place, keys in _given(study):
        yield from _misplaced(place, keys)


def _misplaced(place: Place, keys: set[str]) -> Iterator[Fault]:
    for key in sorted(keys):
        where = ".".join(str(part) for part in (*place, key))
        if key in DECIDED:
            yield (*place, key), f"{where}: the study decides it (data, shots, draws, seeds, methods and `rate` of a method)"
        elif key not in FinetuneSettings.model_fields:
            near = ", ".join(nearest_names(key, FinetuneSettings.model_fields))
            yield (*place, key), f"{where}: unknown setting; the nearest are {near}"


def _given(study: StudySettings) -> Iterator[tuple[Place, set[str]]]:
    yield ("settings",), set(study.settings.model_fields_set)
    for shots, settings in study.shots_settings.items():
        yield ("shots_settings", str(shots)), set(settings.model_fields_set)
    for i, entry in enumerate(study.methods):
        yield ("methods", i, "settings"), set(entry.settings.model_fields_set)
        yield ("methods", i, "grid"), set(entry.grid)


def _of_settings(study: StudySettings) -> Iterator[Fault]:
    """Each contender's own settings: values that are refused, and those that its method has no use for."""
    for i, entry in enumerate(study.methods):
        place: Place = ("methods", i)
        grids = [(key, value) for key, values in entry.grid.items() for value in values if key in FinetuneSettings.model_fields]
        given = {key: getattr(entry.settings, key) for key in entry.settings.model_fields_set if key not in DECIDED}
        for key, value in [*grids, *given.items()]:
            where = (*place, "grid" if (key, value) in grids else "settings", key)
            text = ".".join(str(part) for part in where)
            try:
                settings = FinetuneSettings.model_validate({**given, "method": entry.method, key: value})
            except pydantic.ValidationError as error:
                yield where, f"{text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}, got {value!r}"
                continue
            if reason := idle_settings(settings).get(key):
                yield where, f"{text}: can have no effect: {reason}"


def _of_rules(study: StudySettings) -> Iterator[Fault]:
    contenders = contenders_of(study)
    for name, count in Counter(each.name for each in contenders).items():
        if count > 1:
            yield ("methods", _entry_of(study, name)), f"methods: {count} contenders are called {name!r}; give `name`"
    names = [each.name for each in contenders]
    if study.reference is not None and study.reference not in names:
        near = ", ".join(nearest_names(study.reference, names))
        yield ("reference",), f"reference: no contender is called {study.reference!r}; the nearest are {near}"
    if len(study.tuning.rate_factors) > 1 and study.validation_shots == "none":
        yield ("tuning",), "tuning: several settings to try, but validation_shots is `none`: nothing may choose among them"


def _entry_of(study: StudySettings, name: str) -> int:
    return max((i for i, entry in enumerate(study.methods) if (entry.name or entry.method) == name), default=0)


def _of_data(study: StudySettings, folder: Path) -> Iterator[Fault]:
    """Reads every set and makes every draw; images themselves are not opened."""
    rules: dict[str, object] = {"validation_shots": study.validation_shots, "data_seed": study.data_seed}
    for i, entry in enumerate(study.data):
        seen: set[str] = set()
        plain = entry.model_dump(mode="json", exclude={"group"})
        for shots in study.shots:
            for draw in range(1, study.draws + 1):
                place, text = _draw_fault(study, plain, rules, folder, shots=shots, draw=draw)
                if text and text not in seen:
                    seen.add(text)
                    words = f"data.{i} ({entry.name}), {shots} shots: {text}" if place == ("data",) else f"{place[0]}: {text}"
                    yield (("data", i) if place == ("data",) else place), words
                if shots == "all":
                    break


def _draw_fault(
    study: StudySettings, entry: dict[str, object], rules: dict[str, object], folder: Path, **draw: object
) -> tuple[Place, str]:
    try:
        parts = parts_of(entry, rules, folder, **draw)  # type: ignore[arg-type]
    except MedloreError as error:
        return ("data",), "; ".join([f"{error.where}: {error.came}", *error.faults])
    if study.measure in _SINGLE_ONLY and parts.train.task == "multi":
        return ("measure",), f"{study.measure} is for one label an image; {entry['name']} has several"
    if parts.test is None or not len(parts.test):
        return ("data",), "no test images"
    if len(study.tuning.rate_factors) > 1 and parts.validation is None:
        return ("data",), "no validation images are left to choose among the settings of tuning"
    return ("data",), ""
