"""The prior of the probe's strength and of the features that it reads, from the development tasks.

    python -m maintenance.recipe_probes DATA CACHE --network vit-mini=medlore:vit-mini@64 --network dinov2-s=FOLDER@70 --json OUT.json

For every network, task, number of shots and draw: the score and the mean log-likelihood of the test images at every strength (the
network's own reading), the strength that the shots choose, and for every block and reading what cross-validation says and what the
test images say. Features come from `maintenance.recipe_features`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maintenance.development_sets import TASKS
from maintenance.recipe_features import DRAWS, Kept, drawn, features_of, used_pool
from medlore.data.images.imageset import ImageSet
from medlore.files import read_json, write_json
from medlore.metrics.ranking import macro_auc
from medlore.models.backbones.cutting import READINGS, read_as
from medlore.tuning.probe import STRENGTHS, choose_strength, fit_probe, log_likelihood, usual_strengths

SHOTS = (1, 5, 10)
OWN = {"vit-mini": "cls", "dinov2-s": "both"}


def score(logits: NDArray[np.float64], test: ImageSet) -> float:
    """Balanced accuracy, or macro AUC for several labels an image."""
    targets = test.targets()
    if test.task == "multi":
        return float(macro_auc(targets, logits))
    right = logits.argmax(1) == targets
    return float(np.mean([right[targets == label].mean() for label in np.unique(targets)]))


def cell(kept: Kept, own: str, shots: int, draw: int) -> dict[str, Any]:
    """One draw: strengths of the network's own reading, then every block and reading."""
    images = drawn(kept.pool, shots, draw)
    place = {key: row for row, key in enumerate(used_pool(kept.pool).keys)}
    rows = [place[key] for key in images.keys if key in place]  # few shots of several labels need not be among many
    images = images.subset([i for i, key in enumerate(images.keys) if key in place])
    test = kept.features[len(place) :]
    targets, judges = images.targets(), kept.test.targets()
    how: dict[str, Any] = {"classes": len(images.classes), "task": images.task}
    groups = images.groups if any(images.groups) else None

    def read(values: NDArray[np.float32], block: int, reading: Any) -> NDArray[np.float32]:
        return read_as(torch.from_numpy(values[:, block]), reading).numpy()

    near, far = (read(part, -1, own) for part in (kept.features[rows], test))
    by_strength = {}
    for strength in STRENGTHS:
        logits = fit_probe(near, targets, strength=strength, **how).logits(far)
        by_strength[f"{strength:.3g}"] = [score(logits, kept.test), log_likelihood(logits, judges, images.task) / len(judges)]
    chosen = choose_strength(near, targets, groups=groups, repeats=2, **how)
    cuts = {}
    for block, number in enumerate(kept.blocks):
        for reading in READINGS:
            near, far = (read(part, block, reading) for part in (kept.features[rows], test))
            choice = choose_strength(near, targets, groups=groups, repeats=1, strengths=usual_strengths(near.shape[1]), **how)
            logits = fit_probe(near, targets, strength=choice.strength, **how).logits(far)
            cuts[f"{number} {reading}"] = [
                choice.value,
                score(logits, kept.test),
                log_likelihood(logits, judges, images.task) / len(judges),
            ]
    return {"images": len(rows), "strengths": by_strength, "chosen": chosen.strength, "cuts": cuts}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--network", action="append", required=True, metavar="NAME=SOURCE@SIZE")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--json", type=Path, required=True, help="where cells go; those that it holds already are not measured again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: dict[str, Any] = dict(read_json(given.json)) if given.json.is_file() else {}
    wanted = [
        (network, task, shots, draw)
        for draw in range(1, given.draws + 1)
        for shots in given.shots
        for network in given.network
        for task in TASKS
    ]
    for network, task, shots, draw in wanted:
        title = network.partition("=")[0]
        key = f"{title}, {task}, {shots} shots, draw {draw}"
        if key in cells:
            continue
        begun = time.perf_counter()
        cells[key] = cell(features_of(network, task, given.data, given.cache), OWN[title], shots, draw)
        write_json(given.json, cells)
        sys.stdout.write(f"{key}: {time.perf_counter() - begun:.0f} s\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
