"""`cells.jsonl`: one line per cell that has run; the last line of a cell counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.errors import DataError
from medlore.runs.journal import append_line, read_lines

CELLS = "cells.jsonl"


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Fingerprint -> record.

    Raises:
        DataError: a line that is no record of a cell.
    """
    path = out / CELLS
    found: dict[str, dict[str, Any]] = {}
    for number, record in read_lines(path):
        if not isinstance(record.get("fingerprint"), str):
            raise DataError(f"{path}, line {number}", "no record of a cell", "one JSON object per line", "remove the line")
        found[record["fingerprint"]] = record
    return found


def append_record(out: Path, record: Mapping[str, Any]) -> None:
    """Add the record of a cell."""
    append_line(out / CELLS, record)
