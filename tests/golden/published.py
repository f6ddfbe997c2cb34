"""Files of exactly the published key form, filled by formula: prefixes, wrappers and copies included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden.formula import formula_weight
from medlore.linalg.factors import factor_shapes
from medlore.models.segmenter.checkpoints import expected_shapes
from medlore.models.segmenter.network import SegmenterConfig, expert_targets

Shapes = dict[str, tuple[int, ...]]

TINY = SegmenterConfig(
    features=(4, 6, 8),
    strides=(1, 2, 2),
    patch=32,
    query_width=24,
    projection_width=20,
    mask_width=12,
    feedforward=16,
    decoder_layers=2,
)
LORKD_NANO_RANKS = (12, 10, 10, 4, 8, 8, 12, 2)
LORKD_PRO_RANKS = (4, 4, 4, 4, 4, 16, 12, 12)


def sat_shapes(config: SegmenterConfig) -> Shapes:
    """SAT: `module.` in front, every convolution block twice."""
    shapes: Shapes = {}
    for name, shape in expected_shapes(config).items():
        shapes[f"module.{name}"] = shape
        if ".convs." in name:
            copy = name.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
            shapes[f"module.{copy}"] = shape
    return shapes


def lorkd_shapes(config: SegmenterConfig, ranks: Sequence[int]) -> Shapes:
    """LoRKD: `model.module.` in front, inner names of the adapter, factors, and the whole U-Net again under `unet.`."""
    shapes: Shapes = {}
    own = expected_shapes(config)
    for name, shape in own.items():
        shapes[f"model.module.{_adapter_name(name)}"] = shape
    for target, units in expert_targets(config).items():
        layer = _adapter_name(f"{target}.weight").removesuffix(".conv.weight")
        for expert, rank in enumerate(ranks):
            lora_A, lora_B = factor_shapes(own[f"{target}.weight"], rank * units, "interleaved")
            shapes[f"model.module.{layer}.lora_A_list.{expert}"] = lora_A
            shapes[f"model.module.{layer}.lora_B_list.{expert}"] = lora_B
    copies = {n.replace("model.module.backbone.", "unet."): s for n, s in shapes.items() if n.startswith("model.module.backbone.")}
    return {**shapes, **copies}


def filled(shapes: Shapes) -> dict[str, Tensor]:
    """Weights by formula; a copy is its original, so that torch.save stores both once, as in the published files."""
    origins = {name: _origin(name) for name in shapes}
    weights = {origin: formula_weight(origin, shapes[name]) for name, origin in origins.items()}
    return {name: weights[origin] for name, origin in origins.items()}


def write_published(path: Path, state: Mapping[str, Tensor], *, training: bool = True) -> Path:
    """The wrapper of the published files; with the optimiser's state and the step beside the weights."""
    content: dict[str, Any] = {"model_state_dict": dict(state)}
    if training:
        moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}
        content |= {"optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}, "step": 7}
    torch.save(content, path)
    return path


def _adapter_name(name: str) -> str:
    if ".convs." not in name:
        return name
    return name.replace(".convs.", ".stages.").replace(".conv.", ".conv.conv.")


def _origin(name: str) -> str:
    """The name that the golden numbers were filled by."""
    name = name.removeprefix("model.module.").removeprefix("module.")
    name = name.replace("unet.", "backbone.", 1) if name.startswith("unet.") else name
    return name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
