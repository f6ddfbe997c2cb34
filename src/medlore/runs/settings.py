"""What a run is asked to do: one field says name, type, default, help, group, and whether it decides a result.

Everything else that a setting needs is derived from its field: the flag and its help, the place in a YAML file, the fingerprint of
a run, the refusal of settings that cannot act, the tables of the documents.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import pydantic
from pydantic_core import PydanticCustomError

from medlore.assets import PREFIX
from medlore.errors import InputError, nearest_names

UNKNOWN_NAME = "unknown_name"  # type of a fault whose sentence is whole by itself


@dataclass(frozen=True)
class Idle:
    """Runs in which a setting acts on nothing.

    Attributes:
        when: whether the run of these settings is one.
        reason: why, for the message; `{method}` and other names of settings are filled in.
    """

    when: Callable[[Any], bool]
    reason: str


@dataclass(frozen=True)
class FieldFacts:
    """What a field says beside its name, type and default.

    Attributes:
        help: one sentence for the command line and the documents.
        group: panel of the help; the title of the subject unless given.
        flags: on the command line; made from the name where there are none. Empty for none: a YAML file says it.
        argument: stands without a flag, under this name.
        repeated: each time the flag is given adds one entry; other lists are separated by commas.
        words: what can stand there, for completion in a shell, from the other settings on the line; made from a type that names its values.
        path: a text that may be a path: where there is such a file beside the YAML file, that is meant.
        decides: whether another value gives other results. A tuple names the parts of a study whose results it decides.
        idle: runs in which it acts on nothing, looked at in this order.
        neutral: a value that asks for nothing and so may stand anywhere.
    """

    help: str
    group: str | None = None
    flags: tuple[str, ...] | None = None
    argument: str | None = None
    repeated: bool = False
    words: Callable[[Mapping[str, Any]], Iterable[str]] | None = None
    path: bool = False
    decides: bool | tuple[str, ...] = True
    idle: tuple[Idle, ...] = ()
    neutral: Any = None

    def decides_for(self, parts: tuple[str, ...]) -> bool:
        """Whether it decides the results of one of these parts."""
        return self.decides if isinstance(self.decides, bool) else bool(set(self.decides) & set(parts))


_FACTS = frozenset(field.name for field in dataclasses.fields(FieldFacts))


def setting(default: Any = ..., help: str = "", **said: Any) -> Any:  # noqa: A002 - the word of every command line
    """A field of settings: its default (`...` for none), what `FieldFacts` holds, and the limits of `pydantic.Field`.

    Example:
        >>> class Example(Settings):
        ...     shots: int = setting(5, "Labelled images per class.", group="Images", ge=1)
        >>> Example.facts("shots").help, Example().shots
        ('Labelled images per class.', 5)
    """
    facts = FieldFacts(help, **{name: value for name, value in said.items() if name in _FACTS})
    field = pydantic.Field(default, description=help, **{name: value for name, value in said.items() if name not in _FACTS})
    field.metadata.append(facts)
    return field


class Settings(pydantic.BaseModel):
    """Base of all settings: unknown keys are refused, values are frozen, a changed copy is validated.

    Settings of one subject (`Subject`) are nested in settings of a whole run. Their names are unique there, so that files and
    keywords may write them nested or flat: `training: {epochs: 5}` or `epochs: 5`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # own code reads nested, which type checkers then see to

        def __getattr__(self, name: str) -> Any:
            """A setting by its flat name; medlore itself reads `settings.SUBJECT.NAME`."""
            home = type(self).homes().get(name)
            return super().__getattr__(name) if home is None else getattr(getattr(self, home), name)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which a flat name could mean two settings."""
        super().__pydantic_init_subclass__(**kwargs)
        names = [*cls.model_fields, *(name for kind in cls.subjects().values() for name in kind.model_fields)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TypeError(f"{cls.__name__} has two settings for each of {sorted(twice)}")

    @classmethod
    def subjects(cls) -> dict[str, type[Subject]]:
        """Name of a nested subject -> its class."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Subject)}

    @classmethod
    @functools.cache
    def homes(cls) -> dict[str, str]:
        """Flat name -> the subject in which it stands."""
        return {name: subject for subject, kind in cls.subjects().items() for name in kind.model_fields}

    @classmethod
    @functools.cache
    def fields(cls) -> dict[str, pydantic.fields.FieldInfo]:
        """All settings by their flat names, in the order of the class."""
        found: dict[str, pydantic.fields.FieldInfo] = {}
        subjects = cls.subjects()
        for name, field in cls.model_fields.items():
            found |= subjects[name].model_fields if name in subjects else {name: field}
        return found

    @classmethod
    def facts(cls, name: str) -> FieldFacts:
        """What the field of a flat name says."""
        field = cls.fields()[name]
        return next((part for part in field.metadata if isinstance(part, FieldFacts)), FieldFacts(field.description or ""))

    @classmethod
    def group_of(cls, name: str) -> str:
        """The panel of the help in which a setting stands."""
        subject = cls.homes().get(name)
        return cls.facts(name).group or (cls.subjects()[subject].title if subject else "")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _into_subjects(cls, values: Any) -> Any:
        """Flat names go where they belong."""
        homes = cls.homes()
        if not homes or not isinstance(values, Mapping):
            return values
        found = {name: value for name, value in values.items() if name not in homes}
        for name, value in values.items():
            if (home := homes.get(name)) is None:
                continue
            there = found.get(home)
            inner = there.stated() if isinstance(there, Subject) else dict(there) if isinstance(there, Mapping) else {}
            if name in inner and isinstance(there, Mapping):
                raise ValueError(f"{name} is given twice, flat and in {home}")
            found[home] = {**inner, name: value}
        return found

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """`steps: yes` would become 1: Python counts with its truth values."""
        if isinstance(value, bool) and info.field_name is not None and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError("true and false are no numbers or names here")
        return value

    def stated(self) -> dict[str, Any]:
        """Flat name -> value of every setting that was named when these were made."""
        found: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Subject):
                found |= value.stated()
            elif name in self.model_fields_set:
                found[name] = value
        return found

    def flat(self, *, stated: bool = False, json: bool = False) -> dict[str, Any]:
        """Flat name -> value.

        Args:
            stated: only what was named.
            json: values as JSON writes them.
        """
        wanted = self.stated() if stated else type(self).fields()
        if not json:
            return {name: getattr(self, name) for name in wanted}
        dumped = self.model_dump(mode="json")
        homes = type(self).homes()
        return {name: dumped[homes[name]][name] if name in homes else dumped[name] for name in wanted}

    def changed(self, **values: Any) -> Self:
        """These settings with other values for some, validated like any others; flat names or whole subjects.

        Raises:
            pydantic.ValidationError: a value that the field does not take, or values that do not go together.
        """
        homes = type(self).homes()
        kept = {name: value for name, value in self.stated().items() if homes.get(name) not in values}
        return type(self).model_validate({**kept, **values})

    def decisive(self, *parts: str) -> dict[str, Any]:
        """Flat name -> JSON value of the settings that decide results: two runs that agree in them give the same.

        Args:
            parts: of a study, for settings that decide the results of some parts alone.
        """
        values = self.flat(json=True)
        found = {}
        for name in type(self).fields():
            inner = getattr(self, name)
            if type(self).facts(name).decides_for(parts):
                found[name] = inner.decisive(*parts) if isinstance(inner, Settings) else values[name]
        return found


class Subject(Settings):
    """Settings of one subject, nested in those of a run; `title` heads them in the help."""

    title: ClassVar[str] = ""


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or isinstance(annotation, bool) or any(_takes_bool(part) for part in get_args(annotation))


def flag_of(kind: type[Settings], name: str) -> str:
    """How a setting is called on the command line; its name where it has no flag.

    Example:
        >>> class Example(Settings):
        ...     learning_rate: float = setting(0.1, "Peak rate.")
        >>> flag_of(Example, "learning_rate")
        '--learning-rate'
    """
    return next(iter(flags_of(kind, name)), name)


def flags_of(kind: type[Settings], name: str) -> tuple[str, ...]:
    """All flags of a setting, the first being its name."""
    facts = kind.facts(name)
    if facts.argument is not None:
        return ()
    return (f"--{name.replace('_', '-')}",) if facts.flags is None else facts.flags


def known_name(value: Any, known: Mapping[str, Any], text: str = "unknown name {value!r}; the nearest of {count} are {near}") -> Any:
    """The name of a table's entry, found without regard to case; a validator for fields that name one.

    Raises:
        PydanticCustomError: no such entry; the nearest three are named.
    """
    if not isinstance(value, str):
        return value
    found = next((name for name in known if name.casefold() == value.casefold()), None)
    if found is None:
        near = ", ".join(nearest_names(value, known))
        raise PydanticCustomError(UNKNOWN_NAME, "{text}", {"text": text.format(value=value, count=len(known), near=near)})
    return found


def beside(folder: str | Path, value: str | Path) -> Path:
    """A path that a file names: it starts from the folder of that file.

    Example:
        >>> beside("/study", "../data").as_posix(), beside("/study", "/data").as_posix()
        ('/study/../data', '/data')
    """
    return Path(folder) / value


def found_beside(folder: str | Path, text: str, *, where: str) -> str:
    """A text of a file that may be a path: the path from the folder of that file if it is there, else the text (a name of a hub).

    Args:
        folder: of the file.
        text: `medlore:NAME`, a path, or a name.
        where: the setting, for the message.

    Raises:
        InputError: it leads somewhere from the current folder alone, which is not meant.
    """
    place = beside(folder, text)
    if text.startswith(PREFIX) or not text.strip():
        return text
    if place.exists():
        return str(place)
    if Path(text).exists():
        came = f"{text!r}, which is there from the current folder, not from {folder}"
        fix = f"write {os.path.relpath(text, folder)}"
        raise InputError(where, came, "a path from the folder of the file that names it", fix)
    return text
