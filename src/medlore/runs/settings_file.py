"""Settings from a YAML file and from flags: every fault at once, each with its line, under the name that the user wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic

from medlore.errors import InputError, nearest_names
from medlore.runs.settings import UNKNOWN_NAME, Settings, beside, found_beside
from medlore.runs.yaml_places import Place, line_of, read_mapping

S = TypeVar("S", bound=Settings)
_FEW_NAMES = 8  # so many are listed whole


def read_settings(kind: type[S], file: str | Path | None = None, **flags: Any) -> S:
    """Settings from a YAML file (optional) with the flags that are not None laid over it.

    Raises:
        InputError: unknown or repeated keys or wrong values; all of them at once, each with its line.
    """
    values, lines, repeated = ({}, {}, []) if file is None else read_mapping(file)
    if file is not None:
        values = with_paths_beside(kind, values, Path(file).resolve().parent)
    given = {name: value for name, value in flags.items() if value is not None}
    where = str(file) if file is not None else "settings"
    return check_settings(kind, laid_over(kind, values, given), where=where, lines=lines_left(kind, lines, given), faults=repeated)


def lines_left(kind: type[Settings], lines: Mapping[Place, int], flags: Mapping[str, Any]) -> dict[Place, int]:
    """Lines of the entries of a file that no flag has taken the place of."""
    nested = {(home, name) for name, home in kind.homes().items()}
    return {at: line for at, line in lines.items() if at[0] not in flags and not (at[:2] in nested and at[1] in flags)}


def laid_over(kind: type[Settings], values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, nested or flat, with flat ones in their place."""
    homes = kind.homes()
    found = dict(values)
    for name in flags:
        subject = found.get(homes.get(name, ""))
        if isinstance(subject, Mapping) and name in subject:
            found[homes[name]] = {key: value for key, value in subject.items() if key != name}
    return {**found, **flags}


def with_paths_beside(kind: type[Settings], values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a file whose paths start from its folder: those of every field that is a path, or may be one."""
    fields, found = kind.fields(), dict(values)
    for name, value in values.items():
        if isinstance(value, Mapping) and name in kind.subjects():
            found[name] = with_paths_beside(kind.subjects()[name], value, folder)
        elif name in fields and isinstance(value, str) and value.strip():
            if _is_path(fields[name].annotation):
                found[name] = str(beside(folder, value))
            elif kind.facts(name).path:
                found[name] = found_beside(folder, value, where=name)
    return found


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(_is_path(part) for part in get_args(annotation))


def check_settings(
    kind: type[S], values: Mapping[str, Any], *, where: str, lines: Mapping[Place, int] | None = None, faults: Sequence[str] = ()
) -> S:
    """Validate a mapping into settings.

    Args:
        kind: the settings.
        values: what came.
        where: the file, for the message.
        lines: where each entry stands in that file.
        faults: what is wrong with the file already.

    Raises:
        InputError: unknown keys or wrong values; all of them at once.
    """
    settings, found = validated(kind, values, lines or {})
    if settings is None or faults:
        raise fault_of([*faults, *found], where=where, accepted=f"the settings of {kind.__name__}")
    return settings


def fault_of(faults: Sequence[str], *, where: str, accepted: str) -> InputError:
    """All faults of one input as one error."""
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return InputError(where, count, accepted, "correct what is listed", faults=faults)


def validated(kind: type[S], values: Mapping[str, Any], lines: Mapping[Place, int]) -> tuple[S, list[str]] | tuple[None, list[str]]:
    """The settings, or None and a sentence for each fault."""
    try:
        return kind.model_validate(dict(values)), []
    except pydantic.ValidationError as error:
        return None, [_fault(kind, values, dict(item), lines) for item in error.errors()]


def _fault(kind: type[Settings], values: Mapping[str, Any], item: Mapping[str, Any], lines: Mapping[Place, int]) -> str:
    """One sentence on one entry of a file."""
    place, fault, came = item["loc"], item["type"], item.get("input")
    written = _as_written(kind, place, values)
    line = line_of(written, dict(lines))
    name = ("" if line is None else f"line {line}, ") + ".".join(str(part) for part in written)
    if fault == "extra_forbidden":
        inner = _settings_at(kind, place[:-1])
        return f"{name}: unknown setting; the nearest are {', '.join(nearest_names(str(place[-1]), [*inner.fields(), *inner.subjects()]))}"
    expected = _literals_of(kind, place) if fault == "literal_error" else ()
    if len(expected) > _FEW_NAMES and isinstance(came, str):
        return f"{name}: unknown name {came!r}; the nearest of {len(expected)} are {', '.join(nearest_names(came, expected))}"
    message = item["msg"].removeprefix("Value error, ")
    if not place:  # several settings that do not go together
        return str(message)
    return f"{name}: {message}" if fault in ("missing", UNKNOWN_NAME) else f"{name}: {message}, got {came!r}"


def _as_written(kind: type[Settings], place: Place, values: Any) -> Place:
    """The place of an entry without the subjects that the user left out."""
    written: list[str | int] = []
    here: type[Settings] | None = kind
    for i, part in enumerate(place):
        follows = place[i + 1] if i + 1 < len(place) else None
        subject = here.subjects().get(str(part)) if here is not None else None
        if subject is not None and isinstance(values, Mapping) and (part not in values or follows in values):
            here = subject
            continue
        written.append(part)
        here = None if here is None else _class_of(here, part)
        values = _entry(values, part)
    return tuple(written)


def _class_of(kind: type[Settings], part: str | int) -> type[Settings] | None:
    field = kind.model_fields.get(str(part))
    return kind if field is None else next(_classes_in(field.annotation), None)


def _entry(values: Any, part: str | int) -> Any:
    if isinstance(values, Mapping):
        return values.get(part)
    return values[part] if isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values) else None


def _literals_of(kind: type[Settings], place: Place) -> tuple[str, ...]:
    """The names that an entry may have, through tuples and optional values."""
    field = next((f for part in reversed(place) if (f := _settings_at(kind, place[:-1]).model_fields.get(str(part)))), None)

    def names(annotation: Any) -> Iterator[str]:
        for part in get_args(annotation):
            if isinstance(part, str):
                yield part
            else:
                yield from names(part)

    return () if field is None else tuple(names(field.annotation))


def _settings_at(kind: type[Settings], place: Place) -> type[Settings]:
    """The settings class that holds an entry: the names in it are those that can be meant."""
    for part in place:
        field = kind.model_fields.get(str(part))
        kind = kind if field is None else next(_classes_in(field.annotation), kind)
    return kind


def _classes_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)
