"""Frozen features of the development tasks, block by block, kept in a folder: what the sweeps of the probe read.

python -m maintenance.recipe_features DATA CACHE --network vit-mini=medlore:vit-mini@64 --network dinov2-s=FOLDER@70
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from maintenance.development_sets import TASKS, development_task
from medlore.data.images.fewshot import draw_shots
from medlore.data.images.imageset import ImageSet
from medlore.data.images.transforms import eval_batch
from medlore.models.backbones.cutting import block_features, own_cut
from medlore.models.backbones.reading import load_backbone
from medlore.tuning.examples import preprocessing_of

DRAWS, MOST_SHOTS, MOST_TEST = 3, 10, 200
DEEPEST = 5  # blocks from the end that are looked at


@dataclass(frozen=True, eq=False)
class Kept:
    """Features of one task and one network.

    Attributes:
        blocks: numbers of the blocks.
        features: n blocks 2d, float32; rows of the pool, then of the test images.
        pool: the images that shots are drawn from.
        test: the images that judge.
    """

    blocks: tuple[int, ...]
    features: NDArray[np.float32]
    pool: ImageSet
    test: ImageSet


def used_pool(pool: ImageSet) -> ImageSet:
    """The images of all draws, and no others."""
    wanted: set[str] = set()
    for draw in range(1, DRAWS + 1):
        wanted |= set(draw_shots(pool, shots=MOST_SHOTS, draw=draw, allow_fewer=True).train.keys)
    return pool.subset([i for i, item in enumerate(pool.items) if item.key in wanted])


def drawn(pool: ImageSet, shots: int, draw: int) -> ImageSet:
    """The shots of a draw, from the whole pool of a task."""
    return draw_shots(pool, shots=shots, draw=draw, allow_fewer=True).train


def features_of(network: str, task: str, data: Path, cache: Path) -> Kept:
    """Read from the cache, or made and kept there."""
    title, _, place = network.partition("=")
    source, _, size = place.partition("@")
    pool, test = development_task(task, data, most=MOST_TEST)
    used = used_pool(pool)
    file = cache / f"{title}-{task.replace(' ', '-')}.npz"
    if not file.is_file():
        backbone = load_backbone(source, classes=2, image_size=int(size))
        own = own_cut(backbone)
        if own is None:
            raise SystemExit(f"{source}: cannot be read otherwise")
        blocks, preprocessing = tuple(range(max(1, own.block - DEEPEST + 1), own.block + 1)), preprocessing_of(backbone)
        items = [*used.items, *test.items]
        parts = [items[start : start + 32] for start in range(0, len(items), 32)]
        rows = [block_features(backbone, eval_batch(part, preprocessing), blocks).numpy() for part in parts]
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=np.concatenate(rows), blocks=np.array(blocks))
    with np.load(file) as found:
        return Kept(tuple(int(b) for b in found["blocks"]), found["features"], pool, test)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--network", action="append", required=True, metavar="NAME=SOURCE@SIZE")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for network in given.network:
        for task in TASKS:
            found = features_of(network, task, given.data, given.cache)
            sys.stdout.write(f"{network} {task}: {found.features.shape}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
