"""A segmenter of free size with random experts, as a pack: what the tests of segmenting run on."""

from __future__ import annotations

from pathlib import Path

import torch

from medlore.models.segmenter.bundle import PUBLISHED_PREPROCESSING, write_segmenter_pack
from medlore.models.segmenter.checkpoints import Expert, SegmenterWeights
from medlore.models.segmenter.network import Segmenter, SegmenterConfig, expert_targets
from medlore.models.segmenter.prompts import PromptTable
from medlore.models.segmenter.vocabulary import default_vocabulary

SIZES = SegmenterConfig(
    (6, 8, 8),
    strides=(1, 2, 2),
    patch=8,
    query_width=24,
    heads=4,
    projection_width=16,
    mask_width=16,
    feedforward=32,
    decoder_layers=2,
)
RANKS = {"abdomen": 2, "thorax": 1, "brain": 1, "spine": 1}


def write_small_pack(
    path: Path,
    *,
    roi_size: tuple[int, int, int] = (48, 48, 16),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 3.0),
    sizes: SegmenterConfig = SIZES,
    seed: int = 0,
    experts: bool = True,
) -> Path:
    """Random base, four random experts, a random embedding for every label of the vocabulary; the published preprocessing."""
    torch.manual_seed(seed)
    base = {name: tensor.clone() for name, tensor in Segmenter(sizes).state_dict().items()}
    made = {region: _expert(base, sizes, rank) for region, rank in RANKS.items()} if experts else {}
    keys = tuple(entry.key for entry in default_vocabulary().entries())
    prompts = PromptTable(keys, torch.randn(len(keys), sizes.query_width))
    rules = {**PUBLISHED_PREPROCESSING, "roi_size": list(roi_size), "spacing_mm": list(spacing_mm)}
    return write_segmenter_pack(path, SegmenterWeights(sizes, base, made, form="imbalanced"), prompts=prompts, preprocessing=rules)


def _expert(base: dict[str, torch.Tensor], sizes: SegmenterConfig, rank: int) -> Expert:
    pairs, scaling = {}, {}
    for target, units in expert_targets(sizes).items():
        out, inputs, k = base[f"{target}.weight"].shape[:3]
        rows = rank * units * k
        spread = 0.2 / (rows * inputs * k * k) ** 0.25
        pairs[target] = (torch.randn(rows, inputs * k * k) * spread, torch.randn(out * k, rows) * spread)
        scaling[target] = 2.0
    return Expert(pairs, scaling)
