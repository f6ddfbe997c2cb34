"""What a person sees of `medlore decompose`: progress on stderr, the table or one JSON object on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json
from medlore.commands.screens.narration import Narrator
from medlore.commands.screens.voice import notes_console
from medlore.decomposing.classifiers.report import headline
from medlore.decomposing.classifiers.study import decompose, plan


def run_on_screen(study: Path, out: Path, *, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Run a study, or print what it would do."""
    if dry_run:
        _print_plan(plan(study, **flags), as_json=as_json)
        return
    with Narrator(notes_console()) as narrator:
        done = decompose(study, out, narrate=narrator, **flags)
    if as_json:
        print_json({"pack": done.pack, "table": done.table})
        return
    console = Console(width=max(Console().width, 140))
    print_table(done.table, console)
    console.print(f"expert pack: {done.pack}", highlight=False)
    console.print(f"next: medlore info {done.pack}; medlore export {done.pack} --expert NAME --format onnx --out FOLDER", highlight=False)


def _print_plan(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False)
    for name, task in found["tasks"].items():
        sizes = ", ".join(f"{task[part]} {part}" for part in ("train", "validation", "test"))
        cost = f"expert of {found['expert_parameters'][name]:,} parameters"
        console.print(f"{name}: {len(task['classes'])} classes, {task['kind']}-label; {sizes}; {cost}")
    teacher = found["teacher_parameters"]
    if teacher is not None:
        console.print(f"teacher: {teacher:,} parameters")
    share = "" if teacher is None else f" ({100 * found['base_parameters'] / teacher:.1f} % of the teacher)"
    console.print(f"shared base: {found['base_parameters']:,} parameters{share}, experts in {found['adapted_layers']} layers")
    console.print(f"would train: {', '.join(found['variants'])}; {found['steps']} steps per student, on {found['device']}")


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Networks down, tasks across; intervals in brackets; the cost of one deployed network at the end."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = Table(
        box=None, pad_edge=False, title="test parts: balanced accuracy, or macro AUC where marked; 95 % interval", title_justify="left"
    )
    table.add_column("network")
    marks = {row["task"]: " (AUC)" for row in rows if row["network"] != "majority" and headline(row)[0] == "macro_auc"}
    for task in tasks:
        table.add_column(task + marks.get(task, ""), justify="right")
    for column in ("deployed", "stored", "MFLOP"):
        table.add_column(column, justify="right")
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = {row["task"]: row for row in rows if row["network"] == network}
        cells = [_cell(headline(mine[task])[1]) if task in mine else "" for task in tasks]
        first = next(iter(mine.values()))
        cost = [f"{first[k]:,}" if k in first else "" for k in ("deployed_parameters", "stored_parameters", "mega_flops")]
        table.add_row(network, *cells, *cost)
    console.print(table)


def _cell(value: Mapping[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    if value.get("low") is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
