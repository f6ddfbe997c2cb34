"""Progress of a training of several networks: bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ReportProgress = Callable[[int, int, str], None]
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

    def __call__(self, name: str) -> ReportProgress:
        """Progress of one network."""
        if self._bars is None:
            return _lines(name, self.say)
        bars = self._bars
        bar = bars.add_task(name, total=None, text="")
        return lambda step, steps, text: bars.update(bar, completed=step, total=steps, text=text)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, soft_wrap=True)


def _lines(name: str, say: Callable[[str], None]) -> ReportProgress:
    began = last = time.monotonic()
    first = -1

    def report(step: int, steps: int, text: str) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = step - 1 if first < 0 else first
        if now - last < _LINE_SECONDS and step < steps:
            return
        last = now
        each = (now - began) / max(step - first, 1)
        say(f"{name}: step {step} of {steps}{text and ', '}{text}, {each:.2f} s a step, {(steps - step) * each / 60:.0f} min left")

    return report
