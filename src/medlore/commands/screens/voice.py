"""How much a command says on stderr: everything, the usual, or nothing but errors; set once by `--quiet` and `-v`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

from rich.console import Console

Loudness = Literal["quiet", "usual", "verbose"]
_LOUDNESS: ContextVar[Loudness] = ContextVar("loudness", default="usual")


def set_loudness(value: Loudness) -> None:
    """Say from here on as much as this."""
    _LOUDNESS.set(value)


def is_verbose() -> bool:
    """Whether everything is to be said."""
    return _LOUDNESS.get() == "verbose"


def notes_console(**how: Any) -> Console:
    """The console for progress and notes; it says nothing with `--quiet`.

    Args:
        how: further arguments of rich's `Console`.
    """
    quiet = bool(how.pop("quiet", False)) or _LOUDNESS.get() == "quiet"
    return Console(stderr=True, quiet=quiet, **how)
