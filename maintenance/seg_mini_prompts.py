"""New prompts for a network that stays as it is: labels that a pack does not know yet, read out of the pixel embeddings that it has.

    python studies/seg_mini_brain_cases.py --data ../shared/data --out runs/brain/cases
    python -m maintenance.seg_mini_prompts draw --patches 120        (stopped? the same command goes on)
    python -m maintenance.seg_mini_prompts fit --out runs/brain/prompts.safetensors

`draw` shows windows of synthesised heads to the network of the pack's brain expert, and keeps what the prompts see of them: the image
tokens, and the pixel embeddings and labels of some voxels. `fit` trains one row of the prompt table a label on them, by cross-entropy and
Dice as a training does; all weights are frozen, so experts and known prompts answer as before to the last bit. A pass takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medlore.data.volumes.cases import read_cases
from medlore.data.volumes.geometry import Shape
from medlore.data.volumes.patches import PatchRules, draw_patch
from medlore.data.volumes.training_cache import CachedCase, build_cache
from medlore.decomposing.segmenters.batches import make_rules
from medlore.files import atomic_path
from medlore.losses import deep_mask_loss
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.network import Features, Segmenter
from medlore.models.segmenter.prompts import PromptTable
from medlore.training.accelerator import make_accelerator
from medlore.training.loop import train
from medlore.training.schedule import CosineOfShares, Schedule
from medlore.training.task import Judgement, Stretch, Task
from medlore.training.watching import Watcher

WINDOW: Shape = (80, 80, 80)  # as at inference: instance normalisation depends on it
VOXELS = 60_000
# New label -> the known prompts whose mean it starts from.
STARTS = {
    "cerebral cortex": ("grey matter",),
    "cerebral white matter": ("white matter",),
    "cerebellar cortex": ("cerebellum", "grey matter"),
    "cerebellar white matter": ("cerebellum", "white matter"),
    "lateral ventricle": ("brain ventricle",),
    "third ventricle": ("brain ventricle",),
    "fourth ventricle": ("brain ventricle",),
    "nucleus accumbens": ("caudate nucleus", "putamen"),
    "ventral diencephalon": ("brainstem", "thalamus"),
}
WARP = {"probability": 1.0, "rotation_degrees": 15.0, "scale": [0.85, 1.2], "shear": 0.05, "elastic_voxels": 2.5, "bend_voxels": 3.0}
SYNTHESIS = {
    "t1_like": 0.7, "t2_like": 0.1, "flair_like": 0.08, "skull_strip": 0.9, "ragged_strip": 0.6, "deviation": (0.5, 10.0), "noise": 6.0,
    "blur_voxels": (0.35, 1.2), "thick_slices": 0.2,
}  # fmt: skip


def draw(pack: str, cases: Path, folder: Path, patches: int) -> None:
    """Windows that the folder does not have yet."""
    bundle = load_segmenter(pack)
    network = bundle.network("brain" if bundle.weights.experts else None).eval()
    heads = build_cache(read_cases(cases / "inside.jsonl"), folder / "cache", bundle.preprocessing).cases
    rules = make_rules(
        {"foreground": 0.4, "by_label": 0.6, "warp": WARP, "grey": {"view_probability": 0.05}}, SYNTHESIS, bundle.preprocessing
    )
    for number in range(patches):
        file = folder / f"window-{number:04d}.npz"
        if not file.is_file():
            with atomic_path(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **_window(network, heads, rules, number))
            sys.stderr.write(f"\r{number + 1} of {patches}")
    sys.stderr.write("\n")


@torch.no_grad()
def _window(network: Segmenter, heads: Sequence[CachedCase], rules: PatchRules, number: int) -> dict[str, Any]:
    case = heads[number % len(heads)]
    labels = list(case.labels)
    patch = draw_patch(case, size=WINDOW, labels=labels, max_prompts=len(labels), seed_words=(7, number), rules=rules)
    features = network.encode(patch.image[None].expand(-1, network.config.image_channels, -1, -1, -1))
    rng = np.random.default_rng([8, number])
    targets = patch.targets.numpy().reshape(len(patch.labels), -1)
    chosen = np.sort(rng.choice(targets.shape[1], VOXELS, replace=False))
    return {
        "tokens": features.tokens[0].numpy(),
        "grid": np.asarray(features.grid),
        "pixels": features.pixels[0].reshape(features.pixels.shape[1], -1)[:, chosen].numpy().astype(np.float16),
        "targets": targets[:, chosen],
        "labels": np.asarray(patch.labels),
    }


class PromptRows(nn.Module):
    """The rows that are trained, in front of a network that stays as it is."""

    def __init__(self, network: Segmenter, rows: Tensor) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.rows = nn.Parameter(rows)

    def forward(self, features: Features, chosen: list[int]) -> Tensor:
        """Logits of the chosen rows."""
        return self.network.decode(features, self.rows[chosen])


@dataclass(frozen=True, eq=False)
class _Window:
    """What a window gave, and of the asked labels those that are in it: their rows and their voxels."""

    features: Features
    rows: list[int]
    truth: Tensor  # 1 n v 1 1


class PromptTask(Task):
    """One row of the prompt table a label.

    Args:
        network: frozen.
        labels: whose rows are trained.
        rows: where they begin; label width.
        windows: what the network saw.
    """

    def __init__(self, network: Segmenter, labels: Sequence[str], rows: Tensor, windows: Sequence[_Window]) -> None:
        super().__init__("prompts", PromptRows(network, rows), make_accelerator("cpu", "fp32"))
        self.labels, self.windows = labels, windows

    def training_mode(self) -> None:
        """The network stays as it is at inference."""

    def batches(self, start: int, stop: int) -> Generator[_Window]:
        """Every window once in a pass, each pass in another order."""
        count = len(self.windows)
        for step in range(start, stop):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(step // count))
            yield self.windows[int(order[step % count])]

    def loss(self, batch: _Window, step: int) -> dict[str, Tensor]:
        """Cross-entropy and Dice of every label, averaged over those of the window."""
        del step
        logits = self.forward(batch.features, batch.rows)
        each = [_loss(logits[:, [i]], batch.truth[:, [i]]) / len(batch.rows) for i in range(len(batch.rows))]
        return {self.labels[row]: value for row, value in zip(batch.rows, each, strict=True)}

    def judge(self, stretch: Stretch) -> Judgement:
        """Nothing is chosen."""
        del stretch
        return Judgement()


def fit(pack: str, folder: Path, out: Path, *, passes: int, rate: float, again: Sequence[str], every: int = 1) -> float:
    """Train the rows of the new labels, and those of `again` anew; write the whole table. Returns the mean loss of the last pass."""
    bundle = load_segmenter(pack)
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # a shipped pack has them
    labels = [*STARTS, *again]
    windows = [window for file in sorted(folder.glob("window-*.npz")) if (window := _read(file, labels, every)).rows]
    network = bundle.network("brain" if bundle.weights.experts else None)
    task = PromptTask(network, labels, torch.stack([_start(bundle, label) for label in labels]), windows)
    steps = passes * len(windows)
    schedule = Schedule(steps, CosineOfShares(rate, 0.0, 0.0), clip=None, log_every=len(windows))
    history = train(task, schedule, watcher=_Lines(len(windows)))
    known = dict(zip(bundle.prompts.keys, bundle.prompts.embeddings.float(), strict=True))
    known |= {f"mri/{label}": row for label, row in zip(labels, task.module.state_dict()["rows"], strict=True)}
    PromptTable(tuple(known), torch.stack(list(known.values()))).write(out)
    return sum(value for name, value in history.losses[-1].items() if name != "step")


class _Lines(Watcher):
    """A line on stderr after every pass."""

    def __init__(self, windows: int) -> None:
        self._windows = windows

    def losses(self, stretch: Stretch) -> None:
        """The mean loss."""
        sys.stderr.write(f"pass {stretch.step // self._windows}: loss {stretch.loss:.3f}\n")


def _start(bundle: SegmenterBundle, label: str) -> Tensor:
    return bundle.queries(list(STARTS.get(label, (label,))), "mri").float().mean(0)


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    return deep_mask_loss([logits], truth, torch.ones(1, 1), bce=1.0, dice=1.0)


def _read(file: Path, labels: Sequence[str], every: int) -> _Window:
    with np.load(file, allow_pickle=False) as held:
        x, y, z = (int(v) for v in held["grid"])
        pixels = torch.from_numpy(held["pixels"][:, ::every].astype(np.float32))[None, :, :, None, None]  # one column of voxels
        features = Features(pixels, torch.from_numpy(held["tokens"])[None], (x, y, z))
        names, targets = held["labels"].tolist(), torch.from_numpy(held["targets"][:, ::every])
    rows = [row for row, label in enumerate(labels) if label in names]
    return _Window(features, rows, targets[[names.index(labels[row]) for row in rows]][None, :, :, None, None])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("draw", "fit"))
    parser.add_argument("--pack", default="medlore:seg-mini", help="whose weights stay as they are")
    parser.add_argument("--cases", type=Path, default=Path("runs/brain/cases"), help="folder of studies/seg_mini_brain_cases.py")
    parser.add_argument("--windows", type=Path, default=Path("runs/brain/windows"), help="folder of what was seen")
    parser.add_argument("--patches", type=int, default=120, help="windows")
    parser.add_argument("--passes", type=int, default=20, help="over all windows")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate")
    parser.add_argument("--every", type=int, default=1, help="of the kept voxels one in so many: a quicker, rougher fit")
    parser.add_argument("--again", default="", help="known labels whose rows are trained again, by comma")
    parser.add_argument("--out", type=Path, default=Path("runs/brain/prompts.safetensors"), help="the table")
    given = parser.parse_args(argv)
    if given.verb == "draw":
        given.windows.mkdir(parents=True, exist_ok=True)
        draw(given.pack, given.cases, given.windows, given.patches)
    else:
        again = [label for label in given.again.split(",") if label]
        fit(given.pack, given.windows, given.out, passes=given.passes, rate=given.rate, again=again, every=given.every)


if __name__ == "__main__":
    main()
