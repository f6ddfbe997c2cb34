"""The command line of a verb, made from its settings: one option per field, with its default and its group; all faults at once.

`--config FILE.yaml` stands beside the options of every verb and may say any of its settings; options lie over the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin

import pydantic
import typer
from typer.core import TyperCommand

from medlore.commands.screens.voice import set_loudness
from medlore.errors import nearest_names
from medlore.runs.settings import Settings, flags_of, setting
from medlore.runs.settings_file import fault_of, laid_over, lines_left, validated, with_paths_beside
from medlore.runs.yaml_places import Place, read_mapping

S1 = TypeVar("S1", bound=Settings)
S2 = TypeVar("S2", bound=Settings)
_STRANGE = "medlore.strange"  # where the words that are no flags wait in the context
_MANY_CHOICES = 6


class Output(Settings):
    """How a verb answers."""

    as_json: bool = setting(False, "Print one JSON object.", flags=("--json",), decides=False)
    quiet: bool = setting(False, "Print the answer and errors alone: no progress, no notes.", flags=("--quiet", "-q"), decides=False)
    verbose: bool = setting(False, "Print everything: whole tables, and tracebacks of faults.", flags=("--verbose", "-v"), decides=False)

    @pydantic.model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.quiet and self.verbose:
            raise ValueError("--quiet and --verbose ask for opposite things")
        return self


@dataclass(frozen=True)
class Given:
    """What one command line says, unread.

    Attributes:
        verb: the command.
        values: name of a setting -> text, texts or truth value, of the options that stand on the line.
        file: of `--config`.
        flags: name of a setting -> its flag.
        faults: words that are no flags.
    """

    verb: str
    values: Mapping[str, Any]
    file: Path | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def read(self, first: type[S1], second: type[S2], *, foreign: str = "cannot act here") -> tuple[S1, S2]:
        """Settings of two kinds from one line and one file.

        Args:
            first: of what is done.
            second: of how the command answers.
            foreign: what is said of a flag that neither has.

        Raises:
            InputError: wrong, unknown, missing and foreign settings, all at once.
        """
        loaded, lines, repeated = ({}, {}, []) if self.file is None else read_mapping(self.file)
        faults = [*self.faults, *repeated, *self._foreign((first, second), foreign), *_unknown((first, second), loaded, lines)]
        one, more = self._validated(first, loaded, lines)
        two, most = self._validated(second, loaded, lines)
        faults += [*more, *most]
        if faults or one is None or two is None:
            where = f"medlore {self.verb}" if self.file is None else str(self.file)
            raise fault_of(faults, where=where, accepted=f"what `medlore {self.verb} --help` lists")
        if isinstance(two, Output):
            set_loudness("quiet" if two.quiet else "verbose" if two.verbose else "usual")
        return one, two

    def names(self, setting_name: str) -> bool:
        """Whether a setting stands on the line or in the file."""
        return setting_name in self.values or (self.file is not None and setting_name in read_mapping(self.file)[0])

    def without(self, *names: str, **values: Any) -> Given:
        """The same line without some options, or with other values for some."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Given(self.verb, {**kept, **values}, self.file, self.flags, self.faults)

    def _foreign(self, kinds: Sequence[type[Settings]], text: str) -> Iterator[str]:
        known = {name for kind in kinds for name in (*kind.fields(), *kind.subjects())}
        for name in self.values:
            if name not in known:
                yield f"{self.flags.get(name, name)}: {text}"

    def _validated(self, kind: type[S1], loaded: Mapping[str, Any], lines: Mapping[Place, int]) -> tuple[S1 | None, list[str]]:
        known = {*kind.fields(), *kind.subjects()}
        values = {name: value for name, value in loaded.items() if name in known}
        if self.file is not None:
            values = with_paths_beside(kind, values, self.file.resolve().parent)
        own = {name: _parted(kind, name, value) for name, value in self.values.items() if name in known}
        return validated(kind, laid_over(kind, values, own), lines_left(kind, lines, own))


def _unknown(kinds: Sequence[type[Settings]], loaded: Mapping[str, Any], lines: Mapping[Place, int]) -> Iterator[str]:
    known = [name for kind in kinds for name in (*kind.fields(), *kind.subjects())]
    for name in map(str, loaded):
        if name not in known:
            line = f"line {lines[name,]}, " if (name,) in lines else ""
            yield f"{line}{name}: unknown setting; the nearest are {', '.join(nearest_names(name, known))}"


def _parted(kind: type[Settings], name: str, value: Any) -> Any:
    """A list of the command line is separated by commas; sizes may be written 96x96x32."""
    if name not in kind.fields() or not isinstance(value, str):
        return value
    annotation = _plain(kind.fields()[name].annotation)
    if get_origin(annotation) is not tuple:
        return value
    numbers = all(part in (int, float) for part in get_args(annotation))
    return [part.strip() for part in (value.replace("x", ",") if numbers else value).split(",") if part.strip()]


def _plain(annotation: Any) -> Any:
    """A type without its `| None`."""
    if get_origin(annotation) in (Union, UnionType):
        left = [part for part in get_args(annotation) if part is not type(None)]
        return left[0] if len(left) == 1 else annotation
    return annotation


def command(run: Callable[[Given], None], *kinds: type[Settings], config: tuple[str, ...] = ("--config",)) -> typer.Typer:
    """The Typer app of a verb.

    Args:
        run: does it; its docstring is the help, its name the verb.
        kinds: settings whose fields are the options; of a name that several have, the first one says help and default.
        config: flags of the YAML file.
    """
    verb = run.__name__
    first = {name: kind for kind in reversed(kinds) for name in kind.fields()}
    named = {name: flags_of(kind, name) for name, kind in first.items()}
    shown = [name for kind in kinds for name in kind.fields() if first[name] is kind and (named[name] or kind.facts(name).argument)]
    parameters = [_parameter(first[name], name) for name in shown]
    parameters.sort(key=lambda p: not isinstance(p.default, typer.models.ArgumentInfo))
    option = typer.Option(None, *config, metavar="FILE", help="YAML file with any of the settings; options override it.")
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=option, annotation=str | None))

    def called(ctx: typer.Context, **values: Any) -> None:
        stated = {name: value for name, value in values.items() if _is_stated(ctx, name, value)}
        file = stated.pop("config", None)
        flags = {name: words[0] for name, words in named.items() if words}
        run(Given(verb, stated, None if file is None else Path(file), flags, tuple(_strange(ctx))))

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    called.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    called.__annotations__ = {"ctx": typer.Context, **{p.name: p.annotation for p in parameters}}
    called.__name__, called.__doc__ = verb, run.__doc__
    app = typer.Typer()
    app.command(cls=VerbCommand, context_settings={"allow_extra_args": True})(called)
    return app


def _is_stated(ctx: typer.Context, name: str, value: Any) -> bool:
    source = ctx.get_parameter_source(name)
    return value not in (None, [], ()) and source is not None and source.name != "DEFAULT"


def _strange(ctx: typer.Context) -> Iterator[str]:
    strange = ctx.meta.get(_STRANGE, [])
    yield from strange
    if not strange:  # else they may be the values of those
        yield from (f"{word!r}: unexpected argument" for word in ctx.args)


class VerbCommand(TyperCommand):
    """A verb that collects unknown flags, so that they can be said with everything else that is wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the unknown flags out and remember them."""
        options = {word: p for p in self.get_params(ctx) for word in (*p.opts, *p.secondary_opts) if word.startswith("-")}
        kept: list[str] = []
        words, strange = iter(args), []
        for word in words:
            name = word.split("=")[0]
            if word == "--":
                kept += [word, *words]
            elif not word.startswith("--") or name in options:
                kept.append(word)
                if word in options and not getattr(options[word], "is_flag", False):
                    kept += [value for value in (next(words, None),) if value is not None]
            else:
                near = ", ".join(nearest_names(name, [option for option in options if option.startswith("--")]))
                strange.append(f"{name}: no such option; the nearest are {near}")
        ctx.meta[_STRANGE] = strange
        return super().parse_args(ctx, kept)


def _parameter(kind: type[Settings], name: str) -> inspect.Parameter:
    """The option or argument of a field."""
    facts, info = kind.facts(name), kind.fields()[name]
    words, annotation = flags_of(kind, name), _plain(info.annotation)
    shown: Any = None if info.is_required() else info.default
    common: dict[str, Any] = {"help": facts.help, "rich_help_panel": kind.group_of(name) or None}
    if (complete := _completer(kind, name)) is not None:
        common["autocompletion"] = complete
    many = facts.repeated
    if facts.argument is not None:
        default: Any = typer.Argument([] if many else None, metavar=facts.argument, show_default=False, **common)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=list[str] if many else str | None)
    if annotation is bool:
        default = typer.Option(bool(shown), f"{words[0]}/--no-{words[0][2:]}", *words[1:], show_default=bool(shown), **common)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=bool)
    if many:
        default = typer.Option([], *words, metavar=metavar_of(annotation), show_default=False, **common)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=list[str])
    default = typer.Option(text_of(shown), *words, metavar=metavar_of(annotation), **common)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=str | None)


def _completer(kind: type[Settings], name: str) -> Callable[[typer.Context, str], list[str]] | None:
    """What a shell offers for a setting: its words, or the values that its type names; after a comma the next of them."""
    words, annotation = kind.facts(name).words, _plain(kind.fields()[name].annotation)
    if words is None and get_origin(annotation) is Literal:
        words = lambda _: [str(part) for part in get_args(annotation)]  # noqa: E731
    if words is None:
        return None
    many = get_origin(annotation) is tuple

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",") if many else ("", "", incomplete)
        taken = before.split(",")
        return [f"{before}{comma}{word}" for word in words(ctx.params) if word.startswith(begun) and word not in taken]

    return complete


def text_of(value: Any) -> str | None:
    """A default as one would type it.

    Example:
        >>> text_of((0.5, 1.0)), text_of(4), text_of(None)
        ('0.5,1', '4', None)
    """
    if value is None or value == ():
        return None
    if isinstance(value, tuple):
        return ",".join(str(text_of(part)) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


_WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "TRUTH"}


def metavar_of(annotation: Any) -> str:
    """What stands for a value in the help.

    Example:
        >>> metavar_of(int | Literal["equal"]), metavar_of(tuple[str, ...]), metavar_of(Literal["a", "b"])
        ('INTEGER|equal', 'TEXT,...', 'a|b')
    """
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not type(None)]
    if origin is Literal:
        return "|".join(map(str, parts)) if len(parts) <= _MANY_CHOICES else "NAME"
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(metavar_of(part) for part in parts))
    if origin is tuple:
        return ",".join("..." if part is Ellipsis else metavar_of(part) for part in parts)
    if origin is not None and hasattr(annotation, "__metadata__"):
        return metavar_of(parts[0])
    return _WORDS.get(annotation, "TEXT")
