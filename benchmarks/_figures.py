"""What a benchmark has found, beside its target: printed, kept in one file, and written as a page of tables."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._page import put_section

DOCS = Path(__file__).resolve().parents[1] / "docs"
KEPT, PAGE = DOCS / "results" / "performance.json", DOCS / "performance.md"


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    Args:
        what: was measured.
        ours: with its unit.
        peer: the alternative in the same run, with its unit; empty where its package is absent or there is none.
        limit: of the machine, or the least that any program needs.
        value: what the target speaks of, the ratio ours / peer where nothing else is said.
        target: the value should be at most this; None where there is none.
        unit: of value and target.
    """

    what: str
    ours: str
    peer: str = ""
    limit: str = ""
    value: float | None = None
    target: float | None = None
    unit: str = ""

    def verdict(self) -> str:
        """Whether the target is met."""
        if self.value is None or self.target is None:
            return ""
        return "met" if self.value <= self.target else "missed"

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        value = "" if self.value is None else f"{self.value:.3g} {self.unit}".strip()
        target = "" if self.target is None else f"{self.target:g} {self.unit}".strip()
        return self.what, self.ours, self.peer, self.limit, value, target, self.verdict()


HEAD = ("what", "ours", "peer", "limit", "figure", "at most", "")


def missing(package: str, what: str) -> bool:
    """Whether a peer's package is absent; then one line says what brings it."""
    if importlib.util.find_spec(package) is not None:
        return False
    print(f"{what} is left out: {package} is not installed; pip install {package}", flush=True)
    return True


def show(subject: str, command: str, figures: Sequence[Figure], *, note: str = "", kept: bool = False) -> None:
    """Print a table, and keep it in place of the one with the same subject where that is asked for.

    Args:
        subject: title of the table.
        command: that measures it.
        figures: its rows.
        note: how it was measured: clock, threads, repeats.
        kept: write it into `docs/results/performance.json`.
    """
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    table = {"command": command, "note": note, "load": load, "cores": os.cpu_count(), "rows": [asdict(figure) for figure in figures]}
    if kept:
        KEPT.write_text(json.dumps({**read(), subject: table}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text_of(subject, table), flush=True)


def read() -> dict[str, dict[str, object]]:
    """All tables that are kept."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def text_of(subject: str, table: dict[str, object]) -> str:
    """A table in Markdown, with its command under it."""
    rows = [Figure(**row).cells() for row in table["rows"]]  # type: ignore[attr-defined]
    lines = [f"## {subject}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"`{table['command']}`. {table['note']} Load of the machine ({table['cores']} cores): {table['load']}.", ""]
    return "\n".join(lines)


def summary() -> str:
    """Every table that is kept, and how many targets are met."""
    kept = read()
    verdicts = [Figure(**row).verdict() for table in kept.values() for row in table["rows"]]  # type: ignore[attr-defined]
    texts = [text_of(subject, table) for subject, table in kept.items()]
    return "\n".join([*texts, f"{verdicts.count('met')} targets met, {verdicts.count('missed')} missed"])


def write_page() -> None:
    """Put every table that is kept into `docs/performance.md`, in place of the one with the same title."""
    for subject, table in read().items():
        put_section(PAGE, text_of(subject, table))
