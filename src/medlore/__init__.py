"""MedLoRE: medical low-rank experts.

Certified, data-free LoRA ranks from the stable rank of pre-trained weights; few-shot tuning with them; decomposition of
a medical foundation model into a shared base and low-rank experts; text-prompted 3D segmentation with those experts.

The names below are loaded on first use, so that ``import medlore`` costs no torch.
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
    "finetune": "medlore.tuning.finetune",
    "get_peft_model": "medlore.layers.lora.fused_qkv",
    "load_backbone": "medlore.models.backbones.reading",
    "load_segmenter": "medlore.segmenting.segmenter",
    "plan_ranks": "medlore.ranks.allocate",
}

__all__ = [
    "FinetuneSettings",
    "MedloreError",
    "RankPlan",
    "__version__",
    "finetune",
    "get_peft_model",
    "load_backbone",
    "load_segmenter",
    "plan_ranks",
]

if TYPE_CHECKING:
    from medlore.errors import MedloreError
    from medlore.layers.lora.fused_qkv import get_peft_model
    from medlore.models.backbones.reading import load_backbone
    from medlore.ranks.allocate import plan_ranks
    from medlore.ranks.plan import RankPlan
    from medlore.segmenting.segmenter import load_segmenter
    from medlore.tuning.finetune import finetune
    from medlore.tuning.settings import FinetuneSettings


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'medlore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
