"""Targets are found by structure in every family's names; decoys, decoders and heads are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from torch import nn

import medlore
from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.ranks.targets import find_targets, natural_key

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**WIDTHS, "image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
DINO = {k: v for k, v in IMAGE.items() if k != "intermediate_size"}
MAE = {
    **IMAGE,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}

# class, configuration class, configuration, MLP matrices a block
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE, 2),
    "deit": ("DeiTModel", "DeiTConfig", IMAGE, 2),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN, 2),
    "swinv2": ("Swinv2Model", "Swinv2Config", SWIN, 2),
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, 2),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}, 3),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE, 2),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE, 2),
    "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", MAE, 2),
    "beit": ("BeitModel", "BeitConfig", IMAGE, 2),
    "bert": ("BertModel", "BertConfig", WIDTHS | {"vocab_size": 40}, 2),
    "mpnet": ("MPNetModel", "MPNetConfig", WIDTHS | {"vocab_size": 40}, 2),
}


def build(family: str) -> nn.Module:
    model, config, options, _ = FAMILIES[family]
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return built


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_families_as_modules_and_as_folders(family: str, tmp_path: Path) -> None:
    model = build(family)
    plan = medlore.plan_ranks(model, targets="attention+mlp")
    counts = {part: sum(x.part == part for x in plan.layers) for part in ("q", "k", "v", "o", "mlp")}
    assert counts == {"q": 2, "k": 0, "v": 2, "o": 2, "mlp": 2 * FAMILIES[family][3]}
    assert plan.layout == "transformers"
    assert not any("decoder" in x.name or "head" in x.name or "pooler" in x.name for x in plan.layers)
    model.save_pretrained(tmp_path)  # files keep the names of transformers 4 for most families
    saved = medlore.plan_ranks(tmp_path, targets="attention")
    direct = medlore.plan_ranks(model, targets="attention")
    assert (saved.sha256, [x.name for x in saved.layers]) == (direct.sha256, [x.name for x in direct.layers])
    from_file = medlore.plan_ranks(tmp_path / "model.safetensors")
    assert from_file.for_model(model).layers == direct.layers
    tuned = peft.get_peft_model(model, saved.to_lora_config())
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == plan_parameters(saved)


def plan_parameters(plan: medlore.RankPlan) -> int:
    return sum(x.rank * (x.shape[0] + x.shape[1]) for x in plan.layers)


def shapes_of_block(prefix: str = "blocks.0", d: int = 8) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attn.qkv.weight": (3 * d, d),
        f"{prefix}.attn.proj.weight": (d, d),
        f"{prefix}.attn.q_norm.weight": (d,),
        f"{prefix}.norm1.weight": (d,),
        f"{prefix}.mlp.fc1.weight": (4 * d, d),
        f"{prefix}.mlp.fc2.weight": (d, 4 * d),
    }


def names(shapes: dict[str, tuple[int, ...]], wanted: str, **options: Any) -> list[tuple[str, str]]:
    return [(t.name, t.part) for t in find_targets(shapes, wanted, **options).targets]


def test_sets_of_targets() -> None:
    shapes = shapes_of_block() | {
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "pos_embed.weight": (5, 8),
        "blocks.0.attn.relative_position_bias_table": (9, 2),
        "neck.weight": (6, 8),
        "head.weight": (10, 8),
    }
    attention = [("blocks.0.attn.qkv", "q"), ("blocks.0.attn.qkv", "v"), ("blocks.0.attn.proj", "o")]
    mlp = [("blocks.0.mlp.fc1", "mlp"), ("blocks.0.mlp.fc2", "mlp")]
    assert names(shapes, "attention") == attention
    assert names(shapes, "attention", include_k=True)[1] == ("blocks.0.attn.qkv", "k")
    assert names(shapes, "attention+mlp") == attention + mlp
    assert names(shapes, "all-linear") == [*attention, *mlp, ("neck", "linear")]
    assert names(shapes, "conv") == [("patch_embed.proj", "conv")]
    assert names(shapes, r".*\.fc1|neck") == [("blocks.0.mlp.fc1", "mlp"), ("neck", "linear")]
    assert names(shapes, r"blocks\.0\.attn\.qkv") == attention[:2]


def test_targets_without_values_are_refused_by_name() -> None:
    shapes = shapes_of_block() | {"blocks.0.attn.proj.weight": (8, 0), "neck.weight": (0, 8), "conv.weight": (4, 0, 3, 3)}
    for wanted, fault in (
        ("attention", "blocks.0.attn.proj.weight (o): 8 x 0"),
        ("all-linear", "neck.weight (linear): 0 x 8"),
        ("conv", "conv.weight (conv): 4 x 0"),
        ("neck", "neck.weight (linear): 0 x 8"),
    ):
        with pytest.raises(TargetError, match="without values") as caught:
            find_targets(shapes, wanted)
        assert fault in caught.value.faults
    assert names(shapes, r".*fc1") == [("blocks.0.mlp.fc1", "mlp")]


def test_depth_order_is_numeric() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in (10, 9, 1, 0):
        shapes |= shapes_of_block(f"blocks.{i}")
    found = find_targets(shapes, "attention").targets
    assert [t.name for t in found if t.part == "o"] == [f"blocks.{i}.attn.proj" for i in (0, 1, 9, 10)]
    assert [t.block for t in found if t.part == "o"] == [0, 1, 2, 3]
    assert natural_key("blocks.10") > natural_key("blocks.9")


@pytest.mark.parametrize("decoy", ["decoder_blocks.0", "decoder.decoder_layers.0", "momentum_encoder.blocks.0", "teacher.blocks.0"])
def test_auxiliary_blocks_do_not_count(decoy: str) -> None:
    assert len(names(shapes_of_block() | shapes_of_block(decoy, d=4), "attention+mlp")) == 5
    assert len(names(shapes_of_block(decoy), "attention+mlp")) == 5  # nothing else is there


def test_rows_of_a_fused_matrix() -> None:
    found = find_targets(shapes_of_block(), "attention", include_k=True).targets
    assert [(t.part, t.rows, t.shape) for t in found] == [
        ("q", (0, 8), (8, 8)),
        ("k", (8, 16), (8, 8)),
        ("v", (16, 24), (8, 8)),
        ("o", None, (8, 8)),
    ]


def test_unequal_splits_are_no_qkv() -> None:
    with pytest.raises(TargetError, match="no weight answers"):
        names({"blocks.0.attn.qkv.weight": (20, 8)}, "attention")


def test_convolutions_of_a_module_and_of_a_file() -> None:
    model = nn.Sequential(
        nn.Conv3d(4, 8, (3, 3, 1)), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2), nn.Conv1d(4, 6, 1), nn.Embedding(3, 4)
    )
    plan = medlore.plan_ranks(model, targets="conv")
    assert [(x.name, x.shape) for x in plan.layers] == [("0", (8, 36)), ("3", (6, 4))]
    assert names({"0.weight": (8, 4, 3, 3, 1), "1.weight": (8, 1, 3, 3)}, "conv") == [("0", "conv")]


@pytest.mark.parametrize(
    ("wanted", "kind", "text"),
    [
        ("atention", UnknownNameError, "nearest are 'attention'"),
        (r".*\.nothing", TargetError, "no weight answers"),
        ("blocks.(", InputError, "is not a valid regular expression"),
        ("conv", TargetError, r"the 4 matrices here start with blocks\.0\.attn\.proj\.weight"),
    ],
)
def test_targets_that_meet_nothing(wanted: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        names(shapes_of_block(), wanted)
