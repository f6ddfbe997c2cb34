"""The tuning that starts at the probe beside the probe, and guards that keep it near: on the development tasks.

    python -m maintenance.recipe_guards DATA --network vit-mini=medlore:vit-mini@64 --json OUT.json

Each cell is one training on all shots at the product's defaults (features, length, augmentation) from the regression on the images as
they are, but for what the key says. The network is judged as it was tuned, with every change of its weights times a share (0 is the
probe, 1 the tuned network; a LoRA times a half is a LoRA), and with its log-probabilities averaged with those of the probe.
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
from numpy.typing import NDArray

from maintenance.development_sets import TASKS, development_task
from maintenance.recipe_features import MOST_TEST
from maintenance.recipe_probes import score
from medlore.data.images.fewshot import draw_shots
from medlore.data.images.imageset import ImageSet
from medlore.files import read_json, write_json
from medlore.models.backbones.store import BackboneStore
from medlore.training.accelerator import make_accelerator
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.finetune import FinetuneResult, finetune
from medlore.tuning.idle_settings import without_idle
from medlore.tuning.probe import log_likelihood
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import predict_logits

SHARES = (0.0, 0.25, 0.5, 1.0)
FROZEN = 1e-12  # a rate at which a head stays where it is


def cell(settings: FinetuneSettings, train: ImageSet, test: ImageSet, store: BackboneStore) -> dict[str, Any]:
    """Score and mean log-likelihood of the probe, of the tuned network, of both together, and of shares of the change."""
    begun = time.perf_counter()
    probe = finetune(without_idle(settings.changed(method="linear-probe")), train=train, test=test, backbones=store)
    between = time.perf_counter()
    tuned = finetune(settings, train=train, test=test, backbones=store)
    seconds = time.perf_counter() - between
    by_share = {share: _logits(tuned, probe, share, test) for share in SHARES}
    blend = (_said(by_share[0.0], test) + _said(by_share[1.0], test)) / 2

    def both(logits: NDArray[np.float64]) -> list[float]:
        return [score(logits, test), log_likelihood(logits, test.targets(), test.task) / len(test)]

    return {
        "features": tuned.report["features"]["read"],
        "shares": {f"{share:g}": both(logits) for share, logits in by_share.items()},
        "blend": both(blend),
        "seconds": {"probe": round(between - begun, 1), "tuned": round(seconds, 1)},
    }


def _logits(tuned: FinetuneResult, probe: FinetuneResult, share: float, test: ImageSet) -> NDArray[np.float64]:
    """Of the network whose weights are those of the probe's, and a share of what tuning changed in them."""
    near, far = ({name: value.clone() for name, value in each.model.state_dict().items()} for each in (probe, tuned))
    if near.keys() != far.keys():
        raise SystemExit(f"the tuned network is another one: {sorted(near.keys() ^ far.keys())[:3]}")
    network, accelerator = probe.model, make_accelerator("cpu", "fp32", None)
    network.load_state_dict({name: near[name] + share * (far[name] - near[name]) for name in near})
    try:
        examples = image_examples(test, preprocessing_of(probe.backbone))
        return predict_logits(network, examples.inputs, len(examples), accelerator=accelerator).double().numpy()
    finally:
        network.load_state_dict(near)


def _said(logits: NDArray[np.float64], test: ImageSet) -> NDArray[np.float64]:
    """Log-probabilities; logits do where every label has its own."""
    if test.task == "multi":
        return logits
    found: NDArray[np.float64] = torch.from_numpy(logits).log_softmax(1).numpy()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", action="append", required=True, metavar="NAME=SOURCE@SIZE")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rates", nargs="+", default=["default"], help="of the factors: default or a number")
    parser.add_argument("--heads", nargs="+", choices=("tuned", "frozen"), default=["tuned"])
    parser.add_argument("--json", type=Path, required=True, help="where cells go; those that it holds already are not run again")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells: dict[str, Any] = dict(read_json(given.json)) if given.json.is_file() else {}
    stores = {network: BackboneStore() for network in given.network}
    grid = itertools.product(given.draws, given.rates, given.heads, given.shots, given.network, given.tasks)
    for draw, rate, head, shots, network, task in grid:
        title, _, place = network.partition("=")
        source, _, size = place.partition("@")
        key = f"{title}, {task}, {shots} shots, draw {draw}, rate {rate}, head {head}"
        if key in cells:
            continue
        pool, test = development_task(task, given.data, most=MOST_TEST)
        rates = {} if rate == "default" else {"learning_rate": float(rate)}
        rates |= {"head_learning_rate": FROZEN} if head == "frozen" else {}
        settings = FinetuneSettings(
            model=source,
            image_size=int(size),
            method="sr-lora",
            device="cpu",
            precision="fp32",
            bootstrap=0,
            probe_views=0,
            seed=draw,
            **rates,
        )
        train = draw_shots(pool, shots=shots, draw=draw, allow_fewer=True).train
        cells[key] = cell(settings, train, test, stores[network])
        write_json(given.json, cells)
        sys.stdout.write(f"{key}: {cells[key]}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
