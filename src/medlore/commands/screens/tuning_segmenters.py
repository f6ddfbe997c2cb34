"""What a person sees of `medlore finetune PACK --cases LIST`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from medlore.commands.screens.answers import print_json
from medlore.commands.screens.decomposing_segmenters import print_tables
from medlore.commands.screens.narration import Narrator
from medlore.commands.screens.voice import notes_console
from medlore.decomposing.segmenters.few_shot import FewShotResult, plan_tuning, tune_segmenter
from medlore.decomposing.segmenters.few_shot_settings import FewShotSettings


def tune_on_screen(settings: FewShotSettings, out: Path, *, as_json: bool) -> None:
    """Tune a segmenter and print what it reached."""
    with Narrator(notes_console()) as narrator:
        done = tune_segmenter(settings, out, narrate=narrator, say=narrator.say)
    _print_result(done, as_json=as_json)


def plan_on_screen(settings: FewShotSettings, *, as_json: bool) -> None:
    """Say what would be done."""
    _print_plan(plan_tuning(settings), as_json=as_json)


def _print_plan(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print("cases: " + ", ".join(f"{count} {part}" for part, count in found["cases"].items()))
    console.print(
        f"prompts of {found['region']}: {', '.join(found['prompts'])}; known to the model: {', '.join(found['known_prompts']) or 'none'}"
    )
    console.print(f"{found['trainable']:,} of {found['parameters']:,} numbers are trained ({found['trainable_share']:.1%})")
    for name, rank in found["ranks"].items():
        console.print(f"  {name}: rank {rank}")
    console.print(f"device {found['device']}; nothing was trained")


def _print_result(done: FewShotResult, *, as_json: bool) -> None:
    if as_json:
        print_json({"pack": done.pack, "table": done.table, "trainable": done.trainable})
        return
    console = Console(width=max(Console().width, 100), highlight=False)
    print_tables(done.table, console)
    if not done.table:
        console.print('no test case: give lines `"split": "test"` to measure')
    console.print(f"pack: {done.pack}\nnext: medlore segment --model {done.pack} --image FILE --labels all --modality NAME")
