"""What is told while a run goes on: a progress bar with its remaining time on stderr, trackers through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from medlore.recipes.training import Watcher


class ProgressBar:
    """Steps done, loss, validation score of the last epoch, time gone and time left."""

    def __init__(self, steps: int, epochs: int, *, enabled: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not enabled, refresh_per_second=4)
        self._epochs = epochs
        self._task = self._bar.add_task("training", total=steps)
        self._score = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

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


class Tracking:
    """Hands every epoch to accelerate's trackers (TensorBoard and others)."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def skip(self, steps: int) -> None:
        """Epochs of an earlier run were logged by it."""

    def step(self, loss: float) -> None:
        """Single steps are not logged: few-shot epochs are a handful of steps."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Log numbers of one epoch."""
        values = {name: value for name, value in record.items() if name != "epoch" and isinstance(value, float)}
        self._accelerator.log(values, step=int(record["epoch"]))


class Watchers:
    """Several watchers as one."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def skip(self, steps: int) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.skip(steps)

    def step(self, loss: float) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.step(loss)

    def epoch(self, record: dict[str, Any]) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.epoch(record)
