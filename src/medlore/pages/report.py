"""`report.json` -> sections of a page: what every run's report has, and its results whatever they are.

Results are turned by their shape, not by the verb: a list of records is a table, a record of numbers is a list of facts,
a value with its ends is an interval. So the page of a new recipe needs no code here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.errors import MedloreError
from medlore.pages import Facts, Interval, Notes, Page, Picture, Piece, Section, Table
from medlore.pages.pieces import Cell
from medlore.pages.rendering import words

_FIRST = ("test", "probe", "table", "metrics", "mean", "by_label")  # what a reader looks for comes first
_LONG_TABLE, _VERY_LONG_TABLE, _LONG_TEXT, _MANY = 15, 40, 160, 6
_PICTURES = (".png", ".jpg", ".jpeg")
_PICTURE_WORDS = {
    "curves": "Losses and validation score by epoch",
    "ranks": "Ranks by depth",
    "stable_ranks": "Stable ranks during training",
    "box_plots": "Dice and surface Dice by label",
    "digits": "Scores of all draws",
    "quality_control": "Three planes with the outlines of the masks",
}


def report_page(
    report: Mapping[str, Any],
    folder: Path,
    lead: Sequence[Section] = (),
    more: Sequence[Section] = (),
    *,
    shown: Iterable[str] = (),
    pictures: bool = True,
) -> Page:
    """The page of a run.

    Args:
        report: what `report.json` says.
        folder: where it lies; pictures are taken from it.
        lead: sections before the results.
        more: sections after the first results.
        shown: keys of the results that these sections show already.
        pictures: show those that lie in the folder.
    """
    results = report.get("results")
    results = {key: value for key, value in results.items() if key not in {*shown, "error"}} if isinstance(results, Mapping) else {}
    verdict = _verdict(results.pop("verdict", None))
    first, rest = result_sections({k: v for k, v in results.items() if k in _FIRST}), {k: v for k, v in results.items() if k not in _FIRST}
    sections = [*_failure(report), *verdict, *lead, *first, *more, *result_sections(rest)]
    if pictures and (found := folder_pictures(folder, report)):
        sections.append(Section("Pictures", found))
    return Page(
        f"medlore {report.get('verb', 'run')}: {folder.resolve().name}",
        [*sections, Section("How it was made", _origin(report))],
        subtitle=" ".join(str(word) for word in report.get("command", ())),
        facts=_head(report),
    )


def result_sections(results: Mapping[str, Any]) -> list[Section]:
    """Single values and small records together, every table and every larger record as a section of its own."""
    plain = {key: cell for key, value in results.items() if (cell := _cell(key, value)) is not _NOT_PLAIN and cell not in (None, "")}
    nested = {key: value for key, value in results.items() if _cell(key, value) is _NOT_PLAIN and value}
    small = {key: value for key, value in nested.items() if _is_small(value)}
    large = sorted(
        nested.keys() - small.keys(), key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), [*nested].index(key))
    )
    short: list[Piece] = [Facts(plain)] if plain else []
    for key, value in small.items():
        short += pieces_of(value, _heading(key))
    sections = [Section(_heading(key), pieces_of(results[key])) for key in large]
    return [*([Section("In short", short)] if short else []), *sections]


def _is_small(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) <= _MANY and all(_cell(str(k), v) is not _NOT_PLAIN for k, v in value.items())


def pieces_of(value: Any, title: str = "") -> list[Piece]:
    """A value of a report as pieces, by its shape."""
    if isinstance(value, list):
        if value and all(isinstance(item, Mapping) for item in value):
            return [_table(value, title)]
        return [Notes([str(item) for item in value])] if value else []
    if not isinstance(value, Mapping):
        cell = _cell(title, value)
        return [] if cell is None or cell is _NOT_PLAIN else [Facts({title or "value": cell})]
    if isinstance(value.get("metrics"), Mapping) and isinstance(value.get("majority"), Mapping):
        return _classification(value, title)
    if len(value) > 1 and all(isinstance(v, Mapping) for v in value.values()) and not _interval(value):
        return _named_records(value, title)
    plain = {str(key): cell for key, v in value.items() if (cell := _cell(str(key), v)) is not _NOT_PLAIN and cell != ""}
    pieces: list[Piece] = []
    if len(plain) > 2 * _MANY:
        long = len(plain) > _LONG_TABLE
        pieces.append(Table(("name", "value"), list(plain.items()), f"{title or 'values'}: {len(plain)}" if long else title, folded=long))
    elif plain:
        pieces.append(Facts(plain, title))
    for key, inner in value.items():
        if _cell(str(key), inner) is _NOT_PLAIN:
            pieces += pieces_of(inner, _heading(str(key)))
    return pieces


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """A record with its inner records unfolded: `loss.beta`; what is too long becomes one line of text.

    Of a report of a classifier, the measures alone are kept.
    """
    if isinstance(record.get("metrics"), Mapping) and "per_class" in record:
        record = record["metrics"]
    cells: dict[str, Cell] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if (cell := _cell(str(key), value)) is not _NOT_PLAIN:
            cells[name] = cell
        elif isinstance(value, Mapping) and (len(value) <= _MANY or _has_measures(value)):
            cells |= flat(value, f"{name}.")
        elif isinstance(value, Mapping):
            cells[name] = _short(", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            cells[name] = _short(", ".join(str(item) for item in value))
    return cells


def _has_measures(record: Mapping[str, Any]) -> bool:
    return any(isinstance(value, float | Mapping) for value in record.values())


def folder_pictures(folder: Path, report: Mapping[str, Any]) -> list[Piece]:
    """Pictures that lie in the folder itself, in the order of the report's outputs; nothing outside it is read."""
    outputs = report.get("outputs")
    names = [str(name) for name in outputs.values()] if isinstance(outputs, Mapping) else []
    files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.casefold() in _PICTURES and path.is_file()}
    order = [name for name in dict.fromkeys(names) if name in files] + [name for name in files if name not in names]
    pieces: list[Piece] = []
    for name in order:
        stem = files[name].stem
        try:
            pieces.append(Picture.from_file(files[name], _PICTURE_WORDS.get(stem, _heading(stem)), dark=stem == "quality_control"))
        except MedloreError as error:
            pieces.append(Notes([str(error)], warning=True))
    return pieces


class _NotPlain:
    """Stands for a value that is no cell of a table."""


_NOT_PLAIN: Any = _NotPlain()


def _cell(key: str, value: Any) -> Any:
    """A value as a cell; `_NOT_PLAIN` for records, lists of records and long lists."""
    if isinstance(value, str) and key.endswith("sha256"):
        return value[:16]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return _interval(value) or _NOT_PLAIN
    if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
        text = ", ".join(str(item) for item in value)
        return text if len(text) <= _LONG_TEXT else _NOT_PLAIN
    return _NOT_PLAIN


def _interval(value: Mapping[str, Any]) -> Interval | None:
    middle = next((name for name in ("value", "mean") if name in value), None)
    if middle is None or not {"low", "high"} <= value.keys():
        return None
    numbers = [value[name] for name in (middle, "low", "high")]
    if any(n is not None and (isinstance(n, bool) or not isinstance(n, int | float)) for n in numbers):
        return None
    return Interval(*numbers)


def _table(records: Sequence[Mapping[str, Any]], title: str) -> Table:
    rows = [flat(record) for record in records]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) is not None for row in rows)]
    heads = [name.rsplit(".", 1)[-1] for name in names]
    columns = [head if heads.count(head) == 1 else name for head, name in zip(heads, names, strict=True)]
    long = len(rows) > _LONG_TABLE
    head = f"{title}: {len(rows)} rows" if long and title else title
    return Table(
        columns, [[row.get(name) for name in names] for row in rows], head, folded=(long and bool(title)) or len(rows) > _VERY_LONG_TABLE
    )


def _named_records(records: Mapping[str, Any], title: str) -> list[Piece]:
    if all(_interval(record) for record in records.values()):
        return [Table(("measure", "value"), [(words(name), _interval(record)) for name, record in records.items()], title)]
    return [_table([{"name": words(name), **record} for name, record in records.items()], title)]


def _classification(report: Mapping[str, Any], title: str) -> list[Piece]:
    """Measures with their intervals beside the answer that is always the same, then the classes."""
    majority = report["majority"]
    rows = [
        (name, _interval(entry) if isinstance(entry, Mapping) else entry, majority.get(name)) for name, entry in report["metrics"].items()
    ]
    how = report.get("bootstrap")
    note = (
        f"95 % intervals from {how['resamples']:,} resamples of each {how['unit']}."
        if isinstance(how, Mapping) and how.get("resamples")
        else ""
    )
    pieces: list[Piece] = [Table(("measure", "value", "majority answer"), rows, title, note)]
    undefined = report.get("undefined")
    missing = [
        f"{_heading(name)} is not defined for: {', '.join(map(str, classes))}" for name, classes in (undefined or {}).items() if classes
    ]
    if missing:
        pieces.append(Notes(missing))
    if report.get("per_class"):
        pieces.append(_table(report["per_class"], "Classes"))
    return pieces


def _verdict(text: Any) -> list[Section]:
    """The last sentence of a run comes first on its page."""
    return [Section("Verdict", (Notes([text]),))] if isinstance(text, str) and text else []


def _failure(report: Mapping[str, Any]) -> list[Section]:
    state = report.get("state")
    if state in ("done", None):
        return []
    results = report.get("results")
    error = results.get("error") if isinstance(results, Mapping) else None
    return [Section("Not finished", (Notes([str(error or f"the run is {state}")], warning=True),))]


def _head(report: Mapping[str, Any]) -> dict[str, Cell]:
    facts = {"state": report.get("state"), "device": report.get("device"), "seed": report.get("seed")}
    if isinstance(seconds := report.get("seconds"), int | float):
        facts["time"] = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    if isinstance(peak := report.get("peak_memory_bytes"), int | float):
        facts["peak_memory"] = f"{peak / 2**30:.2f} GiB"
    versions = report.get("versions")
    if isinstance(versions, Mapping):
        facts["medlore"] = versions.get("medlore")
    return {name: value for name, value in facts.items() if value is not None}


def _origin(report: Mapping[str, Any]) -> list[Piece]:
    parts = {name: report.get(name) for name in ("settings", "inputs", "versions", "machine", "git")}
    facts = {name: flat(part) for name, part in parts.items() if isinstance(part, Mapping) and part}
    return [
        Facts({key: value for key, value in rows.items() if value is not None}, _heading(name), folded=True) for name, rows in facts.items()
    ]


def _heading(name: str) -> str:
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def _short(text: str) -> str:
    return text if len(text) <= _LONG_TEXT else text[: _LONG_TEXT - 2] + " …"
