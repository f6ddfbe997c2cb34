"""What `medlore info` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json, print_notes


def print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    """One JSON object, or lines and tables for people with notes on stderr."""
    if as_json:
        print_json(facts)
        return
    print_notes(list(facts.get("notes", ())))
    for name, value in facts.items():
        if name != "notes" and value not in (None, [], {}, ""):
            _print_fact(name.replace("_", " "), value)


def _print_fact(name: str, value: Any, *, indent: str = "") -> None:
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        table = Table(*(str(column).replace("_", " ") for column in value[0]), box=None, pad_edge=False)
        for row in value:
            table.add_row(*(_plain(cell) for cell in row.values()))
        console.print(table)
    elif isinstance(value, Mapping):
        console.print(f"{indent}{name}:", markup=False)
        for key, item in value.items():
            # Below the first level keys may be data (layer names, labels, files): they are shown as they are.
            _print_fact(str(key), item, indent=indent + "  ")
    else:
        console.print(f"{indent}{name}: {_plain(value)}", markup=False)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    return "" if value is None else str(value)
