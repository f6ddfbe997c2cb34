"""A file of one JSON object per line that grows while a run goes on; a line is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medlore.errors import DataError
from medlore.files import json_text


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Add one line in a single write, on disk when this returns; a line that was cut off before it stays a line of its own."""
    path = Path(path)
    line = json_text(record, indent=None) + "\n"
    cut = path.is_file() and path.stat().st_size > 0 and not _ends_line(path)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (("\n" if cut else "") + line).encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of every whole line. A last line without its end, left by a run that was killed while writing, is passed over.

    Raises:
        DataError: another line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.startswith("{") or line.endswith("}"):
                raise DataError(f"{path}, line {number}", "no record", "one JSON object per line", "remove the line") from error
            continue  # cut off, and gone on from
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}", "no record", "one JSON object per line", "remove the line")
        yield number, record


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
