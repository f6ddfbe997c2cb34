"""`cells.jsonl`: one line per cell that has run; a line is whole or not there, the last line of a cell counts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.errors import DataError

CELLS = "cells.jsonl"


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Fingerprint -> record. A last line without its end, left by a run that was killed while writing, is passed over.

    Raises:
        DataError: another line that is no record.
    """
    path = out / CELLS
    if not path.is_file():
        return {}
    found: dict[str, dict[str, Any]] = {}
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[record["fingerprint"]] = record
        except (ValueError, KeyError, TypeError) as error:
            if not line.startswith("{") or line.endswith("}"):
                raise DataError(f"{path}, line {number}", "no record of a cell", "one JSON object per line", "remove the line") from error
    return found


def append_record(out: Path, record: Mapping[str, Any]) -> None:
    """Add one line in a single write, on disk when this returns; a line that was cut off before it stays a line of its own."""
    path = out / CELLS
    line = json.dumps(record, allow_nan=False) + "\n"
    cut = path.is_file() and path.stat().st_size > 0 and not _ends_line(path)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (("\n" if cut else "") + line).encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
