"""What `medlore ranks` prints: a table of the layers, totals, notes, and a bar while matrices are measured."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medlore.commands.screens.voice import notes_console
from medlore.inspecting.ranks import cut_layers
from medlore.ranks.plan import RankPlan
from medlore.ranks.summary import coverage_lines, short_table, totals_line


def print_plan(plan: RankPlan, written: dict[str, str], *, full: bool = False, quiet: bool = False) -> None:
    """The table to stdout; notes and written files to stderr.

    Args:
        plan: to be shown.
        written: kind of file -> path.
        full: a line for each matrix in place of one for each block.
        quiet: the totals alone, without table and notes.
    """
    console = Console(soft_wrap=True)
    if quiet:
        console.print(totals_line(plan.layers, plan.model_parameters), highlight=False)
        return
    if full:
        table = _full_table(plan)
        console.width = max(console.width, Measurement.get(console, console.options.update_width(1000), table).maximum)
        console.print(table)
    else:
        console.print(short_table(plan.layers), highlight=False, markup=False)
    console.print()
    for line in _totals(plan):
        console.print(line, highlight=False)
    notes = notes_console(soft_wrap=True, highlight=False)
    for line in coverage_lines(plan.coverage):
        notes.print(line, markup=False)
    if cut := cut_layers(plan):
        notes.print(f"note: {len(cut)} of {len(plan.layers)} layers have the smaller side of their matrix as rank: the rule asked for more")
    for kind, path in written.items():
        notes.print(f"{kind} written to {path}", markup=False)
    if "peft" in written and any(layer.rows is not None for layer in plan.layers):
        notes.print("q, k and v are one matrix here: with this file PEFT trains one factor pair over all three. To train q and v apart,")
        notes.print("write the plan with --out and use medlore.get_peft_model(model, plan).")


def _full_table(plan: RankPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "part", "shape", "measured", "stable rank", "rank", "alpha", "parameters", "decided by"):
        table.add_column(title, justify="left" if title in ("layer", "part", "decided by") else "right", no_wrap=True)
    for x in plan.layers:
        measured = "" if x.measured_shape is None or x.measured_shape == x.shape else f"{x.measured_shape[0]}x{x.measured_shape[1]}"
        value = "" if x.stable_rank is None else f"{x.stable_rank:.3f}"
        shape = f"{x.shape[0]}x{x.shape[1]}" if x.experts == 1 else f"{x.experts} of {x.shape[0]}x{x.shape[1]}"
        table.add_row(x.name, x.part, shape, measured, value, str(x.rank), f"{x.alpha:g}", f"{x.parameters:,}", x.decided_by)
    return table


def _totals(plan: RankPlan) -> Iterator[str]:
    yield totals_line(plan.layers, plan.model_parameters)
    yield f"the same parameters at one rank for all: {plan.uniform_rank:.1f}"
    ways = ", ".join(f"{count} {how}" for how, count in Counter(x.decided_by for x in plan.layers).items())
    chance = (
        ""
        if plan.proof or not {"lanczos", "cholesky"} & {x.decided_by for x in plan.layers}
        else " (chance of a wrong integer below 1e-12 each; --proof for none)"
    )
    yield f"rule {plan.rule}, granularity {plan.granularity}, alpha {plan.alpha_rule}; decided: {ways}{chance}"
    yield f"weights {(plan.sha256 or 'without values')[:16]} ({plan.layout} names)"


@contextmanager
def progress_bar() -> Iterator[Any]:
    """A bar on stderr, where someone watches."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes_console(),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, of, _name: bar.update(task, completed=done, total=of)
