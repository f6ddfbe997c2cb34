"""What a tuning method is asked and what it gives back; the training loop knows nothing else about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from medlore.errors import InputError
from medlore.files import atomic_folder
from medlore.layers import surgery
from medlore.layers.tuning.modules import AddedModules

if TYPE_CHECKING:
    from medlore.ranks.plan import RankPlan

PartialUpdate = Literal["off", "nested", "single"]
ComponentMasking = Literal["off", "shapley"]
Form = Literal["adapter", "weights", "model"]  # a PEFT folder; the trained tensors alone; the whole network
WEIGHTS_FILE = "trained.safetensors"
TRAINED_NAMES = "trained"  # in that file's header: a JSON list of all its tensors


@dataclass(frozen=True)
class Request:
    """What a method may ask for.

    Attributes:
        plan: ranks and alphas of the factor pairs; None for methods without factors.
        head: module name of the head, which every method trains.
        seed: of the random factors and draws.
        steps: optimiser steps of the whole run.
        partial_update: stochastic partial update of SR-LoRA.
        component_masks: random masks over the components, guided by Shapley values.
        dropout: probability on the input of the factors.
        options: name -> value of options that single methods have; each takes its own.
        sample: (b, c, h, w) one small normalised batch.
        batches: a few normalised training batches, for methods that look at the data (EVA).
    """

    head: str
    sample: Tensor
    plan: RankPlan | None = None
    seed: int = 0
    steps: int = 1
    partial_update: PartialUpdate = "off"
    component_masks: ComponentMasking = "off"
    dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    batches: Callable[[], list[Tensor]] = list


def _nothing(*_: Any) -> None:
    return None


def _no_state() -> dict[str, Any]:
    return {}


@dataclass
class Tuning:
    """One method installed in one model.

    Attributes:
        model: what is trained; `model(pixel_values=x).logits`.
        form: what `save` writes.
        save: write what was learnt into a new folder.
        merged: the network for inference with the same output, plain again where the method can be merged; the tuning is used
            up by it.
        before_step: called before the forward pass of every step.
        penalty: a scalar that is added to the loss of every step; None for methods without one.
        after_backward: called with the step number (from 0) when gradients are there, after the optimiser's step.
        state: what besides tensors must survive a kill.
        restore: puts that back.
        head_only: only the head trains, so its inputs can be computed once.
        modules: what must be added to a backbone before trained tensors of the form `weights` fit; None for nothing.
        notes: for the report.
    """

    model: nn.Module
    form: Form
    save: Callable[[Path], None]
    merged: Callable[[], nn.Module]
    before_step: Callable[[], object] = _nothing
    penalty: Callable[[], Tensor] | None = None
    after_backward: Callable[[int], None] = _nothing
    state: Callable[[], dict[str, Any]] = _no_state
    restore: Callable[[dict[str, Any]], None] = _nothing
    head_only: bool = False
    modules: AddedModules | None = None
    notes: tuple[str, ...] = ()


def plan_of(request: Request) -> RankPlan:
    """The plan of a request.

    Raises:
        InputError: it has none.
    """
    if request.plan is None:
        raise InputError("plan", "no rank plan", "a RankPlan", "give one, made with medlore.plan_ranks(model)")
    return request.plan


def weights_tuning(model: nn.Module, notes: tuple[str, ...] = ()) -> Tuning:
    """The tuning of a model whose own parameters train; what is saved are the trained tensors alone."""

    def save(folder: Path) -> None:
        from safetensors.torch import save_file

        state = {name: tensor.contiguous().cpu() for name, tensor in surgery.trainable_state(model).items()}
        with atomic_folder(folder) as temporary:
            save_file(state, temporary / WEIGHTS_FILE, metadata={TRAINED_NAMES: json.dumps(list(state))})

    return Tuning(model=model, form="weights", save=save, merged=lambda: model, notes=notes)
