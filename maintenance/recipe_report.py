"""The frozen recipe on seven sets on which nothing of it was chosen, beside what costs nothing.

    python -m maintenance.recipe_report DATA --network vit-mini=medlore:vit-mini@64 --network dinov2-s=FOLDER@70 --json OUT.json
    python -m maintenance.recipe_report --table OUT.json

Every cell is one set, number of shots and draw. All ways learn from the same labels, and nothing is held out:

class token   a logistic regression on the class token behind the last block
own           the same on what the network's own head reads (of DINOv2 the class token and the mean of the patches)
auto          on the features that the shots choose
probe         the same, from four changed views of each image too: `medlore finetune --method linear-probe`
finetune      `medlore finetune` at its defaults, trained from that probe on; only with --tuned

Whole persons, patients or lesions are on one side; at most 200 images judge. Cells come draw by draw, so a run that is stopped early has
whole draws of everything.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maintenance.labelled_sets import REPORTING, read_set
from maintenance.recipe_probes import score
from medlore.data.images.fewshot import draw_shots
from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.splits import hold_out
from medlore.files import read_json, write_json
from medlore.metrics.draws import mean_of_draws
from medlore.models.backbones.reading import Backbone
from medlore.models.backbones.store import BackboneStore
from medlore.training.accelerator import make_accelerator
from medlore.tuning.finetune import finetune
from medlore.tuning.preparing import Workshop, load_backbone_of
from medlore.tuning.probing import Reading, choose_reading, probe_of
from medlore.tuning.settings import FinetuneSettings

SETS = (*REPORTING, "blood")
SHOTS = (1, 5, 10)
MOST_TEST = 200
WAYS: dict[str, dict[str, Any]] = {
    "class token": {"features": "cls", "probe_views": 0},
    "own": {"features": "own", "probe_views": 0},
    "auto": {"probe_views": 0},
    "probe": {},
}


def reporting_task(name: str, folder: Path, size: int) -> tuple[ImageSet, ImageSet]:
    """The images that shots are drawn from, and those that judge."""
    found = read_set(name, folder, size)
    images = from_arrays(list(found.images), found.labels, classes=list(found.classes), name=name, groups=list(found.groups))
    pool, test = hold_out(images, 0.5, seed=0)
    kept = np.sort(np.random.default_rng(0).permutation(len(test))[:MOST_TEST])
    return pool, test.subset([int(i) for i in kept])


def probes(settings: FinetuneSettings, train: ImageSet, test: ImageSet, workshop: Workshop, frozen: Backbone) -> dict[str, Any]:
    """Score of every way that trains no network."""
    found: dict[str, Any] = {}
    readings: dict[str, Reading] = {}  # the choice looks at no views
    for name, changes in WAYS.items():
        own = settings.changed(**changes)
        wanted = own.probing.features
        if wanted not in readings:
            readings[wanted] = choose_reading(own, frozen, train, workshop.features, workshop.accelerator)
        reading = readings[wanted]
        probe = probe_of(own, frozen, reading.cut, train, workshop.features, workshop.accelerator)
        features = workshop.features.read(frozen, test, reading.cut, accelerator=workshop.accelerator)
        found[name] = score(probe.probe.logits(features), test)
        found["read"] = str(reading.cut)
    return found


def tuned(settings: FinetuneSettings, train: ImageSet, test: ImageSet, workshop: Workshop) -> dict[str, Any]:
    """Score of a whole run at its defaults."""
    begun = time.perf_counter()
    found = finetune(settings, train=train, test=test, backbones=workshop.backbones)
    seconds = round(time.perf_counter() - begun, 1)
    return {"finetune": found.metrics[found.report["probe"]["measure"]], "finetune_seconds": seconds}


def table(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Means over draws of each set, and of all sets; differences are paired by cell."""
    heads = ("network, shots", "set", "cells", *WAYS, "probe minus class token", "probe minus own", "finetune minus probe")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    keys = [key.split(", ") for key in cells]
    for network, shots in sorted({(key[0], key[2]) for key in keys}, key=lambda pair: (pair[0], int(pair[1].split()[0]))):
        own = {name: cell for name, cell in cells.items() if name.startswith(f"{network}, ") and f", {shots}, " in name}
        for title in (*SETS, ""):
            chosen = [cell for name, cell in own.items() if not title or name.split(", ")[1] == title]
            if chosen:
                lines.append(_line(f"{network}, {shots.split()[0]}", title or "**all**", chosen))
    return "\n".join(lines)


def _line(lead: str, title: str, chosen: Sequence[Mapping[str, Any]]) -> str:
    means = " | ".join(f"{np.mean([cell[way] for cell in chosen]):.3f}" for way in WAYS)
    against = " | ".join(str(mean_of_draws([cell["probe"] - cell[way] for cell in chosen])) for way in ("class token", "own"))
    both = [cell["finetune"] - cell["probe"] for cell in chosen if cell.get("finetune") is not None]
    last = f"{mean_of_draws(both)}, {len(both)} cells" if both else ""
    return f"| {lead} | {title} | {len(chosen)} | {means} | {against} | {last} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--network", action="append", default=[], metavar="NAME=SOURCE@SIZE")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--tuned", action="store_true", help="train, too")
    parser.add_argument("--json", type=Path, help="where cells go; those that it holds already are not measured again")
    parser.add_argument("--table", type=Path, help="print the table of these cells")
    given = parser.parse_args(arguments)
    if given.table:
        sys.stdout.write(table(read_json(given.table)) + "\n")
        return 0
    torch.set_num_threads(1)
    cells: dict[str, Any] = dict(read_json(given.json)) if given.json.is_file() else {}
    workshop = Workshop(make_accelerator("cpu", "fp32", None), BackboneStore())
    for draw, network, name, shots in itertools.product(range(1, given.draws + 1), given.network, given.sets, given.shots):
        title, _, place = network.partition("=")
        source, _, size = place.partition("@")
        key = f"{title}, {name}, {shots} shots, draw {draw}"
        kept = cells.get(key, {})
        if kept and ("finetune" in kept or not given.tuned):
            continue
        pool, test = workshop.backbones.memory.setdefault((name, size), None) or reporting_task(name, given.data, int(size))
        workshop.backbones.memory[name, size] = pool, test
        train = draw_shots(pool, shots=shots, draw=draw, allow_fewer=True).train
        if len(train) < 2:  # one image may have all labels
            sys.stdout.write(f"{key}: one image, from which nothing can be learnt\n")
            continue
        settings = FinetuneSettings(
            model=source, image_size=int(size), method="linear-probe", device="cpu", precision="fp32", bootstrap=0, seed=draw
        )
        begun = time.perf_counter()
        if given.tuned:
            kept = kept | tuned(settings.changed(method="sr-lora"), train, test, workshop)
        if "probe" not in kept:
            frozen = load_backbone_of(settings, workshop, classes=len(train.classes))
            kept = kept | {"images": len(train)} | probes(settings, train, test, workshop, frozen)
        cells[key] = kept
        write_json(given.json, cells)
        sys.stdout.write(f"{key}: {cells[key]} ({time.perf_counter() - begun:.0f} s)\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
