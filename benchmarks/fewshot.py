"""Few-shot tuning of medlore:vit-mini on five real data sets: stable-rank ranks against their alternatives.

    python -m benchmarks.fewshot rates --out runs/fewshot             learning rates chosen on scikit-learn's digits (optional)
    python -m benchmarks.fewshot run --data DIR --out runs/fewshot    one line of cells.jsonl a finished cell; resumes
    python -m benchmarks.fewshot table --out runs/fewshot             the tables of docs/results.md, and fewshot.json

Every labelled image trains, there is no validation set, the last epoch is kept: nothing is chosen on the sets that are reported.
Cells are run draw by draw, so that a run that is stopped early has whole draws of everything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlore.data.images import read_images
from medlore.data.imageset import ImageSet
from medlore.data.transforms import Flip
from medlore.files import read_json, write_json
from medlore.layers.methods import METHODS
from medlore.recipes.comparison import CONTENDERS, Cell, run_cell, standings
from medlore.recipes.demo import digits
from medlore.recipes.finetune_settings import FinetuneSettings
from medlore.recipes.image_splits import hold_out
from medlore.recipes.run import describe_machine

EPOCHS = {1: 20, 5: 8, 10: 4}  # about as many steps for each number of shots
BATCH = 8
TEST_FRACTION, TEST_IMAGES = 0.4, 200
RATES = {"linear-probe": (3e-3, 1e-2, 3e-2), "full": (3e-5, 1e-4, 3e-4)}  # others: 3e-4, 1e-3, 3e-3
DRAWS, RATE_DRAWS = 5, (101, 102)


@dataclass(frozen=True)
class Source:
    """One data set and how its images may be mirrored."""

    title: str
    file: str
    flip: Flip


SOURCES = {
    "nih": Source("NIH chest X-rays, 14 labels, macro AUC, split by patient", "nih_cxr14_64.npz", "none"),
    "brain": Source("brain MR slices, 4 classes, balanced accuracy", "brain_tumor_4c.zip", "none"),
    "bccd": Source("blood smears (BCCD), presence of 3 cell types, macro AUC", "bccd.zip", "both"),
    "dtd": Source("textures (10 classes of DTD), balanced accuracy", "dtd10.zip", "both"),
    "flowers": Source("flowers, 5 classes, balanced accuracy", "flowers5.zip", "horizontal"),
}


def parts_of(name: str, data: Path) -> tuple[ImageSet, ImageSet]:
    """The pool to draw from, and at most `TEST_IMAGES` test images: the same for every cell."""
    pool, test = hold_out(read_images(data / SOURCES[name].file), TEST_FRACTION, seed=0)
    if len(test) > TEST_IMAGES:
        test = hold_out(test, TEST_IMAGES / len(test), seed=1)[1]
    return pool, test


def settings_for(shots: int, *, flip: Flip, rate: float | None) -> FinetuneSettings:
    """What all methods have in common."""
    return FinetuneSettings(
        epochs=EPOCHS[shots], batch_size=BATCH, flip=flip, learning_rate=rate, device="cpu", precision="fp32", weight_decay=0.05
    )


def choose_rates(out: Path) -> None:
    """The best of three rates for each method: mean of two 5-shot draws of digits, which are not among the reported sets."""
    pool, test = digits(TEST_IMAGES, seed=0)
    tried: dict[str, dict[str, float]] = {}
    for contender in CONTENDERS:
        tried[contender] = {}
        for rate in RATES.get(contender, (3e-4, 1e-3, 3e-3)):
            settings = settings_for(5, flip="none", rate=rate)
            scores = [run_cell(contender, settings, pool=pool, test=test, shots=5, draw=draw).score or 0.0 for draw in RATE_DRAWS]
            tried[contender][f"{rate:g}"] = sum(scores) / len(scores)
            print(f"{contender:15s} {rate:g}  {tried[contender][f'{rate:g}']:.3f}", flush=True)
    chosen = {name: float(max(scores, key=lambda rate: scores[rate])) for name, scores in tried.items()}
    write_json(out / "rates.json", {"chosen": chosen, "tried": tried, "draws": RATE_DRAWS})


def wanted(sets: Sequence[str], shots: Sequence[int], draws: int) -> Iterator[tuple[str, int, int, str]]:
    """All cells, draw by draw."""
    return ((name, k, draw, contender) for draw in range(1, draws + 1) for k in shots for name in sets for contender in CONTENDERS)


def read_rates(out: Path) -> dict[str, Any]:
    """Learning rates by method; without `rates.json` the defaults of the methods."""
    file = out / "rates.json"
    defaults = {name: METHODS[changes["method"]].learning_rate for name, changes in CONTENDERS.items()}
    return dict(read_json(file)) if file.is_file() else {"chosen": defaults, "tried": {}}


def run(out: Path, data: Path, sets: Sequence[str], shots: Sequence[int], draws: int, part: tuple[int, int]) -> None:
    """Every cell that `cells.jsonl` does not hold yet; `part` (i, n) takes each n-th of them, for n runs side by side."""
    rates = read_rates(out)["chosen"]
    done = {(name, cell.shots, cell.draw, cell.contender) for name, cell in read_cells(out)}
    left = [cell for cell in list(wanted(sets, shots, draws))[part[0] - 1 :: part[1]] if cell not in done]
    parts = {name: parts_of(name, data) for name in sets}
    print(f"{len(done)} cells done, {len(left)} left", flush=True)
    begun = time.perf_counter()
    for count, (name, k, draw, contender) in enumerate(left, 1):
        settings = settings_for(k, flip=SOURCES[name].flip, rate=rates[contender])
        pool, test = parts[name]
        cell = run_cell(contender, settings, pool=pool, test=test, shots=k, draw=draw)
        with (out / "cells.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"set": name, **asdict(cell)}) + "\n")
        hours = (time.perf_counter() - begun) / count * (len(left) - count) / 3600
        print(
            f"{name:8s} {k:2d} shots, draw {draw}, {contender:15s} {cell.score:.3f}  {cell.seconds:.0f} s, {hours:.2f} h left", flush=True
        )


def read_cells(out: Path) -> list[tuple[str, Cell]]:
    """Finished cells with their data set."""
    file = out / "cells.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [(record.pop("set"), Cell(**record)) for record in records]


def tables(out: Path) -> str:
    """Markdown: a table for each data set, means and paired differences; whole draws only."""
    cells = read_cells(out)
    lines: list[str] = []
    for name, source in SOURCES.items():
        own = [cell for other, cell in cells if other == name]
        if not own:
            continue
        sizes = {cell.test_images for cell in own}
        lines += ["", f"**{source.title}** ({', '.join(map(str, sizes))} test images)", ""]
        lines += ["| shots | images | method | trained | mean (95 %) | sr-lora minus it (95 %) |", "|---|---|---|---|---|---|"]
        for k in sorted({cell.shots for cell in own}):
            lines += _rows([cell for cell in own if cell.shots == k])
    return "\n".join(lines)


def _rows(cells: list[Cell]) -> list[str]:
    whole = {d for d in {c.draw for c in cells} if {c.contender for c in cells if c.draw == d} == set(CONTENDERS)}
    cells = [cell for cell in cells if cell.draw in whole]
    if not cells:
        return []
    images = sorted({cell.train_images for cell in cells})
    number = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
    rows = []
    for row in standings(cells):
        difference = "" if row.difference is None else str(row.difference)
        mark = " *" if row.difference is not None and row.difference.apart_from_zero else ""
        rows.append(f"| {cells[0].shots} | {number} | {row.contender} | {row.trained:,} | {row.score} | {difference}{mark} |")
    majority = cells[0].majority
    rows.append(
        f"| {cells[0].shots} | 0 | majority | 0 | {'not defined' if majority is None else f'{majority:.3f}'} | {len(whole)} draws |"
    )
    return rows


def report(out: Path, destination: Path | None) -> None:
    """Print the tables; write raw results to `destination`."""
    print(tables(out))
    if destination is not None:
        cells: list[dict[str, Any]] = [{"set": name, **asdict(cell)} for name, cell in read_cells(out)]
        facts = {key: describe_machine()[key] for key in ("versions", "machine")}
        write_json(destination, {"rates": read_rates(out), **facts, "epochs": EPOCHS, "batch_size": BATCH, "cells": cells})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewshot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("rates", "run", "table"), nargs="?", default="table")
    parser.add_argument("--out", type=Path, default=Path("runs/fewshot"), help="folder of rates.json and cells.jsonl")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--shots", nargs="+", type=int, choices=EPOCHS, default=[5, 1, 10], help="in the order in which they are run")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--part", nargs=2, type=int, default=(1, 1), metavar=("I", "N"), help="take each N-th cell, from the I-th")
    parser.add_argument("--json", type=Path, help="with `table`: write all cells to this file")
    given = parser.parse_args()
    if given.step == "rates":
        choose_rates(given.out)
    elif given.step == "table":
        report(given.out, given.json)
    elif given.data is None:
        parser.error("run needs --data")
    else:
        run(given.out, given.data, given.sets, given.shots, given.draws, (given.part[0], given.part[1]))


if __name__ == "__main__":
    main()
