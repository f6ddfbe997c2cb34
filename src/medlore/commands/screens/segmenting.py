"""What `medlore segment` prints: the plan, bars on a terminal, a line per case elsewhere, and the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medlore.commands.screens.answers import print_json, print_line

_NAMED = 5


def print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    """What a run would do."""
    if as_json:
        print_json(plan)
        return
    print_line(f"model: {plan['model']}, on {plan['hardware']['device']} in {plan['hardware']['precision']}")
    for case in plan["cases"]:
        print_line(f"{case['name']}: {case.get('in_words') or case['error']}")


def print_results(results: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """How many cases are done, and where to look."""
    if as_json:
        print_json(results)
        return
    counts = results["counts"]
    flagged = results.get("flagged", [])
    odd = f"; look at {', '.join(flagged[:_NAMED])}{' and more' if len(flagged) > _NAMED else ''}: the check finds something implausible"
    print_line(
        f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed{odd if flagged else ''}: {out / 'report.json'}"
    )


class CaseProgress:
    """Bars on a terminal, one line per case elsewhere; all on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
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
