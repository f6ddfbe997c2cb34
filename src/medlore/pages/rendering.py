"""Pieces -> one HTML file. Every value is escaped; nothing is requested from outside, and the page's own policy forbids it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlore.extras import require
from medlore.files import write_text
from medlore.pages.pieces import Cell, Facts, Interval, Notes, Page, Picture, Piece, Section, Table
from medlore.pages.slices import Slices

if TYPE_CHECKING:
    from jinja2 import Template

_KIND = {Facts: "facts", Table: "table", Picture: "picture", Notes: "notes", Slices: "slices"}


def write_page(page: Page, path: str | Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        StepError: the folder cannot be written.
    """
    return write_text(path, page_html(page))


def page_html(page: Page) -> str:
    """The page as HTML text."""
    sections = [section for section in page.sections if section.pieces]
    viewer = any(isinstance(piece, Slices) for section in sections for piece in section.pieces)
    style, scripts = _part("page.css"), [_part("tables.js"), *([_part("slices.js")] if viewer else [])]
    return _template().render(
        page=page,
        sections=sections,
        style=style,
        scripts=scripts,
        policy=_policy(style, scripts),
    )


def _policy(style: str, scripts: Sequence[str]) -> str:
    """Only these very texts may style and run; pictures come from the page itself; nothing else is loaded or sent."""
    runs = " ".join(_digest(script) for script in scripts)
    rules = ("default-src 'none'", "img-src data:", f"style-src {_digest(style)}", f"script-src {runs}", "base-uri 'none'")
    return "; ".join([*rules, "form-action 'none'"])


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _part(name: str) -> str:
    return (resources.files("medlore.pages") / name).read_text(encoding="utf-8")


@functools.cache
def _template() -> Template:
    jinja2 = require("jinja2", "HTML pages")
    rules = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rules.filters |= {"cell": cell_text, "json": _json_inside, "words": words}
    rules.tests["number"] = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    rules.tests["interval"] = lambda value: isinstance(value, Interval)
    rules.globals |= {
        "kind": _kind,
        "whiskers": whiskers,
        "scale_of": scale_of,
        "places_of": places_of,
        "sort_key": sort_key,
        "anchor": anchor,
    }
    return rules.from_string(_part("page.html"))


def _kind(piece: Piece) -> str:
    return _KIND[type(piece)]


def _json_inside(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def words(name: str) -> str:
    """A name of code as words.

    Example:
        >>> words("balanced_accuracy")
        'balanced accuracy'
    """
    return name.replace("_", " ")


def anchor(section: Section, number: int) -> str:
    """Name of a section in links: letters and digits alone."""
    plain = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in section.title.casefold())
    return f"s{number}-{plain}"


def cell_text(value: Cell, *, places: int | None = None) -> str:
    """A value as a reader sees it.

    Example:
        >>> cell_text(131072), cell_text(0.87654321), cell_text(Interval(0.5, 0.4, 0.61)), cell_text(None)
        ('131,072', '0.8765', '0.500 (0.400 to 0.610)', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value, places)
    if isinstance(value, Interval):
        around = "" if value.low is None or value.high is None else f" ({_number(value.low, 3)} to {_number(value.high, 3)})"
        return ("not defined" if value.value is None else _number(value.value, 3)) + around
    return value


def _number(value: float, places: int | None) -> str:
    if not math.isfinite(value):
        return "–"
    if places is not None:
        return f"{value:,.{places}f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def places_of(table: Table, column: int) -> int | None:
    """Decimals of the numbers of a column; None for as many as each needs."""
    numbers = [abs(row[column]) for row in table.rows if isinstance(row[column], float) and math.isfinite(row[column])]  # type: ignore[arg-type]
    if not numbers or all(n == round(n) for n in numbers):
        return 0
    if max(numbers) >= 100:
        return 1
    return None if min(n for n in numbers if n) < 0.001 else 3


def sort_key(value: Cell) -> str:
    """What a column is sorted by; empty for nothing."""
    if isinstance(value, Interval):
        value = value.value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(float(value)) if isinstance(value, int | float) else value


def scale_of(table: Table, column: int) -> tuple[float, float] | None:
    """Ends of the line on which the intervals of a column are drawn; None for a column without."""
    cells = [row[column] for row in table.rows if isinstance(row[column], Interval)]
    numbers = [n for cell in cells for n in (cell.value, cell.low, cell.high) if n is not None and math.isfinite(n)]  # type: ignore[union-attr]
    if not numbers:
        return None
    if min(numbers) >= 0 and max(numbers) <= 1:
        return 0.0, 1.0
    low, high = min(*numbers, 0.0), max(*numbers, 0.0)
    return low, high if high > low else low + 1.0


def whiskers(cell: Interval, scale: tuple[float, float]) -> dict[str, float | None]:
    """Where value, ends and zero lie on a line of 100."""

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max((value - scale[0]) / (scale[1] - scale[0]), 0.0), 1.0), 2)

    return {"value": at(cell.value), "low": at(cell.low), "high": at(cell.high), "zero": at(0.0) if scale[0] < 0 else None}
