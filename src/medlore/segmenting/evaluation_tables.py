"""The tables of an evaluation of masks: every measured label, means by group, box plots."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.extras import is_installed, require
from medlore.files import atomic_path, write_text

MEASURES = ("dice", "surface_dice")

Row = dict[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means by data set and label, by data set, by label and modality, by region, and over all labels; NaN counts nowhere."""
    by_both = _means(rows, ("dataset", "modality", "label", "region"))
    by_label = _means(by_both, ("modality", "label", "region"))
    return {
        "by_dataset_and_label": by_both,
        "by_dataset": _means(by_both, ("dataset",)),
        "by_label": by_label,
        "by_region": _means(by_label, ("region",)),
        "mean": {name: _mean([row[name] for row in by_label]) for name in MEASURES},
    }


def write_tables(out: Path, rows: Sequence[Row], results: Mapping[str, Any]) -> list[Path]:
    """`cases.csv`, `summary.csv` and, where matplotlib is installed, `box_plots.png`."""
    written = [
        write_text(out / "cases.csv", _csv(rows)),
        write_text(out / "summary.csv", _csv(results["by_dataset_and_label"])),
    ]
    return [*written, _box_plots(out / "box_plots.png", rows)] if is_installed("matplotlib") else written


def _means(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """One row for each combination of the keys, in their order, with the mean of every measure."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: tuple("" if key is None else str(key) for key in item[0]))
    return [
        {**dict(zip(keys, values, strict=True)), **{name: _mean([row[name] for row in group]) for name in MEASURES}}
        for values, group in ordered
    ]


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _box_plots(path: Path, rows: Sequence[Row]) -> Path:
    backend, figures = require("matplotlib.backends.backend_agg", path.name), require("matplotlib.figure", path.name)
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    labels = sorted(sorted(by_label), key=lambda label: _median([row["dice"] for row in by_label[label]]), reverse=True)
    figure = figures.Figure(figsize=(8, 1.6 + 0.28 * len(labels)), layout="constrained")
    backend.FigureCanvasAgg(figure)
    for plot, name in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
        groups = [[row[name] for row in by_label[label]] for label in labels]
        plot.boxplot(groups, orientation="horizontal", widths=0.6, showmeans=True, medianprops={"color": "#c0392b"})
        plot.set_yticks(range(1, len(labels) + 1), [f"{label} ({len(group)})" for label, group in zip(labels, groups, strict=True)])
        plot.set_xlim(-0.02, 1.02)
        plot.set_title(name.replace("_", " "))
        plot.grid(axis="x", alpha=0.3)
        plot.invert_yaxis() if name == MEASURES[0] else None
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def _median(values: Sequence[float]) -> float:
    defined = sorted(value for value in values if not math.isnan(value))
    middle = len(defined) // 2
    return math.nan if not defined else defined[middle] if len(defined) % 2 else (defined[middle - 1] + defined[middle]) / 2
