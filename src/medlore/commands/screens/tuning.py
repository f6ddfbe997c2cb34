"""What `medlore finetune`, `evaluate` and `predict` print: a table for people, or one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.files import json_text

_SHOWN = {
    "single": ("accuracy", "balanced_accuracy", "macro_auc", "mean_average_precision"),
    "multi": ("macro_auc", "mean_average_precision", "accuracy", "overall_f1"),
}


def print_json(value: Any) -> None:
    """One JSON object on stdout, nothing else."""
    sys.stdout.write(json_text(value) + "\n")


def print_notes(notes: list[str]) -> None:
    """What a reader of the numbers should know, on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)


def print_report(report: Mapping[str, Any], *, title: str, per_class: bool = True) -> None:
    """Metrics with their intervals beside the majority answer, then a row a class."""
    console = Console(highlight=False)
    table = Table("metric", "value", "95 % interval", "majority answer", title=title)
    for name in _SHOWN[report["task"]]:
        entry = report["metrics"][name]
        table.add_row(name.replace("_", " "), _number(entry["value"]), _interval(entry), _number(report["majority"][name]))
    console.print(table)
    if per_class:
        rows = Table("class", "positives", "AUC", "95 % interval", "average precision", "recall")
        for row in report["per_class"]:
            values = [_number(row["auc"]["value"]), _interval(row["auc"]), _number(row["average_precision"]["value"])]
            rows.add_row(row["class"], str(row["positives"]), *values, _number(row["recall"]["value"]))
        console.print(rows)
    if report["undefined"]["auc"]:
        console.print(f"AUC is not defined for: {', '.join(report['undefined']['auc'])} (left out of the mean)", markup=False)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Sizes of a run, for `--dry-run` and for the head of a result."""
    table = Table(show_header=False, box=None)
    parts = ", ".join(f"{name} {part['images']}" for name, part in facts["data"].items() if part)
    trained, total = facts["trainable_parameters"], facts["total_parameters"]
    rows = {
        "method": facts["method"],
        "backbone": f"{facts['backbone']['source']} ({facts['backbone']['family']}, {facts['backbone']['image_size']} pixels)",
        "images": parts,
        "trained": f"{trained:,} of {total:,} parameters ({100 * trained / total:.2f} %), {facts['head_parameters']:,} of them in the head",
        "steps": f"{facts['steps']:,} at {facts['learning_rate']:g}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"
