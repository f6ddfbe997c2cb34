"""What the frozen features of backbones are worth: few-shot logistic regression on several sets, networks side by side.

    python -m maintenance.frozen_features DATA --network old=FOLDER --network new=FOLDER --random old --bar old,new --json OUT.json

The part that is reported on is fixed: of every set 40 % of the groups (persons, patients, lesions; images where nothing is
known), at most `--most` images. Shots are drawn from the other groups, `--shots` images a class, each of another group as far
as there are. Features are read after the last norm: the class token (the name of a network alone), the mean of the patches
(`NAME, mean`), or both; they are standardised on the shots. The penalty of a reading is one number for all sets, chosen on the
development sets (`labelled_sets.DEVELOPMENT`), which are not reported. Balanced accuracy; several labels an image: mean area
under the ROC curve over the labels that both parts hold five times.
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
from numpy.typing import NDArray

from maintenance.labelled_sets import DEVELOPMENT, REPORTING, LabelledSet, read_set
from medlore.files import write_json
from medlore.metrics.draws import DrawMean, mean_of_draws

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST = 5  # images of a label in each part, or it does not count
READINGS = ("class", "mean", "both")  # the class token, the mean of the patches, one beside the other
BAR, LOSS = 0.08, 0.02  # what a new vit-mini must gain in the mean, and may lose on one set


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
        columns = tuple(k for k in range(len(data.classes)) if min(_least(data.labels[test, k]), _least(data.labels[pool, k])) >= LEAST)
    chosen = tuple(_draw(data, pool, columns, shots, np.random.default_rng([seed, number])) for number in range(1, draws + 1))
    return Split(test, chosen, columns)


def _least(labels: NDArray[np.int64]) -> int:
    return int(min(labels.sum(), len(labels) - labels.sum()))


def _draw(data: LabelledSet, pool: NDArray[np.int64], columns: Sequence[int], shots: int, random: np.random.Generator) -> NDArray[np.int64]:
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
            model = AutoModel.from_config(AutoConfig.from_pretrained(self.folder, local_files_only=True))  # nosec B615 # a local folder
        else:
            model = AutoModel.from_pretrained(self.folder, local_files_only=True)  # nosec B615 # a local folder
        return model.float().eval(), mean, std


@torch.inference_mode()
def read_tokens(
    model: Any, images: NDArray[np.uint8], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> dict[str, NDArray[np.float32]]:
    """Features of images (n h w 3, uint8) after the last norm: by reading n d, `both` n 2d."""
    found = []
    for start in range(0, len(images), 64):
        pixels = (images[start : start + 64].astype(np.float32) / 255 - mean) / std
        tokens = model(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
        found.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1).numpy())
    both = np.concatenate(found)
    half = both.shape[1] // 2
    return {"class": both[:, :half], "mean": both[:, half:], "both": both}


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
    network: Network, names: Iterable[str], folder: Path, readings: Sequence[str] = READINGS, *, shots: int, draws: int, most: int
) -> dict[str, Scores]:
    """Scores of a network on every set at every penalty, by reading."""
    found = {reading: Scores() for reading in readings}
    model, mean, std = network.load()
    for name in names:
        data = read_set(name, folder, network.size)
        split = split_set(data, shots=shots, draws=draws, most=most)
        tokens = read_tokens(model, data.images[split.rows], mean, std)
        for reading in readings:
            rows = tokens[reading]
            values = np.zeros((len(data), rows.shape[1]), np.float32)
            values[split.rows] = rows
            found[reading].by_set[name] = {c: [judge(values, data, split, drawn, c) for drawn in split.draws] for c in PENALTIES}
            note(f"{name}: {reading} " + " ".join(f"{np.mean(s):.3f}" for s in found[reading].by_set[name].values()))
    return found


def compare(found: Mapping[str, Scores], old: str, new: str, penalties: Mapping[str, float]) -> dict[str, DrawMean]:
    """What `new` has over `old`, draw by draw: on each reported set, and in the mean of all."""
    gains = {}
    for name in REPORTING:
        before, after = (found[title].by_set[name][penalties[title]] for title in (old, new))
        gains[name] = [b - a for a, b in zip(before, after, strict=True)]
    mean = np.mean(list(gains.values()), axis=0)
    return {name: mean_of_draws(values) for name, values in gains.items()} | {"mean": mean_of_draws(mean.tolist())}


def passes(gains: Mapping[str, DrawMean]) -> bool:
    """The bar for shipping: 0.08 in the mean with the interval above zero, and no set worse by more than 0.02."""
    mean = gains["mean"]
    worst = min(gain.mean for name, gain in gains.items() if name != "mean")
    return mean.mean >= BAR and mean.low is not None and mean.low > 0 and worst >= -LOSS


def table(found: Mapping[str, Scores], penalties: Mapping[str, float]) -> str:
    """Mean and 95 % interval over draws: a row for each set, development sets last, a column for each network."""
    lines = ["| set | " + " | ".join(f"{title} (C = {penalties[title]:g})" for title in found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in [*REPORTING, *DEVELOPMENT]:
        held = [mean_of_draws(scores.by_set[name][penalties[title]]) for title, scores in found.items() if name in scores.by_set]
        lines += [f"| {name} | " + " | ".join(map(str, held)) + " |"] if held else []
    return "\n".join(lines)


def note(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the archives")
    parser.add_argument("--network", action="append", default=[], metavar="NAME=FOLDER[@SIZE]", help="a network; 64 pixels without a size")
    parser.add_argument("--random", metavar="NAME", help="also this network before any training")
    parser.add_argument("--bar", metavar="OLD,NEW", help="say whether NEW may be shipped in the place of OLD")
    parser.add_argument("--readings", nargs="+", choices=READINGS, default=READINGS, help="how features are read; all three")
    parser.add_argument("--development", action="store_true", help="only the sets that may choose between students")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--most", type=int, default=400, help="images of the reporting part that are looked at")
    parser.add_argument("--json", type=Path, help="where every score goes; a network that it holds already is not measured again")
    return parser.parse_args(arguments)


def networks_of(given: argparse.Namespace) -> dict[str, Network]:
    """The networks that the command line names."""
    found = {}
    for text in given.network:
        title, _, place = text.partition("=")
        folder, _, size = place.partition("@")
        found[title] = Network(Path(folder), int(size or 64))
    if given.random:
        found["random"] = Network(found[given.random].folder, found[given.random].size, random=True)
    return found


def held_scores(file: Path | None, protocol: Mapping[str, int]) -> dict[str, Scores]:
    """Scores of an earlier call at the same protocol."""
    if file is None or not file.is_file():
        return {}
    held = json.loads(file.read_text(encoding="utf-8"))
    if held["protocol"] != protocol:
        raise SystemExit(f"{file}: measured with {held['protocol']}, asked for {dict(protocol)}: name another file")
    return {
        title: Scores({name: {float(c): values for c, values in by_c.items()} for name, by_c in by_set.items()})
        for title, by_set in held["scores"].items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = parsed(arguments)
    protocol = {"shots": given.shots, "draws": given.draws, "most": given.most}
    found, names = held_scores(given.json, protocol), list(DEVELOPMENT if given.development else REPORTING | DEVELOPMENT)
    for title, network in networks_of(given).items():
        missing = [name for name in names if name not in found.get(title, Scores()).by_set]
        for reading, fresh in (measure(network, missing, given.data, given.readings, **protocol) if missing else {}).items():
            key = title if reading == READINGS[0] else f"{title}, {reading}"
            found[key] = Scores(found.get(key, Scores()).by_set | fresh.by_set)
    if given.json:
        scores = {title: held.by_set for title, held in found.items()}
        write_json(given.json, {"protocol": protocol, "scores": scores})
    penalties = {title: held.penalty(DEVELOPMENT) for title, held in found.items()}
    sys.stdout.write(table(found, penalties) + "\n")
    if given.bar:
        gains = compare(found, *given.bar.split(","), penalties)
        sys.stdout.write("\n".join(f"{name}: {gain}" for name, gain in gains.items()) + f"\nmay be shipped: {passes(gains)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
