"""Stable ranks while a model is tuned: of each weight, of its update, and of their sum, epoch by epoch.

The update is whatever changed the weight, so LoRA in all its forms and full tuning are measured alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medlore.extras import require
from medlore.files import atomic_path
from medlore.linalg.spectra import stable_rank
from medlore.training.watching import Watcher


class RankTracking(Watcher):
    """A watcher that adds `stable_rank_update` and `stable_rank_sum` (layer -> number) to every epoch's record.

    Args:
        model: the backbone before anything is installed in it; its weights are copied.
        names: its layers that are followed.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._start = {name: _weight(model.get_submodule(name)).clone() for name in names}
        self._tuned: nn.Module = model
        self.weights = {name: stable_rank(weight.flatten(1)).value for name, weight in self._start.items()}

    def follow(self, tuned: nn.Module) -> None:
        """The model whose updates are measured."""
        base = getattr(tuned, "base_model", None)
        self._tuned = base.model if base is not None and hasattr(base, "model") else tuned

    def skip(self, steps: int) -> None:
        """Epochs of an earlier run are in its checkpoint."""

    def step(self, loss: float) -> None:
        """Nothing changes between epochs that is worth its time."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Measure all layers."""
        now = {name: _weight(self._tuned.get_submodule(name)) for name in self._start}
        record["stable_rank_update"] = {n: _value(now[n] - w) for n, w in self._start.items()}
        record["stable_rank_sum"] = {n: _value(now[n]) for n in self._start}


def plot_tracked(weights: dict[str, float], epochs: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write a PNG: left the stable rank of each weight before and after, in depth order; right that of the updates by epoch."""
    require("matplotlib", "stable_ranks.png")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(weights)
    last = epochs[-1]["stable_rank_sum"]
    left.plot([weights[n] for n in names], "o-", color="#4c72b0", markersize=3, label="W before")
    left.plot([last[n] for n in names], "x--", color="#dd8452", markersize=4, label="W + update, last epoch")
    left.set(xlabel="layer, in depth order", ylabel="stable rank", title="weights")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False)
    kinds = sorted({n.rsplit(".", 1)[-1] for n in names})
    colours = dict(zip(kinds, ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860"), strict=False))
    for name in names:
        kind = name.rsplit(".", 1)[-1]
        values = [record["stable_rank_update"][name] for record in epochs]
        points = [float("nan") if v is None else v for v in values]
        right.plot([r["epoch"] for r in epochs], points, color=colours.get(kind, "#777777"), alpha=0.6, linewidth=1)
    for kind in kinds:
        right.plot([], [], color=colours.get(kind, "#777777"), label=kind)
    right.set(xlabel="epoch", ylabel="stable rank", title="updates, one line per layer")
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _weight(module: nn.Module) -> Tensor:
    """The weight that a layer works with now, its adapter merged into a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(module, BaseTunerLayer):
        merged = copy.deepcopy(module)
        merged.merge()
        module = merged.get_base_layer()
    return torch.as_tensor(module.weight).detach()


def _value(matrix: Tensor) -> float | None:
    """None for a matrix that is zero: it has no stable rank."""
    return stable_rank(matrix.flatten(1)).value if bool(matrix.any()) else None
