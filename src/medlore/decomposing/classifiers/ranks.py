"""How much rank each expert gets in each layer of the student."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from medlore.decomposing.classifiers.settings import RankSettings
from medlore.decomposing.classifiers.tasks import Task
from medlore.linalg.matricize import as_matrix
from medlore.linalg.spectra import stable_rank


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
    settings: RankSettings, layers: Mapping[str, nn.Linear | nn.Conv2d], tasks: Mapping[str, Task], teacher: nn.Module | None
) -> dict[tuple[str, str], int]:
    """(layer, task) -> rank, from 1 to the largest rank that the layer can hold.

    Source:
        `given` is LoRKD's way; `task-size` and `stable-rank` are ours.
    """
    per_task = _per_task(settings, tasks)
    profile = _profile(settings, layers, teacher)
    ranks = {}
    for layer, module in layers.items():
        top = min(as_matrix(module.weight).shape)
        for task, mean in per_task.items():
            ranks[layer, task] = int(np.clip(round(mean * profile[layer]), 1, top))
    return ranks


def _per_task(settings: RankSettings, tasks: Mapping[str, Task]) -> dict[str, float]:
    if settings.rule == "given":
        return {name: float(settings.given[name]) for name in tasks}
    if settings.rule == "task-size":
        roots = {name: len(task.train) ** 0.5 for name, task in tasks.items()}
        mean = sum(roots.values()) / len(roots)
        return {name: settings.rank * root / mean for name, root in roots.items()}
    return dict.fromkeys(tasks, float(settings.rank))


def _profile(settings: RankSettings, layers: Mapping[str, nn.Linear | nn.Conv2d], teacher: nn.Module | None) -> dict[str, float]:
    """A factor per layer with mean 1: how full the teacher's spectrum is at the same relative depth."""
    if settings.rule != "stable-rank" or teacher is None:
        return dict.fromkeys(layers, 1.0)
    fullness = []
    for module in adapted_layers(teacher).values():
        weight = as_matrix(module.weight.detach())
        fullness.append(stable_rank(weight).value / min(weight.shape))
    places = np.linspace(0, 1, len(layers))
    values = np.interp(places, np.linspace(0, 1, len(fullness)), fullness)
    values *= len(values) / values.sum()
    return dict(zip(layers, values.tolist(), strict=True))
