"""`medlore ranks`: a rank plan as a table, a plot, a file, a PEFT configuration."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medlore.extras import require
from medlore.files import atomic_path, json_text
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.export import refuse_a_trained_adapter, write_peft_config
from medlore.ranks.plan import PLAN_SCHEMA, RankPlan
from medlore.ranks.planned import PlannedLayer

_PART_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output projection", "mlp": "MLP", "conv": "convolution", "linear": "linear"}
_PART_COLOURS = {"q": "#0072b2", "k": "#999999", "v": "#d55e00", "o": "#009e73", "mlp": "#cc79a7", "conv": "#e69f00", "linear": "#56b4e9"}


def show_ranks(source: str, *, out: Path | None, plot: Path | None, peft: Path | None, as_json: bool, **options: Any) -> RankPlan:
    """Compute a plan, write what was asked for, and print it.

    Args:
        source: what `plan_ranks` accepts.
        out: where the plan goes.
        plot: where the picture goes (`.png`, `.pdf`, `.svg`).
        peft: new folder for `adapter_config.json`.
        as_json: print one JSON object in place of the table.
        options: further arguments of `plan_ranks`.
    """
    if peft is not None:
        refuse_a_trained_adapter(peft)
    with _progress() as advance:
        plan = plan_ranks(source, progress=advance, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT does to fused matrices is told below, in our own words
        config = None if peft is None else plan.to_lora_config()  # a fault shows before anything is written
    written: dict[str, str] = {}
    if out is not None:
        written["plan"] = str(plan.save(out))
    if plot is not None:
        written["plot"] = str(draw_profile(plan, plot))
    if peft is not None and config is not None:
        written["peft"] = str(write_peft_config(config, peft))
    if as_json:
        sys.stdout.write(json_text(summary(plan) | {"written": written}) + "\n")
    else:
        print_plan(plan, written)
    return plan


def summary(plan: RankPlan) -> dict[str, Any]:
    """The plan as it is written to a file, with its totals."""
    return {
        "schema": PLAN_SCHEMA,
        **asdict(plan),
        "totals": {
            "parameters": plan.parameters,
            "share_of_model": plan.parameters / plan.model_parameters if plan.model_parameters else None,
            "uniform_rank": plan.uniform_rank,
            "decided_by": dict(Counter(layer.decided_by for layer in plan.layers)),
            "ranks_by_block": plan.nested_ranks(),
            "cut_to_the_smaller_side": cut_layers(plan),
        },
    }


def cut_layers(plan: RankPlan) -> list[str]:
    """Names of the layers whose rule asked for more than the smaller side of their matrix, which is what they got."""
    kind, _, number = plan.rule.partition(":")

    def wished(layer: PlannedLayer) -> float:
        if layer.decided_by == "given" or plan.budget is not None:
            return 0.0  # refused, or shared out, below the smaller side
        if kind == "uniform":
            return float(number)
        return 0.0 if layer.stable_rank is None or plan.max_rank is not None else plan.scale * layer.stable_rank

    return [layer.name for layer in plan.layers if wished(layer) >= min(layer.shape) + 1]


def print_plan(plan: RankPlan, written: dict[str, str]) -> None:
    """The table to stdout; notes and written files to stderr."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "part", "shape", "measured", "stable rank", "rank", "alpha", "parameters", "decided by"):
        table.add_column(title, justify="left" if title in ("layer", "part", "decided by") else "right", no_wrap=True)
    for x in plan.layers:
        measured = "" if x.measured_shape is None or x.measured_shape == x.shape else f"{x.measured_shape[0]}x{x.measured_shape[1]}"
        value = "" if x.stable_rank is None else f"{x.stable_rank:.3f}"
        shape = f"{x.shape[0]}x{x.shape[1]}"
        table.add_row(x.name, x.part, shape, measured, value, str(x.rank), f"{x.alpha:g}", f"{x.parameters:,}", x.decided_by)
    console = Console(soft_wrap=True)
    console.width = max(console.width, Measurement.get(console, console.options.update_width(1000), table).maximum)
    console.print(table)
    console.print()
    for line in _totals(plan):
        console.print(line, highlight=False)
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    if cut := cut_layers(plan):
        notes.print(f"note: {len(cut)} of {len(plan.layers)} layers have the smaller side of their matrix as rank: the rule asked for more")
    for kind, path in written.items():
        notes.print(f"{kind} written to {path}", markup=False)
    if "peft" in written and any(layer.rows is not None for layer in plan.layers):
        notes.print("q, k and v are one matrix here: with this file PEFT trains one factor pair over all three. To train q and v apart,")
        notes.print("write the plan with --out and use medlore.get_peft_model(model, plan).")


def _totals(plan: RankPlan) -> Iterator[str]:
    share = f", {100 * plan.parameters / plan.model_parameters:.2f} % of {plan.model_parameters:,}" if plan.model_parameters else ""
    yield f"{len(plan.layers)} factor pairs, {plan.parameters:,} parameters{share}"
    yield f"the same parameters at one rank for all: {plan.uniform_rank:.1f}"
    ways = ", ".join(f"{count} {how}" for how, count in Counter(x.decided_by for x in plan.layers).items())
    chance = (
        ""
        if plan.proof or not {"lanczos", "cholesky"} & {x.decided_by for x in plan.layers}
        else " (chance of a wrong integer below 1e-12 each; --proof for none)"
    )
    yield f"rule {plan.rule}, granularity {plan.granularity}, alpha {plan.alpha_rule}; decided: {ways}{chance}"
    yield f"weights {(plan.sha256 or 'without values')[:16]} ({plan.layout} names)"


def draw_profile(plan: RankPlan, path: str | Path) -> Path:
    """Ranks by depth, one line for each kind of matrix, and the uniform rank with the same parameters."""
    require("matplotlib", "--plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    in_blocks = all(layer.block >= 0 for layer in plan.layers)
    for line in _lines(plan, in_blocks=in_blocks):
        style = ("-", "-", ":", "-.")[line.number % 4]
        colour = _PART_COLOURS.get(line.parts[0], "#000000")
        axes.plot(*zip(*line.points, strict=True), style, marker="o", markersize=3.5, color=colour, label=line.label)
    axes.axhline(
        plan.uniform_rank, color="#444444", linestyle="--", linewidth=1, label=f"uniform, same parameters ({plan.uniform_rank:.1f})"
    )
    axes.set_xlabel("block" if in_blocks else "layer")
    axes.set_ylabel("rank")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_title(f"{Path(plan.source).name}: {plan.rule}, {plan.granularity}, {plan.parameters:,} parameters", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return Path(path)


@dataclass(frozen=True)
class _Line:
    """One line of the picture: equal lines are drawn once and carry all their names."""

    points: tuple[tuple[int, int], ...]
    parts: tuple[str, ...]
    number: int  # 0, or 1, 2, ... where a block has several matrices of one part

    @property
    def label(self) -> str:
        names = " = ".join(_PART_NAMES.get(part, part) for part in self.parts)
        return f"{names} {self.number}" if self.number else names


def _lines(plan: RankPlan, *, in_blocks: bool) -> list[_Line]:
    points: dict[tuple[str, int], list[tuple[int, int]]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for index, layer in enumerate(plan.layers):
        at = layer.block if in_blocks else index
        points.setdefault((layer.part, seen[layer.part, at]), []).append((at, layer.rank))
        seen[layer.part, at] += 1
    merged: dict[tuple[tuple[tuple[int, int], ...], int], list[str]] = {}
    for (part, number), line in points.items():
        several = (part, number + 1) in points or number
        merged.setdefault((tuple(line), number + 1 if several else 0), []).append(part)
    return [_Line(line, tuple(parts), number) for (line, number), parts in merged.items()]


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr, where someone watches."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, of, _name: bar.update(task, completed=done, total=of)
