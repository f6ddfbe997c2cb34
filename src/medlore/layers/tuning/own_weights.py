"""Methods that train weights of the network itself and add nothing to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from medlore.files import atomic_folder
from medlore.layers import surgery
from medlore.layers.tuning.interface import Request, Tuning, weights_tuning
from medlore.layers.tuning.options import PartialOptions
from medlore.layers.tuning.scale_shift import thaw_norms


def linear_probe(model: nn.Module, request: Request) -> Tuning:
    """Train the head alone."""
    surgery.freeze(model)
    surgery.thaw_head(model, request.head)
    tuning = weights_tuning(model)
    tuning.head_only = True
    return tuning


def full(model: nn.Module, request: Request) -> Tuning:
    """Train every weight that a gradient reaches."""
    model.requires_grad_(True)
    unused = surgery.freeze_unused(model, request.sample)

    def save(folder: Path) -> None:
        with atomic_folder(folder) as temporary:
            cast("Any", model).save_pretrained(str(temporary))

    return Tuning(model=model, form="model", save=save, merged=lambda: model, notes=_about_unused(unused))


def partial(model: nn.Module, request: Request, options: PartialOptions) -> Tuning:
    """Train the last blocks and the head."""
    surgery.freeze(model)
    chosen = surgery.thaw_last_blocks(model, options.last_blocks)
    surgery.thaw_head(model, request.head)
    unused = surgery.freeze_unused(model, request.sample)
    return weights_tuning(model, notes=(f"trained blocks: {', '.join(chosen)}", *_about_unused(unused)))


def bitfit(model: nn.Module, request: Request) -> Tuning:
    """Train the biases and the head."""
    surgery.freeze(model)
    surgery.thaw_biases(model)
    surgery.thaw_head(model, request.head)
    unused = surgery.freeze_unused(model, request.sample)
    return weights_tuning(model, notes=_about_unused(unused))


def layernorm(model: nn.Module, request: Request) -> Tuning:
    """Train the layer norms and the head."""
    surgery.freeze(model)
    thaw_norms(model)
    surgery.thaw_head(model, request.head)
    unused = surgery.freeze_unused(model, request.sample)
    return weights_tuning(model, notes=_about_unused(unused))


def _about_unused(unused: list[str]) -> tuple[str, ...]:
    return (f"frozen because no gradient reaches them: {', '.join(unused)}",) if unused else ()
