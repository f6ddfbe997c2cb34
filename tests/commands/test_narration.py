"""Progress in a file: a line at the end of each network and one every half minute, without control characters."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from medlore.commands.screens import narration
from medlore.commands.screens.narration import Narrator


def test_a_file_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(narration.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Narrator(Console(file=out)) as narrator:
        report = narrator("teacher")
        for step in range(1, 7):
            now[0] += 12.0
            report(step, 6, "" if step < 6 else "loss 0.5")
    lines = out.getvalue().splitlines()
    assert lines == [
        "teacher: step 3 of 6, 12.00 s a step, 1 min left",
        "teacher: step 6 of 6, loss 0.5, 12.00 s a step, 0 min left",
    ]


def test_a_terminal_gets_bars() -> None:
    out = io.StringIO()
    with Narrator(Console(file=out, force_terminal=True)) as narrator:
        narrator("student")(2, 2, "loss 0.5")
    assert "student" in out.getvalue()
    assert "2/2" in out.getvalue()
    assert "\x1b[" in out.getvalue()
