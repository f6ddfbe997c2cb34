"""A progress bar with its remaining time, on stderr."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medlore.commands.screens.voice import notes_console
from medlore.training.watching import Watcher


class ProgressBar(Watcher):
    """Steps done, loss, validation score of the last epoch, time gone and time left."""

    def __init__(self, *, enabled: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._console = notes_console(soft_wrap=True, highlight=False)
        self._bar = Progress(*columns, console=self._console, disable=not enabled, refresh_per_second=4)
        self._task = self._bar.add_task("training", total=None)
        self._epochs = 0
        self._score = ""

    def start(self, steps: int, epochs: int) -> None:
        """Show the bar."""
        self._epochs, self._score = epochs, ""
        self._bar.reset(self._task, total=steps)
        self._bar.start()

    def skip(self, steps: int) -> None:
        """Steps that an earlier, killed run has done."""
        self._bar.advance(self._task, steps)

    def step(self, loss: float) -> None:
        """One optimiser step is done."""
        self._bar.update(self._task, advance=1, description=f"loss {loss:.3f}{self._score}")

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch is done and judged."""
        if "validation_score" in record:
            self._score = f"  epoch {record['epoch']:.0f}/{self._epochs} score {record['validation_score']:.3f}"

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(f"note: {text}", markup=False)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()
