"""How much rank each expert gets in each layer of a classifier: what `medlore.ranks` is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from medlore.decomposing.classifiers.settings import RankSettings
from medlore.decomposing.classifiers.tasks import TaskData
from medlore.ranks.experts import ExpertDemand, Ranks, fullness_by_depth
from medlore.ranks.rule_table import expert_ranks


def adapted_layers(body: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get experts: dense convolutions and linear layers; depthwise ones and classifiers do not (as in LoRKD).

    Nor does the patch embedding of a transformer: its network reads the weight past the layer's forward.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in body.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
            continue
        if not name.startswith("classifier") and "patch_embeddings" not in name:
            found[name] = module
    return found


def choose_ranks(
    settings: RankSettings,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    tasks: Mapping[str, TaskData],
    teacher: nn.Module | None,
    *,
    folder: Path | None = None,
) -> Ranks:
    """(layer, task) -> rank, from 1 to the largest rank that the layer can hold.

    Args:
        settings: rule and mean rank.
        layers: of the student.
        tasks: their sizes are those of their training parts.
        teacher: its spectra are read by the rule `stable-rank`; without one every layer counts alike.
        folder: of the study, which plans that are given are relative to.

    Source:
        `given` is LoRKD's way; `task-size` and `stable-rank` are ours.
    """
    profile = dict.fromkeys(layers, 1.0)
    if settings.rule == "stable-rank" and teacher is not None:
        profile = fullness_by_depth([module.weight for module in adapted_layers(teacher).values()], list(layers))
    demand = ExpertDemand(
        shapes={name: tuple(module.weight.shape) for name, module in layers.items()},
        sizes={name: len(task.train) for name, task in tasks.items()},
        rank=settings.rank,
        given={e: value if isinstance(value, int) else (folder or Path()) / value for e, value in settings.given.items() if e in tasks},
        profile=profile,
    )
    return expert_ranks(settings.rule, demand)
