"""MedLoRE: medical low-rank experts.

Certified, data-free LoRA ranks from the stable rank of pre-trained weights; few-shot tuning with them; decomposition of
a medical foundation model into a shared base and low-rank experts; text-prompted 3D segmentation with those experts.

The names below are all that is public. They are loaded on first use, so that ``import medlore`` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that holds it; sorted
_HOMES = {
    "FinetuneSettings": "medlore.tuning.settings",
    "MedloreError": "medlore.errors",
    "RankPlan": "medlore.ranks.plan",
    "SegmentSettings": "medlore.segmenting.settings",
    "classification_report": "medlore.metrics.classification",
    "collect_weights": "medlore.models.segmenter.experts",
    "decompose": "medlore.decomposing.decompose",
    "draw_shots": "medlore.data.images.fewshot",
    "finetune": "medlore.tuning.finetune",
    "get_peft_model": "medlore.layers.lora.fused_qkv",
    "install_experts": "medlore.layers.experts.surgery",
    "install_partial_update": "medlore.layers.lora.partial_update",
    "load_adapter": "medlore.layers.lora.fused_qkv",
    "load_backbone": "medlore.models.backbones.reading",
    "load_segmenter": "medlore.segmenting.segmenter",
    "merge": "medlore.layers.experts.surgery",
    "plan_ranks": "medlore.ranks.allocate",
    "quicken": "medlore.layers.lora.step",
    "read_images": "medlore.data.images.reading",
    "read_official_draw": "medlore.data.images.fewshot",
    "read_volume": "medlore.data.volumes.preparation",
    "route": "medlore.layers.experts.routing",
    "save_adapter": "medlore.layers.lora.fused_qkv",
    "segment": "medlore.segmenting.segment",
    "segmenter_with_experts": "medlore.models.segmenter.experts",
    "stable_rank": "medlore.linalg.spectra",
    "uniform_plan": "medlore.ranks.allocate",
    "validate_submission": "medlore.data.images.submission",
    "write_submission": "medlore.data.images.submission",
}

__all__ = [
    "FinetuneSettings",
    "MedloreError",
    "RankPlan",
    "SegmentSettings",
    "__version__",
    "classification_report",
    "collect_weights",
    "decompose",
    "draw_shots",
    "finetune",
    "get_peft_model",
    "install_experts",
    "install_partial_update",
    "load_adapter",
    "load_backbone",
    "load_segmenter",
    "merge",
    "plan_ranks",
    "quicken",
    "read_images",
    "read_official_draw",
    "read_volume",
    "route",
    "save_adapter",
    "segment",
    "segmenter_with_experts",
    "stable_rank",
    "uniform_plan",
    "validate_submission",
    "write_submission",
]

if TYPE_CHECKING:
    from medlore.data.images.fewshot import draw_shots, read_official_draw
    from medlore.data.images.reading import read_images
    from medlore.data.images.submission import validate_submission, write_submission
    from medlore.data.volumes.preparation import read_volume
    from medlore.decomposing.decompose import decompose
    from medlore.errors import MedloreError
    from medlore.layers.experts.routing import route
    from medlore.layers.experts.surgery import install_experts, merge
    from medlore.layers.lora.fused_qkv import get_peft_model, load_adapter, save_adapter
    from medlore.layers.lora.partial_update import install_partial_update
    from medlore.layers.lora.step import quicken
    from medlore.linalg.spectra import stable_rank
    from medlore.metrics.classification import classification_report
    from medlore.models.backbones.reading import load_backbone
    from medlore.models.segmenter.experts import collect_weights, segmenter_with_experts
    from medlore.ranks.allocate import plan_ranks, uniform_plan
    from medlore.ranks.plan import RankPlan
    from medlore.segmenting.segment import segment
    from medlore.segmenting.segmenter import load_segmenter
    from medlore.segmenting.settings import SegmentSettings
    from medlore.tuning.finetune import finetune
    from medlore.tuning.settings import FinetuneSettings


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'medlore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
