"""Pictures of a study: what the reference has over each other method, draw by draw, and the mean ranks of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.extras import require
from medlore.files import atomic_path

_MOST_PANELS = 24


def draw_differences(results: Mapping[str, Any], records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """One panel per set and number of shots, one row per method, one dot per draw; diamond and line: mean and 95 % interval.

    Args:
        results: of the report: `tables` and `reference`.
        records: of the cells.
        path: of the PNG.
    """
    require("matplotlib", "pictures of a study")
    from matplotlib.figure import Figure

    tables = [table for table in results["tables"] if any(row["difference"] for row in table["rows"])][:_MOST_PANELS]
    tables = tables or results["tables"][:1]
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    height = 1.1 + 0.36 * max(len(table["rows"]) for table in tables)
    figure = Figure(figsize=(1.2 + 3.6 * columns, height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(tables) :]:
        panel.set_visible(False)
    for panel, table in zip(panels.flat, tables, strict=False):
        _draw_panel(panel, table, records, results["reference"])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _draw_panel(panel: Any, table: Mapping[str, Any], records: Sequence[Mapping[str, Any]], reference: str) -> None:
    own = [r for r in records if (r["data"], r["shots"]) == (table["data"], table["shots"]) and r.get("score") is not None]
    scores = {(r["method"], r["draw"], r["seed"]): r["score"] for r in own}
    rows = [row for row in table["rows"] if row["difference"]]
    panel.axvline(0, color="#444444", linewidth=1)
    for place, row in enumerate(rows):
        shared = [(d, s) for name, d, s in scores if name == row["method"] and (reference, d, s) in scores]
        dots = [scores[reference, d, s] - scores[row["method"], d, s] for d, s in shared]
        panel.plot(dots, [place - 0.14] * len(dots), "o", color="#0072b2", alpha=0.55, markersize=5)
        found = row["difference"]
        if found["low"] is not None:
            panel.plot([found["low"], found["high"]], [place + 0.14] * 2, color="#d55e00", linewidth=2)
        panel.plot(found["mean"], place + 0.14, "D", color="#d55e00", markersize=6)
    panel.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=8)
    panel.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    panel.set_title(f"{table['data']}, {table['shots']} shots", fontsize=9)
    panel.set_xlabel(f"{reference} minus it, {table['measure'].replace('_', ' ')}", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", alpha=0.25)


def draw_mean_ranks(results: Mapping[str, Any], path: Path) -> Path:
    """A critical-difference plot: one dot per method, best on top; two methods whose lines overlap do not differ significantly.

    Args:
        results: of the report: `mean_ranks` and `reference`.
        path: of the PNG.
    """
    require("matplotlib", "pictures of a study")
    from matplotlib.figure import Figure

    found = results["mean_ranks"]
    half = found["critical_difference"] / 2
    names, ranks = list(found["ranks"]), list(found["ranks"].values())
    figure = Figure(figsize=(7.5, 1.3 + 0.27 * len(names)), layout="constrained")
    panel = figure.subplots()
    panel.axvspan(ranks[0] - half, ranks[0] + half, color="#0072b2", alpha=0.08, linewidth=0)  # of the best, to compare the others with
    for place, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        colour = "#d55e00" if name == results["reference"] else "#0072b2"
        panel.plot([rank - half, rank + half], [place, place], color=colour, linewidth=2, alpha=0.6)
        panel.plot(rank, place, "o", color=colour, markersize=6)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(f"mean rank over {found['draws']} draws (1 is best), with half the critical difference on each side", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
