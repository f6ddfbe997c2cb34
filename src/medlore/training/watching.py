"""What is told while a training goes on: to whoever wants to know, and to trackers through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Watcher:
    """Told about a training as it goes on; does nothing itself. A progress bar, a tracker or a measurement overrides what it needs."""

    def start(self, steps: int, epochs: int) -> None:
        """A training of so many optimiser steps begins."""

    def skip(self, steps: int) -> None:
        """A resumed run begins: an earlier one has done so many steps."""

    def step(self, loss: float) -> None:
        """One optimiser step is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """One epoch is done and judged."""

    def note(self, text: str) -> None:
        """Something that a reader of the results should know."""

    def stop(self) -> None:
        """The training has ended, however it ended."""


class Tracking(Watcher):
    """Hands every epoch to accelerate's trackers (TensorBoard and others)."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def epoch(self, record: dict[str, Any]) -> None:
        """Log numbers of one epoch."""
        values = {name: value for name, value in record.items() if name != "epoch" and isinstance(value, float)}
        self._accelerator.log(values, step=int(record["epoch"]))


class Watchers(Watcher):
    """Several watchers as one."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def start(self, steps: int, epochs: int) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.start(steps, epochs)

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

    def note(self, text: str) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.note(text)

    def stop(self) -> None:
        """Tell all."""
        for watcher in self._watchers:
            watcher.stop()
