"""A trained segmenter as a pack: weights in the type of the study, learned prompts, regions, preprocessing, licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlore.decomposing.segmenters.cohort import Cohort
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.settings import SegmentationSettings
from medlore.models.segmenter.bundle import write_segmenter_pack
from medlore.models.segmenter.checkpoints import Expert, SegmenterWeights
from medlore.models.segmenter.experts import collect_weights
from medlore.models.segmenter.prompts import PromptTable


def write_trained_pack(path: Path, network: PromptedSegmenter, cohort: Cohort, settings: SegmentationSettings, *, role: str) -> Path:
    """Write the pack of a teacher or of a student with experts.

    Args:
        path: the folder.
        network: with its table of prompts.
        cohort: whose prompts and regions are written.
        settings: of the study.
        role: what the network is, for the manifest.
    """
    weights = in_type(collect_weights(network.segmenter), settings.weights)
    table = PromptTable(cohort.keys, _stored(network.prompts.detach().cpu(), settings.weights))
    data = [{"name": e.name, "licence": e.licence, **({"note": e.note} if e.note else {})} for e in settings.data]
    about = {"study": settings.name, "role": role, "weights": settings.weights, "data": data, "settings": settings.model_dump(mode="json")}
    preprocessing = {**settings.full_preprocessing, "label_regions": cohort.label_regions()}
    return write_segmenter_pack(path, weights, prompts=table, preprocessing=preprocessing, about=about)


def smallest_type(tensor: Tensor) -> Tensor:
    """The same numbers in 16 bits where nothing is lost by it: what came out of a pack in fp16 goes into the next one so."""
    half = tensor.half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def without_loss(weights: SegmenterWeights) -> SegmenterWeights:
    """Every tensor of base and experts in its smallest exact type."""
    experts = {
        region: replace(expert, pairs={t: (smallest_type(a), smallest_type(b)) for t, (a, b) in expert.pairs.items()})
        for region, expert in weights.experts.items()
    }
    return replace(weights, base={name: smallest_type(tensor) for name, tensor in weights.base.items()}, experts=experts)


def in_type(weights: SegmenterWeights, kind: str) -> SegmenterWeights:
    """The weights as they are stored: fp16 or fp32."""
    experts = {
        region: Expert({t: (_stored(a, kind), _stored(b, kind)) for t, (a, b) in expert.pairs.items()}, expert.scaling, expert.layout)
        for region, expert in weights.experts.items()
    }
    return replace(weights, base=_all_stored(weights.base, kind), experts=experts)


def _all_stored(state: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    return {name: _stored(tensor, kind) for name, tensor in state.items()}


def _stored(tensor: Tensor, kind: str) -> Tensor:
    return tensor.half() if kind == "fp16" and tensor.dtype == torch.float32 else tensor
