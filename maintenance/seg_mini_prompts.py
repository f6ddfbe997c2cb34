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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def fit(pack: str, folder: Path, out: Path, *, passes: int, rate: float, again: Sequence[str], every: int = 1) -> dict[str, float]:
    """Train the rows of the new labels, and those of `again` anew; write the whole table. Returns the loss of the last pass, by label."""
    bundle = load_segmenter(pack)
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # a shipped pack has them
    network = bundle.network("brain" if bundle.weights.experts else None).eval().requires_grad_(requires_grad=False)
    labels = [*STARTS, *again]
    rows = torch.nn.Parameter(torch.stack([_start(bundle, label) for label in labels]))
    windows = [_read(file, every) for file in sorted(folder.glob("window-*.npz"))]
    optimiser = torch.optim.Adam([rows], lr=rate)
    order = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, passes * len(windows))
    losses: dict[str, list[float]] = {}
    for turn in range(passes):
        losses = {label: [] for label in labels}
        for index in torch.randperm(len(windows), generator=order).tolist():
            features, targets, names = windows[index]
            asked = [label for label in labels if label in names]
            if not asked:
                continue
            logits = network.decode(features, rows[[labels.index(label) for label in asked]])
            truth = targets[[names.index(label) for label in asked]].view(1, len(asked), -1, 1, 1)
            each = [_loss(logits[:, [i]], truth[:, [i]]) for i in range(len(asked))]
            optimiser.zero_grad()
            torch.stack(each).mean().backward()
            optimiser.step()
            schedule.step()
            for label, value in zip(asked, each, strict=True):
                losses[label].append(float(value.detach()))
        sys.stderr.write(f"pass {turn + 1}: " + ", ".join(f"{k} {np.mean(v):.3f}" for k, v in losses.items() if v) + "\n")
    known = dict(zip(bundle.prompts.keys, bundle.prompts.embeddings.float(), strict=True))
    known |= {f"mri/{label}": row for label, row in zip(labels, rows.detach(), strict=True)}
    PromptTable(tuple(known), torch.stack(list(known.values()))).write(out)
    return {label: float(np.mean(values)) for label, values in losses.items() if values}


def _start(bundle: SegmenterBundle, label: str) -> Tensor:
    return bundle.queries(list(STARTS.get(label, (label,))), "mri").float().mean(0)


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    return deep_mask_loss([logits], truth, torch.ones(1, 1), bce=1.0, dice=1.0)


def _read(file: Path, every: int) -> tuple[Features, Tensor, list[str]]:
    with np.load(file, allow_pickle=False) as held:
        x, y, z = (int(v) for v in held["grid"])
        pixels = torch.from_numpy(held["pixels"][:, ::every].astype(np.float32))[None, :, :, None, None]  # one column of voxels
        return (
            Features(pixels, torch.from_numpy(held["tokens"])[None], (x, y, z)),
            torch.from_numpy(held["targets"]),
            held["labels"].tolist(),
        )


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
    told = parser.parse_args(argv)
    if told.verb == "draw":
        told.windows.mkdir(parents=True, exist_ok=True)
        draw(told.pack, told.cases, told.windows, told.patches)
    else:
        again = [label for label in told.again.split(",") if label]
        fit(told.pack, told.windows, told.out, passes=told.passes, rate=told.rate, again=again, every=told.every)


if __name__ == "__main__":
    main()
