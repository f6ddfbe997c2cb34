"""What a person sees of a segmentation study: progress on stderr, the table or one JSON object on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medlore.files import json_text
from medlore.recipes.segmentation.study import SegmentationResult, decompose_segmenter
from medlore.recipes.segmentation.training import Progress as Tell

_LINE_SECONDS = 30.0


class Narrator:
    """Bars on a terminal, a line now and then in a file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stack = ExitStack()
        self._bars: Progress | None = None

    def __enter__(self) -> Narrator:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:16s}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bars = self._stack.enter_context(Progress(*columns, console=self.console))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, name: str) -> Tell:
        """Progress of one network."""
        if self._bars is None:
            return _lines(name, self.say)
        bars = self._bars
        bar = bars.add_task(name, total=None, text="")
        return lambda step, steps, text: bars.update(bar, completed=step, total=steps, text=text)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, soft_wrap=True)


def run_on_screen(study: Path, out: Path, *, only: str | None, as_json: bool, **flags: Any) -> None:
    """Run a study and print its table."""
    with Narrator(Console(stderr=True)) as narrator:
        done = decompose_segmenter(study, out, only=only, narrate=narrator, say=narrator.say, **flags)
    if as_json:
        sys.stdout.write(json_text({"packs": done.packs, "table": done.table}) + "\n")
        return
    print_result(done)


def print_result(done: SegmentationResult) -> None:
    """The table, and where the packs are."""
    console = Console(width=max(Console().width, 100))
    if done.table:
        console.print(_table(done.table))
    for name, pack in done.packs.items():
        console.print(f"{name}: {pack}", highlight=False)
    if "pack" in done.packs:
        console.print(f"next: medlore info {done.packs['pack']}; medlore segment --model {done.packs['pack']} IMAGE", highlight=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    """A row a label, a column a network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table = Table(title="Dice on the test cases, on the network's grid")
    for column in ("list", "label", "cases", *networks):
        table.add_column(column)
    held: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        held.setdefault((row["list"], row["label"]), {"cases": row["cases"]})[row["network"]] = row["dice"]
    for (name, label), found in held.items():
        table.add_row(name, label, str(found["cases"]), *(f"{found[n]:.3f}" if n in found else "" for n in networks))
    return table


def _lines(name: str, say: Callable[[str], None]) -> Tell:
    began = told = time.monotonic()
    first = -1

    def tell(step: int, steps: int, text: str) -> None:
        nonlocal told, first
        now = time.monotonic()
        first = step - 1 if first < 0 else first
        if now - told < _LINE_SECONDS and step < steps:
            return
        told = now
        each = (now - began) / max(step - first, 1)
        say(f"{name}: step {step} of {steps}, {text}, {each:.2f} s a step, {(steps - step) * each / 60:.0f} min left")

    return tell
