"""What `python -m benchmarks.experts --all` leaves: the section of docs/performance.md, and the constants of the cost model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from medlore.layers.experts.dispatch import PRICES, Load, Prices, costs

TITLE = "## Layers with experts: what a mixed batch costs"
FORMS = ("merged", "factored", "gathered", "published", "chosen")
Row = Mapping[str, Any]


def section(measured: Mapping[str, Any], file: Path | None) -> str:
    """The section; ratios to the base layer or network without experts."""
    rows = measured["rows"]
    worst = max((row["chosen_to_best"] for row in rows if row["kind"] == "layer"), default=math.nan)
    raw = "" if file is None else f" ([raw results](results/{file.name}))"
    lines = [
        TITLE,
        "",
        f"`{measured['command']}`{raw}. Ratio of medians to the base layer without experts, variants in turn within one run,",
        "forward + backward / forward alone. Rank 8 (ShuffleNetV2: 4). Bold: the form that the cost model chose; `chosen` is measured",
        f"again as users run it. Against the best known form the choice costs at most {worst:.2f}. The published form is timed where it is",
        "bearable.",
    ]
    for layout, frozen in (("channel", False), ("channel", True), ("interleaved", False)):
        own = [row for row in rows if row["kind"] == "layer" and (row["layout"], row["frozen"]) == (layout, frozen)]
        if own:
            lines += ["", f"**{layout.capitalize()} layout{', frozen base' if frozen else ''}**", "", *_layer_table(own)]
    lines += _network_table([row for row in rows if row["kind"] == "network"])
    lines += _memory_table([row for row in rows if row["kind"] == "memory"])
    return "\n".join(lines) + "\n"


def _layer_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| layer, experts in the batch | " + " | ".join(FORMS) + " |", "|---" * (len(FORMS) + 1) + "|"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        both = {row["backward"]: row for row in rows if row["shape"] == shape}
        lines.append(f"| {shape} | " + " | ".join(_ratios(both, form) for form in FORMS) + " |")
    return lines


def _ratios(both: Mapping[bool, Row], form: str) -> str:
    cells = []
    for backward in (True, False):
        row = both.get(backward)
        value = None if row is None else row["ratios"].get(form)
        text = "-" if value is None else f"{value:.2f}"
        cells.append(f"**{text}**" if row is not None and row["form"] == form else text)
    return "" if cells == ["-", "-"] else " / ".join(cells)


def _network_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ["", "| network, forward + backward | layout | with experts |", "|---|---|---|"]
    return [*head, *(f"| {row['network']} | {row['layout']} | {row['ratio']:.2f} |" for row in rows)]


def _memory_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", "| peak memory of a forward and backward pass (MiB) | base | published | ours |", "|---|---|---|---|"]
    for row in rows:
        sizes = [f"{row['bytes'][name] / 2**20:.0f}" for name in ("base", "published", "chosen")]
        lines.append(f"| {row['shape']} | " + " | ".join(sizes) + " |")
    return lines


def refit(rows: Sequence[Row]) -> str:
    """The CPU's constants that explain the measured ratios best, and how far the choice is from the best form before and after.

    Least squares of log(cost of a form / cost of the base) - log(measured ratio); a weak pull to the present constants holds what
    the rows do not decide.
    """
    names = [field.name for field in fields(Prices)]
    start = np.log([getattr(PRICES["cpu"], name) for name in names])
    facts = [(Load(**row["load"]), form, ratio) for row in rows if "load" in row for form, ratio in row["ratios"].items()]

    def residuals(logs: np.ndarray) -> np.ndarray:
        prices = Prices(**dict(zip(names, np.exp(logs).tolist(), strict=True)))
        misses = [0.05 * (logs - start)]
        for load, form, ratio in facts:
            cost = costs(load, prices).get(form, math.inf)  # type: ignore[call-overload]
            if math.isfinite(cost):
                misses.append(np.array([math.log(cost / (load.dense + prices.conv * load.traffic) / ratio)]))
        return np.concatenate(misses)

    found = least_squares(residuals, start, loss="soft_l1").x
    fitted = Prices(**{name: float(f"{value:.2g}") for name, value in zip(names, np.exp(found).tolist(), strict=True)})
    text = ", ".join(f"{name}={value:g}" for name, value in asdict(fitted).items())
    before, after = (_chosen_to_best(rows, prices) for prices in (PRICES["cpu"], fitted))
    return f"Prices({text})\nchosen / best form, worst and mean: now {before}, fitted {after}"


def _chosen_to_best(rows: Sequence[Row], prices: Prices) -> str:
    ratios = []
    for row in rows:
        if "load" in row:
            allowed = {form: cost for form, cost in costs(Load(**row["load"]), prices).items() if form in row["ratios"]}
            choice = min(allowed, key=lambda form: allowed[form])
            ratios.append(row["ratios"][choice] / min(row["ratios"][form] for form in allowed))
    return f"{max(ratios):.2f} and {sum(ratios) / len(ratios):.3f}"
