"""The two ways in which every verb answers: one JSON object on stdout, or words for people with notes on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from medlore.commands.screens.voice import notes_console
from medlore.files import json_text


def print_json(value: Any) -> None:
    """One JSON object on stdout, nothing else."""
    sys.stdout.write(json_text(value) + "\n")


def print_line(text: str) -> None:
    """One line of the answer on stdout."""
    sys.stdout.write(text + "\n")


def progress_lines(*, quiet: bool) -> Callable[[str], None]:
    """Says what is going on, one line at a time, on stderr."""
    console = notes_console(quiet=quiet, highlight=False, soft_wrap=True)
    return console.print


def print_notes(notes: list[str]) -> None:
    """What a reader of the numbers should know, on stderr."""
    console = notes_console(soft_wrap=True, highlight=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
