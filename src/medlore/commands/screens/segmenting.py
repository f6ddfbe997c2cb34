"""What `medlore segment` prints: the plan, bars on a terminal, a line per case elsewhere, and the counts."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from medlore.commands.screens.answers import print_json, print_line
from medlore.commands.screens.voice import is_verbose, notes_console
from medlore.segmenting.statistics import CSV, rows_of

_NAMED = 5
_ROWS = 40


def print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    """What a run would do."""
    if as_json:
        print_json(plan)
        return
    print_line(f"model: {plan['model']}, on {plan['hardware']['device']} in {plan['hardware']['precision']}")
    for case in plan["cases"]:
        print_line(f"{case['name']}: {case.get('in_words') or case['error']}")


def print_results(results: dict[str, Any], out: Path, *, as_json: bool, place: Path | None = None) -> None:
    """A table of the masks, how many cases are done, and where to look.

    Args:
        results: of the run.
        out: where the folders of the cases lie.
        as_json: one object in place of words.
        place: where the report lies; `out` unless given.
    """
    place = place or out
    if as_json:
        print_json(results)
        return
    folders = [entry["folder"] for entry in results["cases"] if "folder" in entry]
    if folders:
        _print_masks(out, folders)
        look = f"a page with slices: medlore view {shlex.quote(str(out))}"
        print_line(f"the whole table: {place / CSV}; {look if place == out else f'all shards: medlore collect {shlex.quote(str(out))}'}")
    counts = results["counts"]
    flagged = results.get("flagged", [])
    odd = f"; look at {', '.join(flagged[:_NAMED])}{' and more' if len(flagged) > _NAMED else ''}: the check finds something implausible"
    print_line(
        f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed{odd if flagged else ''}: {place / 'report.json'}"
    )


def _print_masks(out: Path, folders: list[str]) -> None:
    """A row a label where that fits a screen, else a row a case; all rows with `-v`."""
    most = None if is_verbose() else _ROWS
    rows = list(itertools.islice(rows_of(out, folders), None if most is None else most + 1))
    if most is None or len(rows) <= most:
        table, left = _labels_table(rows, several=len(folders) > 1), 0
    else:
        shown = folders if most is None else folders[:most]
        table, left = _cases_table(out, shown), len(folders) - len(shown)
    Console(highlight=False, soft_wrap=True).print(table)
    if left:
        print_line(f"and {left} more case(s); -v prints all")


def _labels_table(rows: list[dict[str, Any]], *, several: bool) -> Table:
    table = Table(*(["case"] if several else []), "label", "ml", "check", box=None, pad_edge=False)
    table.columns[-2].justify = "right"
    for row in rows:
        table.add_row(*([row["case"]] if several else []), row["label"], f"{row['volume_ml']:,.1f}", row["check"] or "")
    return table


def _cases_table(out: Path, folders: list[str]) -> Table:
    table = Table("case", "labels", "ml", "check", box=None, pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for folder in folders:
        rows = list(rows_of(out, [folder]))
        odd = [row["label"] for row in rows if row["check"] not in (None, "ok")]
        judged = any(row["check"] for row in rows)
        said = f"look at {', '.join(odd[:_NAMED])}{' and more' if len(odd) > _NAMED else ''}" if odd else "ok" if judged else ""
        table.add_row(folder, str(len(rows)), f"{sum(row['volume_ml'] for row in rows):,.1f}", said)
    return table


class CaseProgress:
    """Bars on a terminal, one line per case elsewhere; all on stderr."""

    def __init__(self) -> None:
        self._console = notes_console(soft_wrap=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._all = self._bars.add_task("cases", total=None)
        self._one = self._bars.add_task("windows", total=None)
        self._seconds: list[float] = []

    def __enter__(self) -> CaseProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def plan(self, name: str, plan: Any) -> None:
        """A case was planned."""
        self._console.print(f"{name}: {plan.in_words()}")

    def window(self, name: str, done: int, total: int) -> None:
        """Windows of a case were done."""
        self._bars.update(self._one, description=name, completed=done, total=total)

    def case(self, index: int, total: int, entry: dict[str, Any]) -> None:
        """A case was finished, skipped, or failed."""
        self._bars.update(self._all, completed=index, total=total)
        if entry["state"] != "skipped":
            self._seconds.append(entry["seconds"])
        rest = ""
        if self._seconds and index < total:
            left = sum(self._seconds) / len(self._seconds) * (total - index)
            rest = f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        self._console.print(f"[{index}/{total}] {entry['name']}: {entry['state']} in {entry['seconds']:.1f} s{rest}")
        for line in [*entry.get("check", ()), *entry.get("notes", ()), *([entry["error"]] if "error" in entry else [])]:
            self._console.print(f"    {line}")
