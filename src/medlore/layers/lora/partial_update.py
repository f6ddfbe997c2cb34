"""Stochastic partial update: every training step uses the first b components of each factor pair, b drawn anew.

For each factor pair of rank r and each step, b ~ U{1..r} from one seeded generator, and the update is
(alpha / b) · B[:, :b] A[:b]. `nested` trains all b components; `single` trains component b alone, the others take part without a
gradient. On a fused qkv layer q and v are drawn apart, each from its own nested factors. Evaluation, merging and saving use the
full rank with the ordinary scaling, so they are deterministic and the state dict is that of the model without partial update.

Source: the idea is that of DyLoRA (Valipour et al., EACL 2023) as SR-LoRA (Zhang et al., ICCV 2025) uses it; in their released
code q and v share rows of the factors under truncation and inference draws at random, which is not reproduced here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.layers.lora.fused_attention import AttentionLora
from medlore.layers.lora.fused_factors import BlockFactor, StackedFactor
from medlore.layers.lora.truncation import PartialMode, Truncation

MODES: tuple[PartialMode, ...] = get_args(PartialMode)


class PartialUpdate:
    """The draws of all factor pairs of one model.

    Call `draw()` before each training step. `state_dict()` holds the generator and the draws, for resuming a run exactly.

    Attributes:
        mode: `off`, `nested` or `single`.
        truncations: name of the factor pair -> its current truncation.
        generator: where the draws come from.
    """

    def __init__(self, mode: PartialMode, seed: int) -> None:
        self.mode = mode
        self.truncations: dict[str, Truncation] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._replaced: list[tuple[nn.ModuleDict, str, nn.Module]] = []
        self._fused: list[StackedFactor | BlockFactor] = []

    def draw(self) -> dict[str, int]:
        """Draw b for every factor pair, in the order of the model; returns name -> b."""
        drawn = {}
        for name, truncation in self.truncations.items():
            truncation.active = int(torch.randint(1, truncation.rank + 1, (), generator=self.generator))
            drawn[name] = truncation.active
        return drawn

    def remove(self) -> None:
        """Put the original modules back; parameters are the same objects throughout."""
        for container, adapter, original in self._replaced:
            original.train(container[adapter].training)
            container[adapter] = original
        for factor in self._fused:
            factor.truncations = {}
        self.truncations, self._replaced, self._fused = {}, [], []

    def state_dict(self) -> dict[str, Any]:
        """Mode, generator state and current draws."""
        return {
            "mode": self.mode,
            "generator": self.generator.get_state(),
            "active": {name: t.active for name, t in self.truncations.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken.

        Raises:
            InputError: the state belongs to another mode or another model.
        """
        if state.get("mode") != self.mode or set(state.get("active", ())) != set(self.truncations):
            raise InputError(
                "state of the partial update",
                f"mode {state.get('mode')!r} with {len(state.get('active', ()))} factor pairs",
                f"mode {self.mode!r} with {len(self.truncations)}",
                "resume the run with its own settings",
            )
        self.generator.set_state(state["generator"])
        for name, active in state["active"].items():
            self.truncations[name].active = active


class PartialLinear(nn.Linear):
    """PEFT's linear factor with a truncation; shares its parameter, so names and optimisers do not notice."""

    def __init__(self, original: nn.Linear, truncation: Truncation, *, is_A: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias
        self.truncation, self.is_A = truncation, is_A
        self.train(original.training)

    def active_weight(self) -> Tensor:
        """The components of this step while training, all of them otherwise."""
        if not self.training:
            return self.weight
        return self.truncation.rows(self.weight) if self.is_A else self.truncation.columns(self.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(..., in) -> (..., b) for lora_A, (..., b) -> (..., out) for lora_B."""
        return F.linear(input, self.active_weight(), self.bias)


class PartialConv(nn.Module):
    """PEFT's convolutional factor with a truncation; shares its parameter."""

    def __init__(self, original: Any, truncation: Truncation, *, is_A: bool) -> None:
        super().__init__()
        self.weight, self.bias = original.weight, original.bias
        self._original = (original,)  # in a tuple, so that it is no submodule with parameters of its own
        self.truncation, self.is_A = truncation, is_A
        self.train(original.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(b, in, ...) -> (b, components, ...) for lora_A, and back to the output channels for lora_B."""
        weight: Tensor = self.weight
        if self.training:
            weight = self.truncation.rows(weight) if self.is_A else self.truncation.columns(weight)
        made: Tensor = self._original[0]._conv_forward(input, weight, self.bias)
        return made


def install_partial_update(model: nn.Module, mode: PartialMode, *, seed: int = 0, adapter_name: str = "default") -> PartialUpdate:
    """Let the LoRA layers of a PEFT model train with random truncations.

    Args:
        model: a PEFT model with LoRA layers, from `medlore.get_peft_model` or from PEFT.
        mode: `off` (nothing is installed), `nested` or `single`.
        seed: of the draws.
        adapter_name: PEFT's name of the adapter.

    Returns:
        The handle; call its `draw()` before each step. Until the first draw all components are used.

    Raises:
        UnknownNameError: no such mode.
        TargetError: no LoRA layer, or layers for which the update is not defined (DoRA, embeddings, PEFT's own attention layer).
    """
    if mode not in MODES:
        raise UnknownNameError("--partial-update", str(mode), MODES)
    handle = PartialUpdate(mode, seed)
    if mode == "off":
        return handle
    layers = list(_lora_layers(model, adapter_name))
    faults = [fault for name, layer in layers if (fault := _unsupported(name, layer, adapter_name))]
    if faults or not layers:
        raise TargetError(
            "--partial-update",
            f"{len(faults)} layers cannot take it" if faults else f"no LoRA layer of adapter {adapter_name!r}",
            "plain LoRA on linear and convolution layers",
            "build the model with medlore.get_peft_model" if faults else "install the adapter first",
            faults=faults,
        )
    for name, layer in layers:
        _install(handle, name, layer, adapter_name)
    return handle


def _lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, peft_layer.LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
            yield name, module


def _unsupported(name: str, layer: Any, adapter: str) -> str | None:
    if adapter in layer.lora_embedding_A:
        return f"{name}: an embedding"
    if adapter in layer.lora_variant:
        return f"{name}: a LoRA variant ({type(layer.lora_variant[adapter]).__name__})"
    if isinstance(layer, peft_layer.MultiheadAttention) and not isinstance(layer, AttentionLora):
        return f"{name}: PEFT's own attention layer, which merges at every step"
    if isinstance(layer.lora_A[adapter], PartialLinear | PartialConv) or getattr(layer.lora_A[adapter], "truncations", None):
        return f"{name}: a partial update is installed already"
    return None


def _install(handle: PartialUpdate, name: str, layer: Any, adapter: str) -> None:
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    rslora = bool(layer.use_rslora.get(adapter, False))
    if isinstance(A, StackedFactor):
        for part in A.part_names:
            truncation = Truncation(len(A.part(part)), handle.mode, use_rslora=B.use_rslora)
            A.truncations[part] = B.truncations[part] = truncation
            handle.truncations[f"{name}[{part}]"] = truncation
        handle._fused += [A, B]
        return
    truncation = Truncation(layer.r[adapter], handle.mode, use_rslora=rslora)
    handle.truncations[name] = truncation
    kind = PartialLinear if isinstance(A, nn.Linear) else PartialConv
    for container, factor, is_A in ((layer.lora_A, A, True), (layer.lora_B, B, False)):
        container[adapter] = kind(factor, truncation, is_A=is_A)
        handle._replaced.append((container, adapter, factor))
