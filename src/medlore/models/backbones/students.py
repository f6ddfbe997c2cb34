"""Light 2D networks that experts are installed in; built from plain values, so that a pack can rebuild its own.

Every student is called and answers like a transformers image classifier; with no classes its logits are the pooled features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from medlore.models.backbones.shufflenet import Norm, ShuffleNetConfig, ShuffleNetV2

StudentKind = Literal["shufflenet", "resnet-18", "vit-small"]


def build_student(kind: StudentKind, *, image_size: int, classes: int = 0, norm: Norm = "group", stem_stride: int = 2) -> nn.Module:
    """An untrained student.

    Args:
        kind: `shufflenet` (ShuffleNetV2 1.0x, 1.25 M parameters), `resnet-18` (11.2 M), `vit-small` (2.7 M).
        image_size: side of the square images, in pixels; only `vit-small` is bound to it.
        classes: outputs; 0 gives the pooled features.
        norm: of the convolutional students: `group` keeps samples apart in training, `batch` is the published form.
        stem_stride: of `shufflenet`: 1 for images of about 64 pixels.
    """
    builders = {"shufflenet": _shufflenet, "resnet-18": _resnet18, "vit-small": _vit_small}
    return builders[kind](image_size=image_size, classes=classes, norm=norm, stem_stride=stem_stride)


def feature_width(network: nn.Module, image_size: int) -> int:
    """Width of the pooled features of a network without classes, found by asking it."""
    was_training = network.training
    network.eval()
    parameter = next(network.parameters())
    with torch.no_grad():
        features = network(pixel_values=parameter.new_zeros(1, 3, image_size, image_size)).logits
    network.train(was_training)
    return int(features.flatten(1).shape[1])


def without_batch_statistics(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by a GroupNorm over at most 8 groups, in place; for untrained networks."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                groups = next(g for g in (8, 4, 2, 1) if child.num_features % g == 0)
                setattr(module, name, nn.GroupNorm(groups, child.num_features, eps=child.eps))
    return network


class GroupNormResNetConfig(ResNetConfig):
    """A ResNet whose norms keep samples apart."""

    model_type = "medlore-resnet"


class GroupNormResNet(ResNetForImageClassification):  # type: ignore[misc,unused-ignore]
    """transformers' ResNet with GroupNorm in the place of BatchNorm; saved and loaded like it, under a type of its own."""

    config_class = GroupNormResNetConfig

    def __init__(self, config: GroupNormResNetConfig) -> None:
        super().__init__(config)
        without_batch_statistics(self)


AutoConfig.register(GroupNormResNetConfig.model_type, GroupNormResNetConfig)
AutoModelForImageClassification.register(GroupNormResNetConfig, GroupNormResNet)


def _shufflenet(*, image_size: int, classes: int, norm: Norm, stem_stride: int) -> nn.Module:
    return ShuffleNetV2(ShuffleNetConfig(norm=norm, stem_stride=stem_stride, image_size=image_size, num_labels=classes))


def _resnet18(*, classes: int, norm: Norm, **_unused: Any) -> nn.Module:
    sizes: dict[str, Any] = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
    network: nn.Module
    if norm == "group":
        network = GroupNormResNet(GroupNormResNetConfig(**sizes, num_labels=classes))
    else:
        network = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=classes))
    return network


def _vit_small(*, image_size: int, classes: int, **_unused: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=image_size,
        patch_size=max(image_size // 8, 1),
        num_labels=classes,
    )
    network: nn.Module = ViTForImageClassification(config)
    return network
