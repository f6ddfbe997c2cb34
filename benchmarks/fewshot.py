"""Few-shot tuning of medlore:vit-mini on five real data sets: stable-rank ranks against their alternatives.

    python -m benchmarks.fewshot rates --out runs/fewshot             learning rates chosen on scikit-learn's digits (optional)
    python -m benchmarks.fewshot run --data DIR --out runs/fewshot    one line of cells.jsonl a finished cell; resumes
    python -m benchmarks.fewshot table --out runs/fewshot             the section of docs/evidence.md, and all cells

Every labelled image trains, there is no validation set, the last epoch is kept: nothing is chosen on the sets that are reported.
Cells are run draw by draw, so that a run that is stopped early has whole draws of everything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medlore.data.images.digits import digits
from medlore.data.images.imageset import ImageSet
from medlore.data.images.reading import read_images
from medlore.data.images.splits import hold_out
from medlore.data.images.words import Flip
from medlore.files import read_json, write_json, write_text
from medlore.layers.tuning.methods import METHODS
from medlore.metrics.draws import DrawMean
from medlore.runs.report import describe_machine
from medlore.tuning.comparison import CONTENDERS, Cell, Standing, run_cell, standings
from medlore.tuning.settings import FinetuneSettings

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
        epochs=EPOCHS[shots], batch_size=BATCH, flip=flip, learning_rate=rate, device="cpu", precision="fp32", weight_decay=0.05,
        start="random", features="own",
    )  # fmt: skip


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


TITLE = "## Few-shot tuning of vit-mini on five real sets"
NAMES = {"sr-lora": "sr-lora", "sr-lora nested": "sr-lora, nested", "lora": "lora, equal size", "rslora": "rslora, equal size",
         "linear-probe": "linear probe", "full": "full"}  # fmt: skip


def whole_draws(cells: Sequence[Cell]) -> dict[int, list[Standing]]:
    """Standings by number of shots, from the draws that all methods have finished."""
    found: dict[int, list[Standing]] = {}
    for k in sorted({cell.shots for cell in cells}):
        own = [cell for cell in cells if cell.shots == k]
        whole = {d for d in {c.draw for c in own} if {c.contender for c in own if c.draw == d} == set(CONTENDERS)}
        if whole:
            found[k] = standings([cell for cell in own if cell.draw in whole])
    return found


def section(out: Path) -> str:
    """The section of docs/evidence.md: protocol, a table for each set, and what the differences say."""
    cells, best = read_cells(out), Counter[str]()
    lines, verdicts = [TITLE, "", *_protocol(out)], []
    for name, source in SOURCES.items():
        own = [cell for other, cell in cells if other == name]
        found = whole_draws(own)
        if not found:
            lines += ["", f"{source.title}: no whole draw was finished."]
            continue
        lines += ["", f"**{source.title}**; {own[0].test_images} test images; majority answer {own[0].majority or 0:.3f}", ""]
        lines += ["| shots (images, draws) | " + " | ".join(NAMES.values()) + " |", "|---" * (len(NAMES) + 1) + "|"]
        for k, table in found.items():
            images = sorted({cell.train_images for cell in own if cell.shots == k and cell.draw <= table[0].score.draws})
            rows = {row.contender: row for row in table}
            best[max(table, key=lambda row: row.score.mean).contender] += 1
            count = f"{images[0]}" if len(images) == 1 else f"{images[0]} to {images[-1]}"
            lines.append(f"| {k} ({count}, {table[0].score.draws}) | " + " | ".join(str(rows[n].score) for n in NAMES) + " |")
            verdicts += [(name, k, row) for row in table if row.difference is not None]
    highest = ", ".join(f"{NAMES[name]} {count}" for name, count in best.most_common())
    return "\n".join([*lines, "", *_verdict(verdicts), f"Highest mean, counted over the rows above: {highest}."]) + "\n"


def _protocol(out: Path) -> list[str]:
    rates = ", ".join(f"{NAMES[name]} {rate:g}" for name, rate in read_rates(out)["chosen"].items())
    epochs = ", ".join(f"{epochs} epochs at {k} shot" + ("s" if k > 1 else "") for k, epochs in EPOCHS.items())
    return [
        "`python -m benchmarks.fewshot run --data DIR --out runs/fewshot`, then",
        "`python -m benchmarks.fewshot table --out runs/fewshot --json docs/results/fewshot.json --page docs/evidence.md`",
        "([raw results](results/fewshot.json)). The shots are all the labels there are: no validation set, the last epoch counts,",
        f"nothing is chosen on these sets. AdamW, batch {BATCH}, {epochs}: short, to fit two busy cores.",
        f"Fixed peak rates, not tuned: {rates}.",
        f"The test part ({100 * TEST_FRACTION:.0f} % of the images, at most {TEST_IMAGES}) is the same for all cells; NIH is split by",
        "patient. Equal size: one rank with about as many parameters as the stable ranks. Mean and 95 % t-interval over draws; a",
        "single draw has no interval. Only draws that every method has finished count. One BCCD image shows several cell types and is",
        "a shot of each; hardly any image lacks red or white cells, so its AUC rests on a handful of images.",
    ]


def _verdict(verdicts: Sequence[tuple[str, int, Standing]]) -> list[str]:
    """How often sr-lora was better or worse than each method, counted where an interval excludes zero."""
    lines = ["| sr-lora against | compared | better | worse | undecided | mean difference |", "|---|---|---|---|---|---|"]
    for name in list(NAMES)[1:]:
        own = [row.difference for _, _, row in verdicts if row.contender == name and row.difference is not None]
        better, worse = (sum(_decided(d) and (d.mean > 0) is up for d in own) for up in (True, False))
        mean = f"{sum(d.mean for d in own) / len(own):+.3f}" if own else ""
        lines.append(f"| {NAMES[name]} | {len(own)} | {better} | {worse} | {len(own) - better - worse} | {mean} |")
    lines += [
        "",
        "One comparison is one set at one number of shots, paired by draw; better and worse only where the 95 % interval of the paired",
    ]
    lines += ["difference of three draws or more excludes zero (of 100 comparisons without any difference, five would)."]
    found = [f"{name} at {k} ({row.difference})" for name, k, row in verdicts if row.contender == "lora" and _decided(row.difference)]
    return [*lines, f"Against uniform ranks of equal size that is the case for: {', '.join(found) or 'none'}."]


def _decided(difference: DrawMean | None) -> bool:
    """Whether an interval of at least three draws excludes zero: two can agree by chance to the last test image."""
    return difference is not None and difference.draws >= 3 and difference.excludes_zero


def report(out: Path, destination: Path | None, page: Path | None) -> None:
    """Print the section, or put it into `page` in place of the old one; write raw results to `destination`."""
    text = section(out)
    if destination is not None:
        cells: list[dict[str, Any]] = [{"set": name, **asdict(cell)} for name, cell in read_cells(out)]
        facts = {key: describe_machine()[key] for key in ("versions", "machine")}
        write_json(destination, {"rates": read_rates(out), **facts, "epochs": EPOCHS, "batch_size": BATCH, "cells": cells})
    if page is None:
        print(text)
        return
    before, _, rest = page.read_text(encoding="utf-8").partition(TITLE)
    after = rest[rest.index("\n## ") :] if "\n## " in rest else ""
    write_text(page, before.rstrip("\n") + "\n\n" + text.rstrip("\n") + "\n" + after)


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
    parser.add_argument("--page", type=Path, help="with `table`: replace the section in this page")
    given = parser.parse_args()
    if given.step == "rates":
        choose_rates(given.out)
    elif given.step == "table":
        report(given.out, given.json, given.page)
    elif given.data is None:
        parser.error("run needs --data")
    else:
        run(given.out, given.data, given.sets, given.shots, given.draws, (given.part[0], given.part[1]))


if __name__ == "__main__":
    main()
