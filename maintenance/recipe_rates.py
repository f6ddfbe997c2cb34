"""Rates and length of a tuning that starts at the probe, from the development tasks.

    python -m maintenance.recipe_rates DATA --network vit-mini=medlore:vit-mini@64 --json OUT.json

Each cell is one training on all shots, judged once on the test images of its task, beside the probe of the same shots.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maintenance.development_sets import TASKS, development_task
from maintenance.recipe_features import MOST_TEST
from medlore.data.images.fewshot import draw_shots
from medlore.files import read_json, write_json
from medlore.models.backbones.store import BackboneStore
from medlore.tuning.finetune import finetune
from medlore.tuning.settings import FinetuneSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", required=True, metavar="NAME=SOURCE@SIZE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", default=["sr-lora"])
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--draws", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--head-shares", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, nargs="+", default=[60])
    parser.add_argument("--features", choices=("own", "auto"), default="own")
    parser.add_argument("--views", type=int, default=0, help="changed views of each image that the probe learns from")
    parser.add_argument("--augment", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--json", type=Path, required=True, help="where cells go; those that it holds already are not run again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    title, _, place = given.network.partition("=")
    source, _, size = place.partition("@")
    cells: dict[str, Any] = dict(read_json(given.json)) if given.json.is_file() else {}
    store = BackboneStore()
    grid = itertools.product(
        given.draws, given.shots, given.methods, given.steps, given.head_shares, given.rates, given.augment, given.tasks
    )
    for draw, shots, method, steps, share, rate, augment, task in grid:
        key = f"{title}, {task}, {shots} shots, draw {draw}, {method}, {steps} steps, rate {rate:g}, head {share:g}, augment {augment}"
        key += f", features {given.features}, {given.views} views" if given.views else ""
        if key in cells:
            continue
        pool, test = development_task(task, given.data, most=MOST_TEST)
        settings = FinetuneSettings(
            model=source, image_size=int(size), method=method, steps=steps, learning_rate=rate, head_learning_rate=rate * share,
            features=given.features, device="cpu", precision="fp32", bootstrap=0, seed=draw, augment=augment == "on",
            **({"probe_views": given.views} if augment == "on" else {}),
        )  # fmt: skip
        begun = time.perf_counter()
        found = finetune(settings, train=draw_shots(pool, shots=shots, draw=draw, allow_fewer=True).train, test=test, backbones=store)
        probe = found.report["probe"]
        measure = probe["measure"]
        if found.scores is None:
            raise SystemExit(f"{task}: no test images")
        cells[key] = {
            "score": found.metrics[measure],
            "probe": probe["test"]["metrics"][measure]["value"],
            "log_likelihood": _log_likelihood(found.scores, test.targets()),
            "seconds": round(time.perf_counter() - begun, 1),
        }
        write_json(given.json, cells)
        sys.stdout.write(f"{key}: {cells[key]}\n")
        sys.stdout.flush()
    return 0


def _log_likelihood(scores: Any, targets: Any) -> float:
    """Mean log-likelihood of the labels."""
    safe = np.clip(scores.astype(np.float64), 1e-9, 1 - 1e-9)
    if targets.ndim == 1:
        return float(np.log(safe[np.arange(len(targets)), targets]).mean())
    return float(np.where(targets == 1, np.log(safe), np.log(1 - safe)).mean())


if __name__ == "__main__":
    sys.exit(main())
