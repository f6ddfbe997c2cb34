"""How much rank each expert gets in each layer; the three rules are compared at the same number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medlore.decomposing.segmenters.settings import ExpertSettings
from medlore.errors import InputError
from medlore.linalg.factors import factor_shapes
from medlore.linalg.spectra import stable_rank
from medlore.models.segmenter.network import Segmenter, SegmenterConfig, expert_targets

Ranks = dict[tuple[str, str], int]


def choose_expert_ranks(settings: ExpertSettings, config: SegmenterConfig, labels: Mapping[str, int], teacher: Segmenter | None) -> Ranks:
    """(layer, region) -> rank, from 1.

    Args:
        settings: rule and mean rank.
        config: sizes of the student.
        labels: region -> number of labels.
        teacher: its weights are read by the rule `stable-rank`.

    Raises:
        InputError: `given` does not name the regions.
    """
    units = {t: 1 if u == 1 else settings.decoder for t, u in expert_targets(config).items()}
    uniform = {(target, region): settings.rank * unit for target, unit in units.items() for region in labels}
    if settings.rule == "uniform":
        return uniform
    if settings.rule == "given":
        if set(settings.given) != set(labels):
            raise InputError("experts.given", str(sorted(settings.given)), f"a rank for each of {sorted(labels)}", "correct the study")
        return {(target, region): settings.given[region] * unit for target, unit in units.items() for region in labels}
    if teacher is None:
        raise InputError("experts.rule", "stable-rank without a teacher", "a teacher whose weights are read", "name one")
    shapes = _shapes(config, list(units))
    layers = {target: stable_rank_of(weight) for target, weight in _weights_of(teacher, list(units)).items()}
    wanted = {(target, region): layers[target] * labels[region] ** 0.5 for target in units for region in labels}
    return scaled_to_budget(wanted, shapes, sum(_cost(shapes[t], r) for (t, _), r in uniform.items()))


def stable_rank_of(weight: Tensor) -> float:
    """‖W‖_F² / ‖W‖₂² of a kernel unfolded to (out, in * k³)."""
    return float(stable_rank(weight.detach().float().flatten(1)).value)


def scaled_to_budget(wanted: Mapping[tuple[str, str], float], shapes: Mapping[str, Sequence[int]], budget: int) -> Ranks:
    """Whole ranks proportional to what is wanted, from 1 to the full rank; their parameters come near a budget from below."""
    full = {target: min(shape[0], shape[1] * shape[2] * shape[3] * shape[4]) for target, shape in shapes.items()}

    def at(factor: float) -> Ranks:
        return {(t, r): min(max(round(factor * value), 1), full[t]) for (t, r), value in wanted.items()}

    low, high = 0.0, 1.0
    while _total(at(high), shapes) < budget and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(at(middle), shapes) <= budget else (low, middle)
    return at(low)


def _total(ranks: Ranks, shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(_cost(shapes[target], rank) for (target, _), rank in ranks.items())


def _cost(shape: Sequence[int], rank: int) -> int:
    shape_A, shape_B = factor_shapes(shape, rank)
    return int(torch.Size(shape_A).numel() + torch.Size(shape_B).numel())


def _shapes(config: SegmenterConfig, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Segmenter(config)
    return {target: tuple(_kernel(model, target).shape) for target in targets}


def _weights_of(teacher: Segmenter, targets: Sequence[str]) -> dict[str, Tensor]:
    """The teacher's kernel at the same place: the same name where there is one, else the same relative depth."""
    there = list(expert_targets(teacher.config))
    names = {t: t if t in there else there[round(i * (len(there) - 1) / max(len(targets) - 1, 1))] for i, t in enumerate(targets)}
    return {target: _kernel(teacher, name) for target, name in names.items()}


def _kernel(model: Segmenter, name: str) -> Any:
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module).weight
