"""Faults of the rules that a study of segmenters gives as plain mappings: `patches` and `synthesis`.

The rules themselves are plain dataclasses of the floor below; here their fields' types are held against what a file says.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError

from medlore.data.volumes.patches import PatchRules
from medlore.data.volumes.synthesis import SynthesisRules
from medlore.errors import nearest_names
from medlore.runs.yaml_places import Place

_SET_APART = ("synthesis", "intensity")  # a study says them elsewhere: under `synthesis` and `preprocessing`
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
Fault = tuple[Place, str, Any]


def checked_patches(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, if `PatchRules` takes them.

    Raises:
        pydantic.ValidationError: all faults, each with its place.
    """
    return _refused(values, _faults(PatchRules, values, apart=_SET_APART))


def checked_synthesis(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, if `SynthesisRules` takes them.

    Raises:
        pydantic.ValidationError: all faults, each with its place.
    """
    return _refused(values, _faults(SynthesisRules, values))


def _refused(values: dict[str, Any], faults: Iterator[Fault]) -> dict[str, Any]:
    details = [
        InitErrorDetails(type=PydanticCustomError("rules", "{text}", {"text": text}), loc=place, input=came) for place, text, came in faults
    ]
    if details:
        raise pydantic.ValidationError.from_exception_data("rules", details)
    return values


def _faults(kind: Any, values: Mapping[str, Any], place: Place = (), *, apart: tuple[str, ...] = ()) -> Iterator[Fault]:
    known = {field.name for field in fields(kind)} - set(apart)
    types = typing.get_type_hints(kind)
    for name, value in values.items():
        here: Place = (*place, name)
        if name not in known:
            yield here, f"unknown setting; the nearest are {', '.join(nearest_names(str(name), sorted(known)))}", value
        elif is_dataclass(types[name]) and isinstance(value, Mapping):
            yield from _faults(types[name], value, here)
        elif is_dataclass(types[name]):
            yield here, "settings by name are wanted", value
        else:
            yield from _faults_of_value(types[name], value, here)


def _faults_of_value(wanted: Any, value: Any, place: Place) -> Iterator[Fault]:
    try:
        made = pydantic.TypeAdapter(wanted, config=_STRICT).validate_python(tuple(value) if isinstance(value, list) else value)
    except pydantic.ValidationError as error:
        yield from (((*place, *fault["loc"]), fault["msg"], fault["input"]) for fault in error.errors())
        return
    numbers = list(made.values()) if isinstance(made, Mapping) else list(made) if isinstance(made, tuple) else [made]
    if any(number < 0 for number in numbers):
        yield place, "no number of these rules is below 0", value
    elif isinstance(made, tuple) and numbers != sorted(numbers):
        yield place, "the smallest comes first, then the largest", value
