"""How much rank each expert gets in each convolution of a segmenter: what `medlore.ranks` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlore.decomposing.segmenters.settings import ExpertSettings
from medlore.models.segmenter.network import Segmenter, SegmenterConfig, expert_targets
from medlore.ranks.experts import ExpertDemand, Ranks, stable_rank_of, write_expert_plans
from medlore.ranks.rule_table import expert_ranks

__all__ = ["Ranks", "choose_expert_ranks", "write_plans"]


def choose_expert_ranks(
    settings: ExpertSettings, config: SegmenterConfig, labels: Mapping[str, int], teacher: Segmenter | None, *, folder: Path | None = None
) -> Ranks:
    """(layer, region) -> rank, from 1; the rules are compared at the same number of parameters.

    Args:
        settings: rule and mean rank.
        config: sizes of the student.
        labels: region -> number of labels.
        teacher: its weights are read by the rule `stable-rank`.
        folder: of the study, which plans that are given are relative to.

    Raises:
        InputError: `given` does not name the regions.
    """
    units = {t: 1 if u == 1 else settings.decoder for t, u in expert_targets(config).items()}
    reads = settings.rule == "stable-rank" and teacher is not None
    profile = {t: stable_rank_of(w) for t, w in _weights_of(teacher, list(units)).items()} if reads and teacher is not None else None
    given = {e: value if isinstance(value, int) else (folder or Path()) / value for e, value in settings.given.items()}
    demand = ExpertDemand(
        shapes=_shapes(config, list(units)), sizes=labels, rank=settings.rank, units=units, given=given, profile=profile, keep="parameters"
    )
    return expert_ranks(settings.rule, demand)


def write_plans(folder: Path, ranks: Ranks, settings: ExpertSettings, config: SegmenterConfig, *, source: str) -> list[Path]:
    """One plan file for each expert of a trained student."""
    shapes = _shapes(config, list(expert_targets(config)))
    return write_expert_plans(folder, ranks, shapes, rule=settings.rule, alpha=f"rank*{settings.scaling:g}", source=source)


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
