"""Few-shot tuning of a segmenter on five hippocampus cases: stable-rank ranks, one rank of equal cost, scratch.

    python studies/seg_mini_cases.py --data DIR --out runs/seg-mini/cases
    python -m benchmarks.fewshot_segment run --cases runs/seg-mini/cases/hippocampus.jsonl --out runs/fewshot-segment
    python -m benchmarks.fewshot_segment table --out runs/fewshot-segment --page docs/evidence.md

Five training patients a draw come from the list's validation part, the test patients are its test part: a pack that was trained
on the training part has seen neither. It has seen other hippocampi, however. So everything is run twice: `known` asks under
the labels that the pack knows, `renamed` under new names, whose prompts start at random as those of a new structure would.

One line of cells.jsonl a finished cell, draw by draw; a run that is stopped goes on. Nothing is chosen on the test patients: the last
step is kept, and steps, rates and ranks are the defaults of `medlore finetune`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._page import put_section
from medlore.data.volumes.cases import read_cases
from medlore.decomposing.segmenters.few_shot import FewShotSettings, tune_segmenter
from medlore.files import write_text
from medlore.metrics.draws import mean_of_draws
from medlore.runs.hardware import choose_device
from medlore.runs.report import describe_machine
from medlore.runs.settings_file import check_settings

SHOTS, DRAWS = 5, 3
METHODS = ("sr-lora", "lora", "scratch", "full")
NAMES = {"hippocampus": "structure a", "anterior hippocampus": "structure b", "posterior hippocampus": "structure c"}
HEADING = "## Five masks: few-shot tuning of a segmenter"


def lists_of(cases: Path, draw: int, *, renamed: bool) -> list[dict[str, Any]]:
    """The lines of one draw: five patients to train on, all test patients."""
    lines = [c.to_dict() for c in read_cases(cases)]
    pool = [line for line in lines if line["split"] == "validation"]
    chosen = np.random.default_rng([2026, draw]).choice(len(pool), SHOTS, replace=False)
    kept = [pool[i] | {"split": "train"} for i in sorted(chosen)] + [line for line in lines if line["split"] == "test"]
    return [_renamed(line) if renamed else line for line in kept]


def _renamed(line: Mapping[str, Any]) -> dict[str, Any]:
    values = {NAMES.get(label, label): codes for label, codes in line["mask_values"].items()}
    return {**line, "label": list(values), "mask_values": values}


def cells(draws: int, methods: Sequence[str]) -> Iterator[tuple[int, bool, str]]:
    """Draw, whether labels are renamed, method."""
    yield from ((draw, renamed, method) for draw in range(1, draws + 1) for renamed in (False, True) for method in methods)


def run(arguments: argparse.Namespace) -> None:
    """All cells that are not in `cells.jsonl`."""
    out, device = Path(arguments.out), choose_device("auto")
    file = out / "cells.jsonl"
    done = _read(file)
    for draw, renamed, method in cells(arguments.draws, arguments.methods):
        if any((c["draw"], c["renamed"], c["method"], c["steps"]) == (draw, renamed, method, arguments.steps) for c in done):
            continue
        name = f"draw-{draw}-{'renamed' if renamed else 'known'}"
        listed = write_text(
            out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lists_of(arguments.cases, draw, renamed=renamed))
        )
        values = {
            "model": arguments.model, "cases": listed, "method": method, "steps": arguments.steps, "rank": arguments.rank, "seed": draw,
            "region": "brain", "patch_size": (48, 48, 48), "precision": arguments.precision, "device": device,
        }  # fmt: skip
        result = tune_segmenter(check_settings(FewShotSettings, values, where="cell"), out / name / method)
        record = {"draw": draw, "renamed": renamed, "method": method, "steps": arguments.steps, "model": str(arguments.model)}
        record |= {"trainable": result.trainable, "factors": result.plan.parameters if result.plan else None, "rows": result.table}
        done.append(record)
        write_text(file, "".join(json.dumps(cell) + "\n" for cell in done))
        sys.stderr.write(f"{name} {method}: {_mean(record, method):.3f}\n")


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _mean(cell: Mapping[str, Any], network: str) -> float:
    """Mean Dice over labels; NaN where that network was not measured."""
    found = [row["dice"] for row in cell["rows"] if row["network"] == network]
    return sum(found) / len(found) if found else float("nan")


def section(done: Sequence[Mapping[str, Any]], command: str) -> str:
    """The section of docs/evidence.md."""
    draws = sorted({cell["draw"] for cell in done})
    cores = describe_machine()["machine"]["cores"]
    lines = [
        HEADING,
        "",
        f"Hippocampus MR (three labels), {SHOTS} training patients a draw, {len(draws)} draws, one set of test patients. Mean Dice over",
        f"labels (95 % interval over draws), on the network's grid. {done[0]['steps']} steps, model {done[0]['model']}, {cores} cores.",
        "`known`: the pack has seen these labels on other patients. `renamed`: new names, prompts start at random.",
        "",
        f"    {command}",
        "",
        "| labels | method | numbers trained | Dice | against lora |",
        "|---|---|---|---|---|",
    ]
    for renamed in (False, True):
        part = [cell for cell in done if cell["renamed"] is renamed]
        label = "renamed" if renamed else "known"
        before = [cell for cell in part if any(row["network"] == "before" for row in cell["rows"])]
        if before:
            lines.append(f"| {label} | as it is, untuned | 0 | {_mean(before[0], 'before'):.3f} | |")
        for method in METHODS:
            own = {cell["draw"]: cell for cell in part if cell["method"] == method}
            if own:
                dice = mean_of_draws([_mean(cell, method) for cell in own.values()])
                lines.append(f"| {label} | {method} | {next(iter(own.values()))['trainable']:,} | {dice} | {_against(own, part, method)} |")
    return "\n".join([*lines, ""])


def _against(own: Mapping[int, Mapping[str, Any]], part: Sequence[Mapping[str, Any]], method: str) -> str:
    """Difference to uniform ranks on the same draws; nothing is called a difference whose interval holds zero."""
    base = {cell["draw"]: _mean(cell, "lora") for cell in part if cell["method"] == "lora"}
    paired = [_mean(cell, method) - base[draw] for draw, cell in own.items() if draw in base]
    if method == "lora" or not paired:
        return ""
    found = mean_of_draws(paired)
    return f"{found}" + ("" if found.excludes_zero else ", no difference shown")


def table(arguments: argparse.Namespace) -> None:
    """Print the section, or put it into a page in place of the old one."""
    done = _read(Path(arguments.out) / "cells.jsonl")
    if not done:
        sys.exit(f"{arguments.out}/cells.jsonl: no finished cell; run `python -m benchmarks.fewshot_segment run` first")
    command = "python -m benchmarks.fewshot_segment run --cases runs/seg-mini/cases/hippocampus.jsonl --out runs/fewshot-segment"
    command += f" --steps {done[0]['steps']} --draws {max(cell['draw'] for cell in done)}"
    text = section(done, command)
    if arguments.page is None:
        sys.stdout.write(text)
        return
    put_section(arguments.page, text)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("--cases", type=Path, required=True, help="hippocampus.jsonl of studies/seg_mini_cases.py")
    runs.add_argument("--model", default="medlore:seg-mini")
    runs.add_argument("--steps", type=int, default=300)
    runs.add_argument("--rank", type=int, default=4)
    runs.add_argument("--draws", type=int, default=DRAWS)
    runs.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:3])
    runs.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    tables = verbs.add_parser("table")
    tables.add_argument("--page", type=Path)
    for verb in (runs, tables):
        verb.add_argument("--out", type=Path, default=Path("runs/fewshot-segment"))
    arguments = parser.parse_args(argv)
    (run if arguments.verb == "run" else table)(arguments)


if __name__ == "__main__":
    main()
