"""Where EVA starts: the directions in which the inputs of each layer vary most, and how many of them each layer gets.

PEFT's own search walks round and round the batches until an incremental singular value decomposition stands still. On few
images it may not: directions of nearly equal variance keep turning into each other, hundreds of passes long. Here each batch
is seen once: mean and scatter of a layer's inputs add up exactly, and their leading eigenvectors are the right singular
vectors of all those inputs at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medlore.errors import InputError

Float64 = NDArray[np.float64]


@dataclass
class Scatter:
    """Mean and scatter matrix of rows that come batch by batch, in float32 on the device of the rows.

    Attributes:
        count: rows so far.
        mean: (d,) of them.
        matrix: (d, d) sum of (x - mean)(x - mean)ᵀ.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    matrix: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, d)."""
        rows = rows.float()
        new_mean = rows.mean(dim=0)
        centred = rows - new_mean
        new_matrix, total = centred.T @ centred, self.count + len(rows)
        if self.count == 0:
            self.count, self.mean, self.matrix = total, new_mean, new_matrix
            return
        step = new_mean - self.mean
        self.matrix += new_matrix
        self.matrix.addr_(step, step, alpha=self.count * len(rows) / total)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def leading(self, count: int) -> tuple[Float64, Float64]:
        """Shares of the variance (k,), largest first, and their orthonormal directions (k, d); k is `count`, at most d."""
        matrix = self.matrix.cpu().numpy().astype(np.float64)
        width = len(matrix)
        values, vectors = scipy.linalg.eigh(matrix, subset_by_index=(width - min(count, width), width - 1))
        total = float(np.trace(matrix))
        shares = np.clip(values[::-1], 0.0, None) / total if total > 0 else np.zeros_like(values)
        return shares, vectors.T[::-1].copy()


def start_from_variance(tuned: Any, batches: Sequence[Tensor], *, most: float) -> None:
    """Give each LoRA pair of a PEFT model with `init_lora_weights="eva"` the leading directions of its input as A.

    The ranks are shared out anew under the same total, in the order of the share of variance that a direction explains in its
    own layer; a layer gets at most `most` times its rank, and loses its pair where none of its directions comes to the turn.

    Args:
        tuned: the PEFT model; its network is called as `tuned(pixel_values=batch)`, once for each batch.
        batches: normalised images (b, c, h, w).
        most: times its planned rank.

    Raises:
        InputError: no batches, or inputs of a layer that are not finite.

    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024; inputs are centred as in
    PEFT's form of it.
    """
    from peft import initialize_lora_eva_weights

    layers = _pairs_on_linear_layers(tuned)
    seen, owner = _scatters(tuned, layers, batches)
    ranks = {name: int(layers[name].r["default"]) for name in owner}
    caps = {name: round(most * max(ranks[other] for other in ranks if owner[other] == owner[name])) for name in ranks}
    found = {name: seen[name].leading(caps[name]) for name in seen}
    shares = {name: found[owner[name]][0] for name in ranks}
    given = shared_ranks(shares, sum(ranks.values()))
    start = {name: torch.from_numpy(found[owner[name]][1][: given[name]]).float() for name in ranks}
    initialize_lora_eva_weights(tuned, eva_state_dict=start)


def shared_ranks(shares: Mapping[str, Float64], total: int) -> dict[str, int]:
    """How many of its directions each layer gets when the `total` largest shares of all layers are taken.

    Args:
        shares: largest first, by layer.
        total: directions of all layers together; fewer where there are fewer.

    Examples:
        >>> shared_ranks({"a": np.array([0.5, 0.1]), "b": np.array([0.3, 0.2])}, 3)
        {'a': 1, 'b': 2}
    """
    ranked = sorted(((share, name) for name, own in shares.items() for share in own), key=lambda pair: -pair[0])  # stable
    given = dict.fromkeys(shares, 0)
    for _, name in ranked[:total]:
        given[name] += 1
    return given


def _pairs_on_linear_layers(tuned: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in tuned.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
    }


@torch.no_grad()
def _scatters(tuned: Any, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> tuple[dict[str, Scatter], dict[str, str]]:
    """One pass: what each layer's inputs are like, and whose entry holds for a layer that reads the same tensor as another."""
    if not batches:
        raise InputError("--method eva", "no images to look at", "a few training batches", "give the request its batches")
    seen: dict[str, Scatter] = {}
    owner: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []  # kept, so that its identity is not that of a later tensor

    def look(_: nn.Module, inputs: tuple[Any, ...], *, name: str) -> None:
        states = inputs[0]
        if name not in owner:  # query, key and value read one tensor
            owner[name] = last[0][1] if last and last[0][0] is states else name
        if owner[name] == name:
            seen.setdefault(name, Scatter()).add(states.flatten(0, -2))
            last[:] = [(states, name)]

    handles = [layer.register_forward_pre_hook(partial(look, name=name)) for name, layer in layers.items()]
    training = tuned.training
    tuned.eval()
    try:
        with tuned.disable_adapter():
            for batch in batches:
                tuned(pixel_values=batch)
    finally:
        tuned.train(training)
        _remove(handles)
    _refuse_infinite(seen, owner)
    return seen, owner


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _refuse_infinite(seen: Mapping[str, Scatter], owner: Mapping[str, str]) -> None:
    finite = {name: bool(torch.isfinite(scatter.matrix).all()) for name, scatter in seen.items()}
    broken = [name.removeprefix("base_model.model.") for name in owner if not finite[owner[name]]]
    if broken:
        came = f"inputs that are not finite in {len(broken)} layers, first {broken[0]}"
        raise InputError("--method eva", came, "finite inputs of every layer", "look for broken weights or images")


__all__ = ["Scatter", "shared_ranks", "start_from_variance"]
