"""The light student has the published shapes and counts, and with group norm no sample sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medlore.errors import InputError
from medlore.models.backbones.shufflenet import ShuffleNetConfig, ShuffleNetV2


def build(classes: int, **sizes: Any) -> ShuffleNetV2:
    return ShuffleNetV2(ShuffleNetConfig(num_labels=classes, **sizes))


@pytest.mark.parametrize(("width", "parameters"), [(0.5, 341_792), (1.0, 1_253_604), (1.5, 2_478_624), (2.0, 5_344_996)])
def test_published_parameter_counts(width: float, parameters: int) -> None:
    """1,253,604 from the notes on LoRKD; the others are the published totals (1.37 M, 3.50 M, 7.39 M) less the 1000-class head."""
    network = build(0, width=width)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_keys_and_shapes_of_the_official_student(golden: Path) -> None:
    lines = (golden / "lorkd_keys_cls_shufflenet_T3_r4.txt").read_text().splitlines()
    official = {}
    for line in lines:
        key, shape = line.split("\t")
        if "lora_" not in key and key.startswith("resnet."):
            name = key.removeprefix("resnet.").replace(".conv.conv.", ".conv.").replace(".bn.", ".norm.")
            official[name] = tuple(int(n) for n in shape.strip("()").replace(" ", "").split(",") if n)
    ours = {k: tuple(v.shape) for k, v in build(0).state_dict().items()}
    assert ours == official


def test_channels_of_both_halves_mix() -> None:
    from medlore.models.backbones.shufflenet import _shuffle

    left, right = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), torch.tensor([10.0, 11.0]).view(1, 2, 1, 1)
    assert _shuffle(left, right).flatten().tolist() == [0.0, 10.0, 1.0, 11.0]


@pytest.mark.parametrize(("norm", "separate"), [("group", True), ("batch", False)])
def test_group_norm_separates_samples_in_training(norm: str, separate: bool) -> None:
    network = build(3, width=0.5, norm=norm, stem_stride=1).train()
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    network(images).logits[0].sum().backward()
    assert images.grad is not None
    assert (images.grad[1:].abs().max().item() == 0) is separate


def test_shapes_and_refusal() -> None:
    assert build(7, stem_stride=1).eval()(torch.randn(2, 3, 64, 64)).logits.shape == (2, 7)
    assert build(0).eval()(torch.randn(2, 3, 64, 64)).logits.shape == (2, 1024)
    with pytest.raises(InputError, match=r"width: 3\.0"):
        build(2, width=3.0)


def test_it_is_saved_and_loaded_like_any_transformers_model(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    network = build(3, norm="group", stem_stride=1, image_size=64).eval()
    network.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(pixel_values=images).logits, network(pixel_values=images).logits)
    assert (again.config.norm, again.config.stem_stride, again.config.image_size) == ("group", 1, 64)
