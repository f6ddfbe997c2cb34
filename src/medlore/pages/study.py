"""The page of a study: one table per set, the paired differences, the means over sets, the ranks, what failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.pages import Interval, Notes, Page, Picture, Piece, Section, Table
from medlore.pages.pieces import Cell
from medlore.pages.plan import plan_pieces
from medlore.pages.report import report_page

_SHOWN = ("tables", "means", "mean_ranks", "failed", "notes", "controls", "cells", "study", "reference", "trials")
_NOTE = (
    "Means over draws with 95 % intervals; differences are paired by draw. Where the interval of a difference includes zero, these draws "
    "do not separate the two. Its probe: the logistic regression on frozen features with the same labels. Wins: draws on which the "
    "reference is better, equal, worse. Seconds: median of one training."
)


def study_page(report: Mapping[str, Any], folder: Path) -> Page:
    """The page of a folder of `medlore study`."""
    results = report.get("results", {})
    tables = [piece for table in results.get("tables", ()) for piece in _tables(table, str(results.get("reference")))]
    sections = [Section("Notes", _notes(results)), Section("Results", [*([Notes([_NOTE])] if tables else []), *tables])]
    if (folder / "differences.png").is_file():
        words = "Paired differences: one dot per draw; diamond and line: mean and 95 % interval"
        sections.append(Section("Draw by draw", (Picture.from_file(folder / "differences.png", words),)))
    if (ranks := results.get("mean_ranks")) and (folder / "mean_ranks.png").is_file():
        sections.append(Section("Mean ranks", _ranks(ranks, folder / "mean_ranks.png")))
    if results.get("means"):
        sections.append(Section("Means over sets", (_means(results["means"]),)))
    if (folder / "plan.json").is_file():
        sections.append(Section("Ranks from the weights alone", plan_pieces(folder / "plan.json")))
    page = report_page(report, folder, sections, shown=_SHOWN, pictures=False)
    return Page(f"Study: {results.get('study', folder.name)}", page.sections, page.subtitle, page.facts)


def _tables(table: Mapping[str, Any], reference: str) -> list[Piece]:
    """What was found, and folded under it what it cost."""
    measure = str(table["measure"]).replace("_", " ")
    found: list[list[Cell]] = [
        [
            row["method"],
            _interval(row["score"]),
            _interval(row["difference"]),
            _wins(row["wins"]),
            _interval(row.get("over_probe")),
        ]
        for row in table["rows"]
    ]
    if table["majority"] is not None:
        found.append(["majority class", Interval(table["majority"]), None, None, None])
    cost: list[list[Cell]] = [
        [
            row["method"],
            row["trained_parameters"],
            row["factor_parameters"],
            float(row["seconds"]),
            None if row["peak_memory_bytes"] is None else round(row["peak_memory_bytes"] / 2**30, 2),
        ]
        for row in table["rows"]
    ]
    name = f"{table['data']}, {table['shots']} shots"
    heads = ("method", measure, f"{reference} minus it", "wins", "it minus its probe")
    return [
        Table(heads, found, f"{name}, {table['test_images']} test images"),
        Table(("method", "trained parameters", "in factors", "seconds", "peak memory in GiB"), cost, f"{name}: cost", folded=True),
    ]


def _wins(counts: list[int] | None) -> str | None:
    return None if counts is None else "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}".join(str(count) for count in counts)


def _ranks(found: Mapping[str, Any], picture: Path) -> list[Piece]:
    left_out = f" Draws left out because a method is missing: {found['draws_left_out']}." if found["draws_left_out"] else ""
    chance = "" if found["probability"] is None else f" Friedman's test: p = {found['probability']:.2g}."
    words = (
        f"Each of {found['draws']} draws ranks all methods.{left_out} Two methods whose lines overlap (mean ranks closer than "
        f"{found['critical_difference']:.1f}) do not differ significantly (Nemenyi's test, 5 %).{chance} Draws of one set share its "
        "pool and test images, so the test is somewhat optimistic."
    )
    return [Picture.from_file(picture, "Mean ranks with critical difference"), Notes([words])]


def _means(means: list[Mapping[str, Any]]) -> Piece:
    rows: list[list[Cell]] = [[str(m["shots"]), m["method"], m["mean_of_sets"], m["mean_of_groups"]] for m in means]
    count = max(m["sets"] for m in means)
    groups = max((m["groups"] or 0 for m in means), default=0)
    return Table(("shots", "method", f"mean of {count} sets", f"mean of {groups} groups" if groups else "mean of groups"), rows)


def _notes(results: Mapping[str, Any]) -> list[Piece]:
    lines = [f"{name}: added as a control for {other}, with as many parameters" for name, other in results.get("controls", {}).items()]
    trials = results.get("trials", 1)
    if trials > 1:
        lines.append(f"Every method had {trials} learning rates tried on validation images; the test images were used once, afterwards.")
    failed = [
        f"{f['data']}, {f['shots']} shots, draw {f['draw']}, seed {f['seed']}, {f['method']}: {f['reason']}"
        for f in results.get("failed", ())
    ]
    warnings = [*results.get("notes", ()), *failed]
    return [*([Notes(warnings, warning=True)] if warnings else []), *([Notes(lines)] if lines else [])]


def _interval(record: Mapping[str, Any] | None) -> Interval | None:
    return None if record is None else Interval(record["mean"], record["low"], record["high"])
