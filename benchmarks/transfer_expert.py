"""A decomposed classifier in docs/evidence.md: the table of its study, and the transfer of one expert to data that nothing has seen.

    python -m benchmarks.transfer_expert study --decomposed runs/cls-mini [--page docs/evidence.md]
    python -m benchmarks.transfer_expert run   --decomposed runs/cls-mini --data brain_tumor_4c.zip --out runs/transfer
    python -m benchmarks.transfer_expert table --decomposed runs/cls-mini --data brain_tumor_4c.zip --out runs/transfer [--page ...]

`run` adds one line of cells.jsonl a finished cell, draw by draw, and goes on where it was stopped. The exported expert, the shared base
and the teacher are tuned on the same shots with the same seeds; all shots train, the last epoch counts, nothing is chosen on test images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._page import put_section
from medlore.data.images.reading import read_images
from medlore.data.images.splits import hold_out
from medlore.decomposing.classifiers.export import BASE, export_classifier
from medlore.decomposing.classifiers.report import headline
from medlore.files import read_json
from medlore.metrics.draws import mean_difference, mean_of_draws
from medlore.tuning.comparison import CONTENDERS, Cell, run_cell
from medlore.tuning.settings import FinetuneSettings

STUDY_TITLE = "## A classifier decomposed into four experts"
TRANSFER_TITLE = "## Transfer of one expert"
TEST_FRACTION, TEST_IMAGES = 0.2, 400


def backbones(decomposed: Path, expert: str, out: Path) -> dict[str, Path]:
    """The three networks as folders; expert and shared base are exported from the pack."""
    found = {"teacher": decomposed / "teacher", "shared base": out / "backbones" / BASE, f"expert {expert}": out / "backbones" / expert}
    for name, folder in ((BASE, found["shared base"]), (expert, found[f"expert {expert}"])):
        export_classifier(decomposed / "pack", name, "safetensors", folder)
    return found


def read_cells(out: Path) -> list[dict[str, Any]]:
    """Finished cells."""
    file = out / "cells.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def run(options: argparse.Namespace) -> None:
    """Every cell that is not there yet."""
    options.out.mkdir(parents=True, exist_ok=True)
    pool, test = hold_out(read_images(options.data), TEST_FRACTION, seed=0)
    if len(test) > TEST_IMAGES:
        test = hold_out(test, TEST_IMAGES / len(test), seed=1)[1]
    networks = backbones(options.decomposed, options.expert, options.out)
    packed = read_json(options.decomposed / "pack" / "manifest.json")["files"]
    done = {(c["backbone"], c["contender"], c["draw"]) for c in read_cells(options.out) if c["pack"] == packed}
    for draw in range(1, options.draws + 1):
        for method in options.methods:
            for name, folder in networks.items():
                if (name, method, draw) in done:
                    continue
                settings = FinetuneSettings(
                    model=str(folder), epochs=options.epochs, batch_size=8, targets="conv", device="cpu", start="random"
                )
                cell = run_cell(method, settings, pool=pool, test=test, shots=options.shots, draw=draw)
                record = {"backbone": name, "pack": packed, "data": options.data.name, "epochs": options.epochs, **asdict(cell)}
                with (options.out / "cells.jsonl").open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
                print(f"draw {draw}, {method:12s} {name:20s} {cell.score:.3f}  {cell.seconds:.0f} s", flush=True)


def transfer_section(options: argparse.Namespace) -> str:
    """Means over draws, and the expert against each of the others, paired by draw."""
    packed = read_json(options.decomposed / "pack" / "manifest.json")["files"]
    records = [c for c in read_cells(options.out) if c["pack"] == packed and c["data"] == options.data.name]
    if not records:
        return f"{TRANSFER_TITLE}\n\nNo cell was finished.\n"
    names = list(dict.fromkeys(c["backbone"] for c in records))
    first = Cell(**{k: v for k, v in records[0].items() if k not in ("backbone", "pack", "data", "epochs")})
    where = f"--decomposed {options.decomposed} --data {options.data.name} --out {options.out}"
    lines = [
        TRANSFER_TITLE,
        "",
        f"`python -m benchmarks.transfer_expert run {where}`, then `table` in place of `run` with `--page docs/evidence.md`.",
        f"{options.data.name}, which no network has seen: {first.shots} shots a class ({first.train_images} images),",
        f"{first.test_images} test images, {records[0]['epochs']} epochs of batch 8 at each method's default rate;",
        f"{first.measure.replace('_', ' ')}, majority answer {first.majority or 0:.3f}.",
        "Mean and 95 % t-interval over draws; differences are paired by draw; * where the interval excludes zero.",
        "",
        "| method (draws) | " + " | ".join(names) + " | expert minus shared base | expert minus teacher |",
        "|---" * (len(names) + 3) + "|",
    ]
    for method in dict.fromkeys(c["contender"] for c in records):
        scores = {n: {c["draw"]: c["score"] for c in records if (c["backbone"], c["contender"]) == (n, method)} for n in names}
        draws = sorted(set.intersection(*(set(own) for own in scores.values())))
        if draws:
            lines.append(f"| {method} ({len(draws)}) | " + " | ".join(_row(scores, draws, options.expert)) + " |")
    return "\n".join(lines) + "\n"


def _row(scores: dict[str, dict[int, float]], draws: Sequence[int], expert: str) -> list[str]:
    values = {name: [own[draw] for draw in draws] for name, own in scores.items()}
    cells = [str(mean_of_draws(own)) for own in values.values()]
    for other in ("shared base", "teacher"):
        difference = mean_difference(values[f"expert {expert}"], values[other])
        cells.append(f"{difference}{' *' if difference.excludes_zero else ''}")
    return cells


def study_section(decomposed: Path) -> str:
    """The table of a finished study, from its report alone."""
    report = read_json(decomposed / "report.json")
    settings, rows = report["settings"], report["results"]["table"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    marks = {row["task"]: " (AUC)" for row in rows if row["network"] != "majority" and headline(row)[0] == "macro_auc"}
    loss, ranks = settings["loss"], settings["ranks"]
    sizes = "; ".join(f"{name}: {part['train']} training, {part['test']} test images" for name, part in report["results"]["tasks"].items())
    lines = [
        STUDY_TITLE,
        "",
        f"`medlore decompose studies/{settings['name']}.yaml --out {decomposed}`, then",
        f"`python -m benchmarks.transfer_expert study --decomposed {decomposed} --page docs/evidence.md`.",
        f"{_teacher(settings['teacher'])}; students {settings['student']['kind']}, {settings['steps']} steps of {settings['batch_size']}",
        f"images of {settings['image_size']} pixels, {settings['precision']}; ranks {ranks['rule']}, mean {ranks['rank']};",
        f"loss beta {loss['beta']}, T {loss['temperature']}, feature {loss['feature']}; seed {settings['seed']}. {sizes}.",
        "Balanced accuracy, or macro AUC where marked, on the test parts with 95 % bootstrap intervals (by patient where known).",
        "One seed: they say nothing of another training.",
        "",
        "| network | " + " | ".join(task + marks.get(task, "") for task in tasks) + " | deployed | stored | MFLOP |",
        "|---" * (len(tasks) + 4) + "|",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = {row["task"]: row for row in rows if row["network"] == network}
        costs = [
            f"{mine[tasks[0]][k]:,}" if k in mine[tasks[0]] else "" for k in ("deployed_parameters", "stored_parameters", "mega_flops")
        ]
        lines.append(f"| {network} | " + " | ".join([*(_cell(headline(mine[task])[1]) for task in tasks), *costs]) + " |")
    return "\n".join(lines) + "\n"


def _teacher(settings: dict[str, Any] | None) -> str:
    return "No teacher" if settings is None else f"Teacher {settings['source']}, {settings['steps']} steps"


def _cell(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    low, high = value.get("low"), value.get("high")
    return f"{value['value']:.3f}" + ("" if low is None or high is None else f" ({low:.3f} to {high:.3f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_expert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("study", "run", "table"), nargs="?", default="study")
    parser.add_argument("--decomposed", type=Path, default=Path("runs/cls-mini"), help="folder that `medlore decompose` wrote")
    parser.add_argument("--data", type=Path, help="a labelled set that the study has not seen")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--expert", default="pneumonia")
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=["linear-probe", "full"])
    parser.add_argument("--page", type=Path, help="put the section into this page; without, it is printed")
    options = parser.parse_args(arguments)
    if options.step != "study" and options.data is None:
        parser.error(f"{options.step} needs --data")
    if options.step == "run":
        run(options)
        return
    text = study_section(options.decomposed) if options.step == "study" else transfer_section(options)
    if options.page is None:
        print(text)
    else:
        put_section(options.page, text)


if __name__ == "__main__":
    main()
