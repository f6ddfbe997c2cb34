"""What a person sees of `medlore finetune PACK --cases LIST`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from medlore.commands.screens.decomposing_segmenters import print_tables
from medlore.commands.screens.narration import Narrator
from medlore.decomposing.segmenters.few_shot import FewShotResult, FewShotSettings, plan_tuning, tune_segmenter
from medlore.errors import InputError
from medlore.files import json_text
from medlore.runs.settings import read_settings, refuse_finished


def tune_on_screen(
    model: str | Path | None,
    cases: Path | None,
    out: Path | None,
    *,
    file: Path | None,
    flags: Mapping[str, Any],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Tune a segmenter, or with `dry_run` say what would be done.

    Args:
        model: pack, file or `medlore:NAME`.
        cases: jsonl.
        out: folder of the results.
        file: YAML of `FewShotSettings`.
        flags: what was given on the command line; flags that are for images are refused.
        dry_run: train nothing.
        overwrite: replace a finished run of other settings.
        as_json: one JSON object on stdout.

    Raises:
        InputError: wrong or missing arguments.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    strange = sorted(set(given) - set(FewShotSettings.model_fields))
    if strange:
        names = ", ".join("--" + name.replace("_", "-") for name in strange)
        known = ", ".join("--" + name.replace("_", "-") for name in FewShotSettings.model_fields if name in _FLAGS)
        raise InputError(names, "given for a segmenter", known, "leave out what is for images")
    for what, value, fix in (("PACK", model, "name a pack of a segmenter"), ("--cases", cases, "give a jsonl with masks")):
        if value is None and file is None:
            raise InputError(what, "nothing", "a pack and a list of cases", fix)
    settings = read_settings(FewShotSettings, file, model=None if model is None else str(model), cases=cases, **given)
    if dry_run:
        _print_plan(plan_tuning(settings), as_json=as_json)
        return
    if out is None:
        raise InputError("--out", "nothing", "a folder for the new pack and the report", "give --out runs/NAME")
    refuse_finished(out, overwrite=overwrite, settings=settings)
    with Narrator(Console(stderr=True)) as narrator:
        done = tune_segmenter(settings, out, narrate=narrator, say=narrator.say)
    _print_result(done, as_json=as_json)


_FLAGS = ("cases", "method", "rank", "region", "steps", "batch_size", "learning_rate", "seed", "device", "precision")


def _print_plan(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json_text(found) + "\n")
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
        sys.stdout.write(json_text({"pack": done.pack, "table": done.table, "trainable": done.trainable}) + "\n")
        return
    console = Console(width=max(Console().width, 100), highlight=False)
    print_tables(done.table, console)
    if not done.table:
        console.print('no test case: give lines `"split": "test"` to measure')
    console.print(f"pack: {done.pack}\nnext: medlore segment --model {done.pack} --image FILE --labels all --modality NAME")
