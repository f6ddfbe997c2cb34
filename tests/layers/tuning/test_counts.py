"""Exact numbers of trained parameters at full size, on networks without values; head and backbone are counted apart."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from medlore.layers.tuning.generalized import install_generalized
from medlore.layers.tuning.methods import METHODS, Request, install_method
from medlore.layers.tuning.options import TuningOptions
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan

SWIN_WIDTHS = 12032  # Σ width over the 24 blocks of Swin-B


def vit_b() -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=2))


def swin_b() -> Any:
    import transformers

    config = transformers.SwinConfig(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], image_size=384, window_size=12, num_labels=2
    )
    with torch.device("meta"):
        return transformers.SwinForImageClassification(config)


NETWORKS = {"vit": (vit_b, 224), "swin": (swin_b, 384)}


@lru_cache(maxsize=16)
def planned(family: str, rank: int, targets: str) -> RankPlan:
    return plan_ranks(NETWORKS[family][0](), rule=f"uniform:{rank}", targets=targets)


def trained(name: str, family: str, *, rank: int = 8, targets: str = "attention", **changes: Any) -> int:
    """Trained parameters without the head's."""
    make, side = NETWORKS[family]
    model = make()
    plan = None if METHODS[name].rule is None else planned(family, rank, targets)
    sample = torch.empty(1, 3, side, side, device="meta")
    tuned = install_method(name, model, Request(head="classifier", sample=sample, plan=plan, **changes)).model
    return sum(p.numel() for n, p in tuned.named_parameters() if p.requires_grad and "classifier" not in n)


def adapters(widths: int, blocks: int, bottleneck: int) -> int:
    """One Houlsby adapter a block: 2 d m + m + d."""
    return 2 * widths * bottleneck + blocks * bottleneck + widths


VIT_COUNTS: dict[str, tuple[dict[str, Any], int]] = {
    "linear-probe": ({}, 0),
    "full": ({}, 85_798_656),
    "bitfit": ({}, 102_912),
    "partial": ({}, 2 * 7_087_872 + 2 * 768),
    "lora": ({}, 442_368),
    "dora": ({}, 442_368 + 36 * 768),  # one magnitude a row
    "adalora": ({}, 36 * (12 * 1536 + 12)),  # 1.5 times the rank, and singular values
    "dylora": ({}, 442_368),
    "melora": ({}, 110_592),  # mini rank 2
    "moslora": ({}, 442_368 + 36 * 64),  # one mixer a projection
    "capaboost": ({}, 442_368),
    "ssf": ({}, 204_288),
    "vpt-shallow": ({"options": TuningOptions(prompt_length=1)}, 768),
    "vpt-deep": ({}, 12 * 10 * 768),
    "glora": ({}, 1_161_504),
    "adapter": ({}, 2 * adapters(12 * 768, 12, 64)),
    "adaptformer": ({}, 1_189_632),
    "repadapter": ({}, 12 * 2 * (768 * 8 + 8 + 768 * 4 + 768)),
    "layernorm": ({}, 25 * 2 * 768),
}
SWIN_COUNTS: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({}, 577_536),
    "melora": ({}, 144_384),
    "capaboost": ({}, 577_536),
    "ssf": ({}, 2 * (11 * SWIN_WIDTHS + 2 * 128 + 6 * (128 + 256 + 512))),
    "vpt-shallow": ({"options": TuningOptions(prompt_length=5)}, 640),
    "vpt-deep": ({}, 10 * SWIN_WIDTHS),
    "adapter": ({}, 2 * adapters(SWIN_WIDTHS, 24, 64)),
    "adaptformer": ({}, adapters(SWIN_WIDTHS, 24, 64)),
    "repadapter": ({}, 2 * (13 * SWIN_WIDTHS + 24 * 8)),
    "layernorm": ({}, 2 * (128 + 2 * SWIN_WIDTHS + 4 * (128 + 256 + 512) + 1024)),
}


@pytest.mark.parametrize("name", VIT_COUNTS)
def test_vit_b(name: str) -> None:
    changes, expected = VIT_COUNTS[name]
    assert trained(name, "vit", **changes) == expected


@pytest.mark.parametrize("name", SWIN_COUNTS)
def test_swin_b(name: str) -> None:
    changes, expected = SWIN_COUNTS[name]
    assert trained(name, "swin", **changes) == expected


def supports(rows: int, columns: int, rank: int = 8) -> int:
    """A and B: r (m + k); C: r (k + 1); D and E: m."""
    return 2 * rank * (rows + columns) + rank * (columns + 1) + 2 * rows


def test_glora_on_every_linear_layer_of_vit_b() -> None:
    block = 4 * supports(768, 768) + supports(3072, 768) + supports(768, 3072)
    pattern = r".*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
    assert trained("glora", "vit", targets=pattern) == 12 * block == 3_484_224


def test_glora_on_fused_qkv_has_the_published_count() -> None:
    with torch.device("meta"):
        sizes = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
        model = nn.ModuleList([nn.ModuleDict({n: nn.Linear(*s) for n, s in sizes.items()}) for _ in range(12)])
    before = sum(p.numel() for p in model.parameters())
    install_generalized(model, TuningOptions(), {f"{i}.{n}": 8 for i in range(12) for n in sizes})
    assert sum(p.numel() for p in model.parameters()) - before == 3_041_664


def test_a_wider_bottleneck_costs_what_it_should() -> None:
    assert trained("adapter", "vit", options=TuningOptions(bottleneck=8)) == 2 * adapters(12 * 768, 12, 8)
    assert trained("repadapter", "vit", options=TuningOptions(bottleneck=16)) == 12 * 2 * (768 * 16 + 16 + 768 * 8 + 768)
