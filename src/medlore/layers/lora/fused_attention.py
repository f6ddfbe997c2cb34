"""LoRA on `nn.MultiheadAttention`: PEFT's layer without its two faults (drifting base weights, a fast path around the update)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn


class AttentionLora(peft_layer.MultiheadAttention):
    """PEFT's layer for `nn.MultiheadAttention` with a forward that leaves the base weights alone.

    PEFT adds the update to the base weights before each forward and subtracts it afterwards, which makes them drift; here the
    sum is handed to one call. Saving, merging and loading are PEFT's.
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `nn.MultiheadAttention`."""
        self._check_forward_args(query, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return super().forward(query, *args, **kwargs)
        attention = self.get_base_layer()
        weights = {
            "in_proj_weight": attention.in_proj_weight + self._update(self, attention.in_proj_weight),
            "out_proj.base_layer.weight": attention.out_proj.weight
            + times_out_proj_is_added() * self._update(attention.out_proj, attention.out_proj.weight),
        }
        return torch.func.functional_call(attention, weights, (query, *args), kwargs)

    def _update(self, layer: Any, base: Tensor) -> Tensor:
        total = torch.zeros_like(base)
        for name in self.active_adapters:
            if name in layer.lora_A:
                A, B = layer.lora_A[name], layer.lora_B[name]
                total = total + (_active(B) @ _active(A) * layer.scaling[name]).to(base.dtype)
        return total


@functools.cache
def times_out_proj_is_added() -> int:
    """How often the installed PEFT adds the update of the output projection of `nn.MultiheadAttention`: 2 up to 0.21.2.

    Those versions add it by hand and then once more (huggingface/peft, pull request 3774). It is measured on a tiny layer, and the
    factors that PEFT sees are divided by it, so that forward, merging and plain loading agree in every version.
    """
    import peft

    attention = nn.MultiheadAttention(2, 1, bias=False)
    nn.init.zeros_(attention.out_proj.weight)
    tuned = peft.get_peft_model(nn.ModuleDict({"attn": attention}), peft.LoraConfig(r=1, lora_alpha=1, target_modules="attn"))
    layer = tuned.base_model.model.attn
    for factor in (layer.base_layer.out_proj.lora_A["default"], layer.base_layer.out_proj.lora_B["default"]):
        nn.init.ones_(factor.weight)
    layer.merge()
    merged: Tensor = layer.base_layer.out_proj.get_base_layer().weight
    return round(merged.detach()[0, 0].item())


def forbid_fast_path(model: nn.Module, name: str) -> None:
    """`nn.TransformerEncoderLayer` in evaluation reads the base weights past its attention layer; these flags stop that."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0
        elif isinstance(owner, nn.TransformerEncoder):
            owner.use_nested_tensor = False  # nested tensors are for that fast path alone


def _active(factor: Any) -> Tensor:
    """The weight that a factor uses in this step; PEFT's own factors use all of it."""
    weight: Tensor = factor.active_weight() if hasattr(factor, "active_weight") else factor.weight
    return weight
