"""A segmenter with its experts installed, for training and for batches of several regions; and back to weights for a pack."""

from __future__ import annotations

import torch

from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.surgery import install_experts
from medlore.models.segmenter.checkpoints import Expert, Form, SegmenterWeights
from medlore.models.segmenter.network import Segmenter

_BASE = ".base_layer."


def segmenter_with_experts(weights: SegmenterWeights, *, dropout: float = 0.1) -> Segmenter:
    """A trainable copy of base and experts; choose the expert of each sample with `medlore.layers.experts.routing.route`.

    Args:
        weights: base and experts, from a file, a pack or `collect_weights`; they are copied, not shared.
        dropout: in the query decoder, in train mode.
    """
    model = Segmenter(weights.config, dropout=dropout)
    model.load_state_dict(weights.base)
    ranks = {(target, name): rank for name, expert in weights.experts.items() for target, rank in expert.ranks(weights.base).items()}
    if not ranks:
        return model
    targets = {target for target, _ in ranks}
    layout = next(iter(weights.experts.values())).layout
    install_experts(model, experts=list(weights.experts), ranks=ranks, targets=lambda name, _: name in targets, layout=layout)
    for target, layer in _expert_layers(model).items():
        with torch.no_grad():
            for name, expert in weights.experts.items():
                if target in expert.pairs:
                    layer.lora_A[name].copy_(expert.pairs[target][0])
                    layer.lora_B[name].copy_(expert.pairs[target][1])
                    layer.scaling[name] = expert.scaling[target]
    return model


def collect_weights(model: Segmenter) -> SegmenterWeights:
    """Base and experts of a network with experts installed, under canonical names; copies on the CPU, ready for a pack."""
    layers = _expert_layers(model)
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}
    base = {name.replace(_BASE, "."): tensor for name, tensor in state.items()}
    regions = next(iter(layers.values())).experts if layers else ()
    experts = {
        region: Expert(
            pairs={t: _copies(layer, region) for t, layer in layers.items() if layer.ranks[region]},
            scaling={t: layer.scaling[region] for t, layer in layers.items() if layer.ranks[region]},
            layout=next(iter(layers.values())).layout,
        )
        for region in regions
    }
    return SegmenterWeights(model.config, base, experts, form=_form(layers))


def _form(layers: dict[str, ExpertLayer]) -> Form:
    if not layers:
        return "plain"
    equal = all(len(set(layer.ranks.values())) == 1 for layer in layers.values())
    return "balanced" if equal else "imbalanced"


def _copies(layer: ExpertLayer, region: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[region].detach().cpu().clone(), layer.lora_B[region].detach().cpu().clone()


def _expert_layers(model: Segmenter) -> dict[str, ExpertLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLayer)}
