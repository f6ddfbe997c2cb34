"""Probes of several views of each image, on the development tasks: several to train on, and mirrored ones to judge with.

    python -m maintenance.recipe_views DATA CACHE --network vit-mini=medlore:vit-mini@64 --network dinov2-s=FOLDER@70 --json OUT.json

Every cell is one draw: the score and the mean log-likelihood of the test images for each way of making the probe. All ways share the
strength that the plain images choose; with v views of an image each counts as a v-th of it. Features are the network's own ones, and
those that `--features auto` reads. `maintenance.recipe_features` makes the cache that this one stands on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from maintenance.development_sets import TASKS
from maintenance.recipe_features import DRAWS, Kept, drawn, features_of, used_pool
from maintenance.recipe_probes import OWN, SHOTS, score
from medlore.data.images.transforms import Preprocessing, TrainAugmentation, decode, normalise
from medlore.files import read_json, write_json
from medlore.models.backbones.cutting import READINGS, block_features, read_as
from medlore.models.backbones.reading import Backbone, load_backbone
from medlore.tuning.examples import preprocessing_of
from medlore.tuning.probe import choose_strength, fit_probe, log_likelihood, usual_strengths
from medlore.tuning.probing import DEEPEST, OTHER_READING

VIEWS = 4
# Left and right carry no meaning in these (a slice of one hippocampus mirrored is one of the other).
MIRRORED = ("MedNIST", "natural", "hippocampus", "heart levels")
# As tuning augments by default; half as far.
AUGMENTATIONS: dict[str, dict[str, Any]] = {"augmented": {}, "gently": {"crop": (0.8, 1.0), "degrees": 5.0, "light": 0.05}}


@dataclass(frozen=True, eq=False)
class Views:
    """Features of the views, n blocks 2d each.

    Attributes:
        training: name -> of the views of the pool, one after another.
        mirrored: of the pool and the test images, mirrored.
    """

    training: dict[str, list[NDArray[np.float32]]]
    mirrored: NDArray[np.float32]


def views_of(network: str, task: str, kept: Kept, cache: Path) -> Views:
    """Read from the cache, or made and kept there."""
    title, _, place = network.partition("=")
    source, _, size = place.partition("@")
    file = cache / f"{title}-{task.replace(' ', '-')}-views.npz"
    if not file.is_file():
        backbone = load_backbone(source, classes=2, image_size=int(size))
        preprocessing = preprocessing_of(backbone)
        pool, test = (decode(part.items, preprocessing) for part in (used_pool(kept.pool), kept.test))
        made = {
            f"{name} {view}": _features(backbone, pool, kept.blocks, preprocessing, TrainAugmentation(preprocessing, seed=view, **changes))
            for name, changes in AUGMENTATIONS.items()
            for view in range(VIEWS)
        }
        np.savez(file, mirrored=_features(backbone, torch.cat([pool, test]).flip(-1), kept.blocks, preprocessing, None), **made)
    with np.load(file) as found:
        return Views({name: [found[f"{name} {view}"] for view in range(VIEWS)] for name in AUGMENTATIONS}, found["mirrored"])


def _features(
    backbone: Backbone, images: torch.Tensor, blocks: tuple[int, ...], preprocessing: Preprocessing, change: TrainAugmentation | None
) -> NDArray[np.float32]:
    parts = [normalise(part, preprocessing) if change is None else change(part, step=step) for step, part in enumerate(images.split(32))]
    return np.concatenate([block_features(backbone, part, blocks).numpy() for part in parts])


def cell(kept: Kept, views: Views, own: Literal["cls", "mean", "both"], task: str, shots: int, draw: int) -> dict[str, Any]:
    """One draw: every way, with the network's own features and with those that the shots choose."""
    images = drawn(kept.pool, shots, draw)
    place = {key: row for row, key in enumerate(used_pool(kept.pool).keys)}
    rows = [place[key] for key in images.keys if key in place]
    images = images.subset([i for i, key in enumerate(images.keys) if key in place])
    targets, judges, count = images.targets(), kept.test.targets(), len(place)
    how: dict[str, Any] = {"classes": len(images.classes), "task": images.task}
    groups = images.groups if any(images.groups) else None

    def at(values: NDArray[np.float32], block: int, reading: Any) -> NDArray[np.float32]:
        return read_as(torch.from_numpy(values[:, block]), reading).numpy()

    def choice(block: int, reading: Any) -> Any:
        near = at(kept.features[rows], block, reading)
        return choose_strength(near, targets, groups=groups, repeats=2, strengths=usual_strengths(near.shape[1]), **how)

    last = len(kept.blocks) - 1
    chosen = {(block, reading): choice(block, reading) for block in range(max(0, last + 1 - DEEPEST), last + 1) for reading in READINGS}
    best = max(chosen, key=lambda cut: chosen[cut].value - OTHER_READING * (cut[1] != own))
    if not chosen[best].folds:
        best = (last, own)

    def ways(block: int, reading: Any) -> dict[str, list[float]]:
        def said(near: list[NDArray[np.float32]], far: list[NDArray[np.float32]]) -> list[float]:
            stacked = np.concatenate([at(part, block, reading) for part in near])
            probe = fit_probe(stacked, np.concatenate([targets] * len(near)), strength=chosen[block, reading].strength / len(near), **how)
            logits = np.mean([probe.logits(at(part, block, reading)) for part in far], axis=0)
            return [score(logits, kept.test), log_likelihood(logits, judges, images.task) / len(judges)]

        plain, test, mirror = kept.features[rows], kept.features[count:], views.mirrored[count:]
        found = {"plain": said([plain], [test])}
        found |= {name: said([plain, *(view[rows] for view in parts)], [test]) for name, parts in views.training.items()}
        if task in MIRRORED:
            found["mirrored test"] = said([plain], [test, mirror])
            found["mirrored training"] = said([plain, views.mirrored[rows]], [test])
            found["mirrored both"] = said([plain, views.mirrored[rows]], [test, mirror])
        return found

    return {"own": ways(last, own), "auto": ways(*best), "cut": f"{kept.blocks[best[0]]} {best[1]}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--network", action="append", required=True, metavar="NAME=SOURCE@SIZE")
    parser.add_argument("--json", type=Path, required=True, help="where cells go; those that it holds already are not measured again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: dict[str, Any] = dict(read_json(given.json)) if given.json.is_file() else {}
    for network in given.network:
        for task in TASKS:
            begun, title = time.perf_counter(), network.partition("=")[0]
            kept = features_of(network, task, given.data, given.cache)
            views = views_of(network, task, kept, given.cache)
            for shots in SHOTS:
                for draw in range(1, DRAWS + 1):
                    key = f"{title}, {task}, {shots} shots, draw {draw}"
                    cells.setdefault(key, None)
                    cells[key] = cells[key] or cell(kept, views, OWN[title], task, shots, draw)
            write_json(given.json, cells)
            sys.stdout.write(f"{title}, {task}: {time.perf_counter() - begun:.0f} s\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
