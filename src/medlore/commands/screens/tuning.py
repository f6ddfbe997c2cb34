"""What `medlore finetune`, `evaluate` and `predict` print: a table for people, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_notes
from medlore.commands.screens.voice import notes_console

if TYPE_CHECKING:
    from medlore.tuning.side_by_side import SideBySide

_SHOWN = {
    "single": ("accuracy", "balanced_accuracy", "macro_auc", "mean_average_precision"),
    "multi": ("macro_auc", "mean_average_precision", "accuracy", "overall_f1"),
}


def print_side_by_side(found: SideBySide, out: Path | None) -> None:
    """One row a method, the regression and the constant answer below them, the verdict last."""
    console = Console(highlight=False)
    name = found.measure.replace("_", " ")
    table = Table("method", name, "95 % interval", "minus logistic regression", "95 % interval", "trained", "seconds")
    for row in found.rows:
        score, difference = row["score"], row["difference"]
        gain = "not defined" if difference["value"] is None else f"{difference['value']:+.3f}"
        cells = [_number(score["value"]), _interval(score), gain, _interval(difference)]
        table.add_row(row["method"], *cells, f"{row['trained_parameters']:,}", f"{row['seconds']:.0f}")
    table.add_section()
    table.add_row("logistic regression", _number(found.probe["value"]), _interval(found.probe), "", "", "", "")
    table.add_row("majority answer", _number(found.majority), "", "", "", "", "")
    table.title = f"{found.images} test images"
    console.print(table)
    print_verdict(found.verdict, out)


def print_choice(choice: Mapping[str, Any]) -> None:
    """What cross-validation on the shots said of each candidate."""
    console = Console(highlight=False)
    if choice["candidates"]:
        measure = next(name for name in choice["candidates"][0] if isinstance(choice["candidates"][0][name], Mapping))
        words = f"{choice['trained_folds']} folds, {choice['seconds']:.0f} s"
        table = Table("candidate", measure.replace("_", " "), "95 % interval", "log-likelihood", title=f"chosen on the shots: {words}")
        for row in choice["candidates"]:
            mark = " (chosen)" if row["chosen"] else ""
            entry = row[measure]
            table.add_row(row["candidate"] + mark, _number(entry["value"]), _interval(entry), f"{row['log_likelihood']:.3f}")
        console.print(table)
    console.print(f"chosen: {choice['chosen']}, {choice['why']}", markup=False)


def print_where(out: Path) -> None:
    """Where a run writes that was given no folder."""
    notes_console(soft_wrap=True, highlight=False).print(f"writing to {out}", markup=False)


def print_result(report: Mapping[str, Any], out: Path | None = None) -> None:
    """Notes, sizes, and the metrics on the test images of a finished run."""
    print_notes(report["notes"])
    if "choice" in report:
        print_choice(report["choice"])
    print_facts(report)
    if "test" in report:
        test = report["data"]["test"]
        print_report(report["test"], title=f"{test['name']}: {test['images']} test images", probe=report.get("probe"))
    if report.get("verdict"):
        print_verdict(report["verdict"], out)


def print_verdict(text: str, out: Path | None = None) -> None:
    """The last sentence of a run, and where the run lies."""
    Console(highlight=False).print(text if out is None else f"{text} The run is in {out}.", markup=False)


def print_report(report: Mapping[str, Any], *, title: str, per_class: bool = True, probe: Mapping[str, Any] | None = None) -> None:
    """Metrics with their intervals beside the majority answer and the logistic regression, then a row per class."""
    console = Console(highlight=False)
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    for heading in ("value", "95 % interval", "majority answer", *(() if probe is None else ("probe",))):
        table.add_column(heading)
    for name in _SHOWN[report["task"]]:
        entry = report["metrics"][name]
        cells = [_number(entry["value"]), _interval(entry), _number(report["majority"][name])]
        beside = [] if probe is None else [_number(probe["test"]["metrics"][name]["value"])]
        table.add_row(name.replace("_", " "), *cells, *beside)
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
        "head reads": f"{facts['features']['read']}, starts at {'the probe' if facts['start'] == 'probe' else 'random'}",
        "steps": f"{facts['steps']:,} at {facts['learning_rate']:g}, the head at {facts['head_learning_rate']:g}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _interval(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"
