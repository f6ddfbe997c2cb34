"""What `medlore info` prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json, print_notes
from medlore.commands.screens.voice import is_verbose

_MOST_LINES, _MOST_ENTRIES, _MOST_ROWS = 2, 4, 8  # of what is nested, of a mapping in a line, of a table


def print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    """One JSON object, or lines and tables for people with notes on stderr."""
    if as_json:
        print_json(facts)
        return
    print_notes(list(facts.get("notes", ())))
    shown = {name: value for name, value in facts.items() if name != "notes" and value not in (None, [], {}, "")}
    if sys.stdout.isatty() and not is_verbose():
        console = Console(highlight=False, soft_wrap=True)
        for line in fitted(shown, console.width):
            console.print(line, markup=False)
        return
    for name, value in shown.items():
        _print_fact(name.replace("_", " "), value)


def fitted(facts: Mapping[str, Any], width: int) -> list[str]:
    """Facts in as few lines as a screen has: short ones flow together, long lists and tables are cut; `-v` prints all.

    Args:
        facts: of a description.
        width: characters of a line.
    """
    lines: list[str] = []
    short: list[str] = []
    for name, value in facts.items():
        table = isinstance(value, list) and value and isinstance(value[0], Mapping)
        if not table and not isinstance(value, Mapping):
            short.append(_cut(f"{name.replace('_', ' ')}: {_plain(value)}", width))
            continue
        lines += _flowing(short, width)
        short = []
        lines += _table_lines(name, value, width) if table else _mapping_lines(name, value, width)
    lines += _flowing(short, width)
    return [*lines, _cut("-v prints everything in full", width)]


def _flowing(pieces: Sequence[str], width: int) -> list[str]:
    """Pieces one after the other, in lines that are filled."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + 2 + len(piece) <= width:
            lines[-1] += f"; {piece}"
        else:
            lines.append(piece)
    return lines


def _mapping_lines(name: str, value: Mapping[str, Any], width: int) -> list[str]:
    pieces = [_cut(f"{key}: {_inner(item)}", width - 2) for key, item in value.items()]
    head, *rest = _flowing([f"{name.replace('_', ' ')}: {len(value)} entries", *pieces], width)
    shown = [head, *(f"  {line}" for line in _flowing(pieces[head.count("; ") :], width - 2))] if rest else [head]
    if len(shown) <= _MOST_LINES:
        return shown
    more = f" ... {len(shown) - _MOST_LINES} more lines"
    return [*shown[: _MOST_LINES - 1], _cut(shown[_MOST_LINES - 1], width - len(more)) + more]


def _inner(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"{len(item)} entries" if len(item) > _MOST_ENTRIES else ", ".join(f"{key} {_inner(part)}" for key, part in item.items())
    if isinstance(item, list) and any(isinstance(part, Mapping) for part in item):
        return f"{len(item)} entries"
    text = _plain(item)
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _table_lines(name: str, rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Columns of text, cut at the width of the screen; the last line counts the rows that are left out."""
    cells = [[str(column).replace("_", " ") for column in rows[0]], *([_plain(cell) for cell in row.values()] for row in rows[:_MOST_ROWS])]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_cut("  ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)).rstrip(), width) for row in cells]
    return lines if len(rows) <= _MOST_ROWS else [*lines, f"... {len(rows) - _MOST_ROWS} more of {name.replace('_', ' ')}"]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


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
