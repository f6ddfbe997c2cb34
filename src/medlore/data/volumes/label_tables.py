"""Which value of a label map has which name: tables in NIfTI extensions, `labels.json` beside the file, and those of Slicer.

Names are believed before the order of a list. A table is what somebody else wrote: it is searched for plain entries and never
handed to a parser that follows references.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.data.volumes.nifti import LABEL_SCHEMA, read_extensions
from medlore.errors import DataError
from medlore.files import read_json

BESIDE = "labels.json"
_ACCEPTED = '{"labels": {"1": "liver", ...}} or {"liver": 1, ...}'

_NUMBER = re.compile(r"\d{1,9}")
# <Label Key="1" Red="..."><![CDATA[liver]]></Label>, as Connectome Workbench and TotalSegmentator write it
_WORKBENCH = re.compile(r"<Label\b[^<>]*?\bKey\s*=\s*[\"'](\d{1,9})[\"'][^<>]*>\s*(?:<!\[CDATA\[(.*?)\]\]>|([^<]*))\s*</Label>", re.DOTALL)


def read_label_table(path: Path) -> dict[int, str] | None:
    """Value -> name from the header extensions of a NIfTI label map; None where it has none.

    Raises:
        DataError: not NIfTI, damaged, or a table of ours that cannot be read.
    """
    for extension in read_extensions(path):
        text = extension.decode("utf-8", errors="replace")
        if "<LabelTable" in text:
            found = {int(key): html.unescape(quoted or plain).strip() for key, quoted, plain in _WORKBENCH.findall(text)}
            return {value: name for value, name in found.items() if value > 0 and name} or None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, Mapping) and content.get("schema") == LABEL_SCHEMA:
            return _table_of(content, str(path))
    return None


def table_beside(path: Path) -> dict[int, str] | None:
    """Value -> name from `labels.json` in the folder of a label map; None where there is none.

    Raises:
        DataError: it is there and not a table of labels.
    """
    file = path.parent / BESIDE
    return read_table(file) if file.is_file() else None


def read_table(file: Path) -> dict[int, str]:
    """Value -> name from a JSON file, which may give names by value or values by name; background (0) is left out.

    Raises:
        DataError: not a table of labels.
    """
    return _table_of(read_json(file), str(file))


def _table_of(content: Any, where: str) -> dict[int, str]:
    table = content.get("labels", content) if isinstance(content, Mapping) else None
    if not isinstance(table, Mapping):
        raise DataError(where, "not a table of labels", _ACCEPTED, "correct or remove it")
    found: dict[int, str] = {}
    faults = []
    for key, entry in table.items():
        value, name = (key, entry) if _NUMBER.fullmatch(str(key)) else (entry, key)
        if isinstance(value, bool) or not _NUMBER.fullmatch(str(value)) or not isinstance(name, str):
            faults.append(f"{key!r}: {entry!r}")
        elif int(value) in found:
            faults.append(f"value {value} has two names: {found[int(value)]!r} and {name!r}")
        else:
            found[int(value)] = name
    if faults:
        raise DataError(where, "not a table of labels", _ACCEPTED, "correct or remove it", faults=faults)
    return {value: name for value, name in found.items() if value > 0}
