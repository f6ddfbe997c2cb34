"""What the frozen features of backbones are worth: few-shot logistic regression on several sets, networks side by side.

    python maintenance/frozen_features.py DATA --network old=FOLDER --network new=FOLDER --random old --json OUT.json

The part that is reported on is fixed: of every set 40 % of the groups (persons, patients, lesions; images where nothing is
known), at most `--most` images. Shots are drawn from the other groups, `--shots` images a class, each of another group as far
as there are. Features are the class token after the last norm; they are standardised on the shots. The penalty of a network
is one number for all sets, chosen on the development sets (`labelled_sets.DEVELOPMENT`), which are not reported.
Balanced accuracy; several labels an image: mean area under the ROC curve over the labels that both parts hold five times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelled_sets import DEVELOPMENT, REPORTING, LabelledSet, read_set
from numpy.typing import NDArray

from medlore.metrics.draws import mean_difference, mean_of_draws

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST = 5  # images of a label in each part, or it does not count
MAJORITY = "majority"


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of one set: a fixed reporting part, and few-shot draws from the groups outside it."""

    test: NDArray[np.int64]
    draws: tuple[NDArray[np.int64], ...]
    columns: tuple[int, ...] = ()

    @property
    def rows(self) -> NDArray[np.int64]:
        """All rows whose features are needed."""
        return np.unique(np.concatenate([self.test, *self.draws]))


@dataclass
class Scores:
    """Results of one network: `by_set[name][penalty]` is one score a draw."""

    by_set: dict[str, dict[float, list[float]]] = field(default_factory=dict)

    def penalty(self, names: Iterable[str]) -> float:
        """The penalty with the best mean over `names`."""
        held = [self.by_set[name] for name in names if name in self.by_set]
        return max(PENALTIES, key=lambda c: float(np.mean([np.mean(found[c]) for found in held])))


def split_set(data: LabelledSet, *, shots: int, draws: int, most: int, seed: int = 0) -> Split:
    """The reporting part and the draws of a set; the same arguments give the same rows."""
    order = np.random.default_rng([seed, 0])
    names = sorted(set(data.groups))
    held = {names[i] for i in order.permutation(len(names))[: round(0.4 * len(names))]}
    inside = np.array([group in held for group in data.groups])
    test, pool = np.flatnonzero(inside), np.flatnonzero(~inside)
    test = np.sort(order.permutation(test)[:most])
    columns: tuple[int, ...] = ()
    if data.multi:
        columns = tuple(
            k for k in range(len(data.classes)) if min(_least(data.labels[test, k]), _least(data.labels[pool, k])) >= LEAST
        )
    chosen = tuple(_draw(data, pool, columns, shots, np.random.default_rng([seed, number])) for number in range(1, draws + 1))
    return Split(test, chosen, columns)


def _least(labels: NDArray[np.int64]) -> int:
    return int(min(labels.sum(), len(labels) - labels.sum()))


def _draw(
    data: LabelledSet, pool: NDArray[np.int64], columns: Sequence[int], shots: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """`shots` rows of every class, of as many groups as there are; several labels: rarest first, until each has its shots."""
    taken: list[int] = []
    if not data.multi:
        for k in range(len(data.classes)):
            taken += _apart([int(i) for i in random.permutation(pool[data.labels[pool] == k])], data.groups)[:shots]
        return np.array(sorted(taken))
    for k in sorted(columns, key=lambda k: int(data.labels[pool, k].sum())):
        rows = _apart([int(i) for i in random.permutation(pool[data.labels[pool, k] == 1])], data.groups)
        have = sum(int(data.labels[i, k]) for i in taken)
        taken += [i for i in rows if i not in taken][: max(0, shots - have)]
    return np.array(sorted(taken))


def _apart(rows: list[int], groups: Sequence[str]) -> list[int]:
    """Rows in their order, the first of each group before the second of any."""
    seen: dict[str, int] = {}
    rounds = []
    for row in rows:
        rounds.append(seen.get(groups[row], 0))
        seen[groups[row]] = rounds[-1] + 1
    return [rows[i] for i in np.argsort(rounds, kind="stable")]


@dataclass(frozen=True)
class Network:
    """A transformers folder, read at a side of `size` pixels; `random` is its architecture before any training."""

    folder: Path
    size: int
    random: bool = False

    def load(self) -> tuple[Any, NDArray[np.float32], NDArray[np.float32]]:
        """The model, and mean and standard deviation of its pixels (0 to 1)."""
        from transformers import AutoConfig, AutoModel

        described = json.loads((self.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        mean, std = (np.array(described[key], np.float32) for key in ("image_mean", "image_std"))
        if self.random:
            torch.manual_seed(0)
            model = AutoModel.from_config(AutoConfig.from_pretrained(self.folder, local_files_only=True))
        else:
            model = AutoModel.from_pretrained(self.folder, local_files_only=True)
        return model.float().eval(), mean, std


@torch.inference_mode()
def class_tokens(model: Any, images: NDArray[np.uint8], mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """The class token of each image (n h w 3, uint8) after the last norm: n d."""
    found = []
    for start in range(0, len(images), 64):
        pixels = (images[start : start + 64].astype(np.float32) / 255 - mean) / std
        tokens = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
        found.append(tokens[:, 0].numpy())
    return np.concatenate(found)


def judge(values: NDArray[np.float32], data: LabelledSet, split: Split, train: NDArray[np.int64], penalty: float) -> float:
    """The score on `split.test` of a logistic regression trained on the rows `train`; `values` has a row for each image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    mean, spread = values[train].mean(0), values[train].std(0) + 1e-6
    near, far = (values[train] - mean) / spread, (values[split.test] - mean) / spread
    if not data.multi:
        fitted = LogisticRegression(C=penalty, max_iter=3000).fit(near, data.labels[train])
        return float(balanced_accuracy_score(data.labels[split.test], fitted.predict(far)))
    areas = []
    for k in split.columns:
        truth, seen = data.labels[split.test, k], data.labels[train, k]
        constant = seen.min() == seen.max()
        scores = np.zeros(len(truth)) if constant else LogisticRegression(C=penalty, max_iter=3000).fit(near, seen).decision_function(far)
        areas.append(roc_auc_score(truth, scores))
    return float(np.mean(areas))


def measure(
    networks: Mapping[str, Network], names: Iterable[str], folder: Path, *, shots: int, draws: int, most: int
) -> dict[str, Scores]:
    """Scores of every network on every set at every penalty."""
    found = {name: Scores() for name in networks}
    loaded = {name: network.load() for name, network in networks.items()}
    for name in names:
        by_size: dict[int, LabelledSet] = {}
        for title, network in networks.items():
            data = by_size.setdefault(network.size, None) or read_set(name, folder, network.size)  # type: ignore[arg-type]
            by_size[network.size] = data
            split = split_set(data, shots=shots, draws=draws, most=most)
            values = np.zeros((len(data), loaded[title][0].config.hidden_size), np.float32)
            values[split.rows] = class_tokens(loaded[title][0], data.images[split.rows], *loaded[title][1:])
            found[title].by_set[name] = {c: [judge(values, data, split, rows, c) for rows in split.draws] for c in PENALTIES}
            note(f"{name}: {title} " + " ".join(f"{np.mean(s):.3f}" for s in found[title].by_set[name].values()))
    return found
