"""The tables of a study as Markdown, to be laid into a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tables_in_markdown(results: Mapping[str, Any]) -> str:
    """One table a set and number of shots, then what did not run.

    Args:
        results: of the report.
    """
    parts = [_table(table, results["reference"]) for table in results["tables"]]
    cells = results["cells"]
    if cells["done"] < cells["all"]:
        parts.append(f"{cells['done']} of {cells['all']} cells are done, {cells['failed']} failed, {cells['missing']} have not run.")
    return "\n\n".join(parts) + "\n"


def _table(table: Mapping[str, Any], reference: str) -> str:
    measure = table["measure"].replace("_", " ")
    lines = [
        f"**{_safe(table['data'])}, {table['shots']} shots, {measure}**; {table['test_images']} test images",
        "",
        f"| method | {measure} | {_safe(reference)} minus it | better/equal/worse | it minus its probe | trained |",
        "|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        wins = "" if row["wins"] is None else "/".join(str(count) for count in row["wins"])
        found = (_interval(row[name]) for name in ("score", "difference"))
        cells = (_safe(row["method"]), *found, wins, _interval(row.get("over_probe")), f"{row['trained_parameters']:,}")
        lines.append(f"| {' | '.join(cells)} |")
    if table["majority"] is not None:
        lines.append(f"| majority class | {table['majority']:.3f} | | | | 0 |")
    return "\n".join(lines)


def _interval(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return ""
    around = "" if mean["low"] is None else f" ({mean['low']:.3f} to {mean['high']:.3f})"
    return f"{mean['mean']:.3f}{around}"


def _safe(name: str) -> str:
    """A name that cannot end its cell.

    Examples:
        >>> _safe("a|b")
        'a&#124;b'
    """
    return name.replace("|", "&#124;").replace("\n", " ")
