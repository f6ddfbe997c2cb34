"""What a person sees of `medlore decompose`: progress on stderr, the table or one JSON object on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from medlore.commands.screens.narration import Narrator
from medlore.decomposing.classifiers.report import print_table
from medlore.decomposing.classifiers.study import decompose, plan
from medlore.files import json_text


def run_on_screen(study: Path, out: Path, *, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Run a study, or print what it would do."""
    if dry_run:
        _print_plan(plan(study, **flags), as_json=as_json)
        return
    with Narrator(Console(stderr=True)) as narrator:
        done = decompose(study, out, narrate=narrator, **flags)
    if as_json:
        sys.stdout.write(json_text({"pack": done.pack, "table": done.table}) + "\n")
        return
    console = Console(width=max(Console().width, 140))
    print_table(done.table, console)
    console.print(f"expert pack: {done.pack}", highlight=False)
    console.print(f"next: medlore info {done.pack}; medlore export {done.pack} --expert NAME --format onnx --out FOLDER", highlight=False)


def _print_plan(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json_text(found) + "\n")
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
    console.print(f"would train: {', '.join(found['variants'])}; {found['steps']} steps a student, on {found['device']}")
