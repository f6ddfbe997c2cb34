"""Who looks on while a training goes on: progress bars, trackers through accelerate, measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from medlore.training.history import History
from medlore.training.task import Stretch

Progress = Callable[[int, int, str], None]  # steps done, steps of all, a text


class Watcher:
    """Looks on as a training goes on; does nothing itself. A progress bar, a tracker or a measurement overrides what it needs."""

    def start(self, steps: int, epochs: int) -> None:
        """A training of so many optimiser steps begins."""

    def skip(self, steps: int) -> None:
        """A resumed run begins: an earlier one has done so many steps."""

    def step(self, loss: float) -> None:
        """One optimiser step is done."""

    def losses(self, stretch: Stretch) -> None:
        """A line of the history is written."""

    def epoch(self, record: dict[str, Any]) -> None:
        """The weights were judged; what is added to the record stays in the history."""

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


class NetworkTracking(Watcher):
    """Hands every line and judgement of one network of several to accelerate's trackers, under its name.

    Args:
        accelerator: with trackers or without.
        name: of the network.
        measure: what `mean` in a judgement is the mean of.
    """

    def __init__(self, accelerator: Any, name: str, *, measure: str) -> None:
        self._accelerator, self._name, self._measure = accelerator, name, measure

    def losses(self, stretch: Stretch) -> None:
        """Log the terms and the rate."""
        terms = {f"{self._name}/{term}": value for term, value in stretch.terms.items()}
        self._accelerator.log(terms | {f"{self._name}/rate": stretch.rate}, step=stretch.step)

    def epoch(self, record: dict[str, Any]) -> None:
        """Log the mean score, where there is one."""
        if record.get("mean") is not None:
            self._accelerator.log({f"{self._name}/validation {self._measure}": record["mean"]}, step=int(record["step"]))


class Narration(Watcher):
    """Hands step, loss and the share of time spent waiting for data to a progress callback.

    Args:
        progress: the callback.
        steps: of the whole training.
        history: of the training, where the times are.
    """

    def __init__(self, progress: Progress, steps: int, history: History) -> None:
        self._progress, self._steps, self._history = progress, steps, history
        self._done = 0

    def skip(self, steps: int) -> None:
        """Begin after the steps of an earlier run."""
        self._done = steps

    def step(self, loss: float) -> None:
        """One step more."""
        self._done += 1
        share = self._history.waited / max(self._history.seconds, 1e-9)
        self._progress(self._done, self._steps, f"loss {loss:.3f}, waits for data {share:.0%}")


class Watchers(Watcher):
    """Several watchers as one."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def start(self, steps: int, epochs: int) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.start(steps, epochs)

    def skip(self, steps: int) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.skip(steps)

    def step(self, loss: float) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.step(loss)

    def losses(self, stretch: Stretch) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.losses(stretch)

    def epoch(self, record: dict[str, Any]) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.epoch(record)

    def note(self, text: str) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.note(text)

    def stop(self) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.stop()
