"""What a person sees of a study: progress on stderr, tables or one JSON object on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json
from medlore.commands.screens.voice import notes_console
from medlore.studies.run import plan_study, run_study


def run_on_screen(file: Path, out: Path, *, as_json: bool, **how: Any) -> int:
    """Run a study; the exit status. `how` is what `run_study` takes."""
    notes = notes_console(soft_wrap=True, highlight=False)

    def say(text: str) -> None:
        notes.print(text, markup=False)

    done = run_study(file, out, say=say, **how)
    if as_json:
        print_json(done.results | {"page": done.page})
    else:
        _print_results(done.results, done.page)
    return 1 if done.failed else 0


def plan_on_screen(file: Path, out: Path, *, as_json: bool, only: list[str], trials: int | None) -> None:
    """Say what a study would do."""
    found = plan_study(file, only=only, trials=trials, out=out)
    if as_json:
        print_json(found)
    else:
        _print_plan(found)


def _print_results(results: Mapping[str, Any], page: Path) -> None:
    console = Console(highlight=False)
    for table in results["tables"]:
        measure = table["measure"].replace("_", " ")
        shown = Table(title=f"{table['data']}, {table['shots']} shots, {measure}, {table['test_images']} test images")
        for head in ("method", "mean (95 % interval)", f"{results['reference']} minus it", "wins", "it minus its probe", "trained"):
            shown.add_column(head)
        for row in table["rows"]:
            wins = "" if row["wins"] is None else "/".join(str(count) for count in row["wins"])
            over = _mean(row["over_probe"])
            shown.add_row(row["method"], _mean(row["score"]), _mean(row["difference"]), wins, over, f"{row['trained_parameters']:,}")
        if table["majority"] is not None:
            shown.add_row("majority class", f"{table['majority']:.3f}", "", "", "", "0")
        console.print(shown)
    for failed in results["failed"]:
        names = ", ".join(f"{name} {failed[name]}" for name in ("data", "shots", "draw", "method", "seed"))
        console.print(f"failed: {names}: {failed['reason']}", markup=False, soft_wrap=True)
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if results["verdict"]:
        console.print(results["verdict"], markup=False)
    console.print(f"page: {page}", markup=False, soft_wrap=True)


def _mean(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    around = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['mean']:.3f}{around}"


def _print_plan(found: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    shown = Table("contender", "method", "learning rate", "settings")
    for each in found["contenders"]:
        own = ", ".join(f"{name}={value}" for name, value in each["settings"].items())
        added = f" (added beside {each['control_of']})" if each["control_of"] else ""
        shown.add_row(each["name"] + added, each["method"], f"{each['rate']:g}", own)
    console.print(shown)
    hours = "" if found["hours_left"] is None else f", about {found['hours_left']:.2f} hours one after the other"
    console.print(f"{found['cells']} cells, {found['finished']} finished, {found['trainings']} trainings left{hours}", markup=False)
