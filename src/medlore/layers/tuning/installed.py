"""The methods of this folder as tunings: added modules, factor pairs that are saved as LoRA, layer norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from medlore.layers import surgery
from medlore.layers.adapter_folder import write_lora_folder
from medlore.layers.tuning.attach import fold
from medlore.layers.tuning.factor_pairs import PairKind, install_pairs, pairs_of
from medlore.layers.tuning.interface import Request, Tuning, plan_of, weights_tuning
from medlore.layers.tuning.modules import AddedModules, ModuleKind, absorb, add_modules
from medlore.layers.tuning.scale_shift import thaw_norms


def tune_modules(kind: ModuleKind, model: nn.Module, request: Request) -> Tuning:
    """Freeze the network, add the modules of `kind` and train them and the head."""
    ranks = {}
    if kind == "glora":
        ranks = {layer.name: layer.rank for layer in plan_of(request).for_model(model, check=False).layers}
    added = AddedModules(kind, request.options, ranks)
    surgery.freeze(model)
    add_modules(model, added, request.head)
    surgery.thaw_head(model, request.head)
    tuning = weights_tuning(model)
    tuning.modules, tuning.merged = added, lambda: absorb(model)
    return tuning


def tune_pairs(kind: PairKind, model: nn.Module, request: Request) -> Tuning:
    """Freeze the network, add pairs of `kind` by the plan and train them and the head; saved as an ordinary LoRA folder."""
    plan = plan_of(request).for_model(model, check=False)
    surgery.freeze(model)
    install_pairs(model, kind, plan, dropout=request.dropout, options=request.options)
    surgery.thaw_head(model, request.head)
    config: Any = getattr(model, "config", None)
    base = str(getattr(config, "name_or_path", ""))

    def save(folder: Path) -> None:
        write_lora_folder(folder, pairs_of(model), head={request.head: model.get_submodule(request.head)}, base=base)

    return Tuning(model=model, form="adapter", save=save, merged=lambda: fold(model))


def tune_norms(model: nn.Module, request: Request) -> Tuning:
    """Train the layer norms and the head."""
    surgery.freeze(model)
    thaw_norms(model)
    surgery.thaw_head(model, request.head)
    unused = surgery.freeze_unused(model, request.sample)
    notes = (f"frozen because no gradient reaches them: {', '.join(unused)}",) if unused else ()
    return weights_tuning(model, notes)
