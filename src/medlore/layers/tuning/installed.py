"""Tunings of methods that add something to the network: modules beside its layers, and factor pairs that are saved as LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from medlore.layers import surgery
from medlore.layers.adapter_folder import write_lora_folder
from medlore.layers.tuning.attach import fold
from medlore.layers.tuning.factor_pairs import PairKind, install_pairs, pairs_of
from medlore.layers.tuning.interface import Request, Tuning, plan_of, weights_tuning
from medlore.layers.tuning.modules import AddedModules, absorb

Add = Callable[[nn.Module, Any, dict[str, int], str], None]


def tune_modules(kind: str, add: Add, model: nn.Module, request: Request, options: Any, *, ranked: bool) -> Tuning:
    """Freeze the network, add the modules of a method and train them and the head.

    Args:
        kind: the method.
        add: puts its modules into a network: model, options, layer -> rank, name of the head.
        model: the backbone.
        request: head and plan.
        options: of the method.
        ranked: whether its modules have the ranks of the plan.
    """
    ranks = {}
    if ranked:
        ranks = {layer.name: layer.rank for layer in plan_of(request).for_model(model, check=False).layers}
    added = AddedModules(kind, asdict(options), ranks)
    surgery.freeze(model)
    add(model, options, ranks, request.head)
    surgery.thaw_head(model, request.head)
    tuning = weights_tuning(model)
    tuning.modules, tuning.merged = added, lambda: absorb(model)
    return tuning


def tune_pairs(kind: PairKind, model: nn.Module, request: Request, options: Any) -> Tuning:
    """Freeze the network, add pairs of `kind` by the plan and train them and the head; saved as an ordinary LoRA folder."""
    plan = plan_of(request).for_model(model, check=False)
    surgery.freeze(model)
    install_pairs(model, kind, plan, dropout=request.dropout, options=options)
    surgery.thaw_head(model, request.head)
    config: Any = getattr(model, "config", None)
    base = str(getattr(config, "name_or_path", ""))

    def save(folder: Path) -> None:
        write_lora_folder(folder, pairs_of(model), head={request.head: model.get_submodule(request.head)}, base=base)

    return Tuning(model=model, form="adapter", save=save, merged=lambda: fold(model))
