"""ShuffleNetV2: the light 2D student.

Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, table 5 and figure 3c-d.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from medlore.errors import InputError

Norm = Literal["batch", "group"]

_STAGE_UNITS = (4, 8, 4)
_WIDTHS: dict[float, tuple[int, int, int, int]] = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_STEM_WIDTH = 24


class ShuffleNetConfig(PreTrainedConfig):
    """Sizes of a ShuffleNetV2.

    Args:
        width: 0.5, 1.0, 1.5 or 2.0, the published multipliers; 1.0 has 1,253,604 parameters without its classifier.
        norm: `batch` as published, or `group`, which keeps every sample to itself: with it the gradients of low-rank experts
            are separated in training, with batch statistics they are not.
        stem_stride: 2 as published (224-pixel images), 1 for images of about 64 pixels.
        image_size: side of the images that it was trained on, in pixels; the network itself takes any size.
        others: `num_labels` and what else transformers' configurations take; no labels leave the pooled features as the output.

    Raises:
        InputError: a width that was never published.
    """

    model_type = "medlore-shufflenet"

    def __init__(self, width: float = 1.0, norm: Norm = "batch", stem_stride: int = 2, image_size: int = 224, **others: Any) -> None:
        if width not in _WIDTHS:
            raise InputError("ShuffleNetV2 width", repr(width), ", ".join(map(str, _WIDTHS)), "use one of them")
        self.width, self.norm, self.stem_stride, self.image_size = width, norm, stem_stride, image_size
        super().__init__(**others)


class ShuffleNetV2(PreTrainedModel):
    """ShuffleNetV2 as a transformers image classifier: saved, loaded and adapted like any other of that family."""

    config_class = ShuffleNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ShuffleNetConfig) -> None:
        super().__init__(config)
        *stages, last = _WIDTHS[config.width]
        self.conv1 = _ConvNorm(3, _STEM_WIDTH, kernel_size=3, stride=config.stem_stride, norm=config.norm)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        before, layers = _STEM_WIDTH, []
        for channels, units in zip(stages, _STAGE_UNITS, strict=True):
            first = _Unit(before, channels, 2, config.norm)
            layers.append(nn.Sequential(first, *(_Unit(channels, channels, 1, config.norm) for _ in range(units - 1))))
            before = channels
        self.layers = nn.ModuleList([*layers, _ConvNorm(before, last, norm=config.norm)])
        self.classifier: nn.Module = nn.Linear(last, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """He's initialisation of convolutions, a small classifier; norms start as the identity."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, **_unused: Any) -> ImageClassifierOutput:
        """Logits of images.

        Args:
            pixel_values: (b, 3, h, w), normalised.

        Returns:
            `.logits` (b, classes), or the pooled features (b, 1024) without labels.
        """
        x = self.maxpool(self.conv1(pixel_values))
        for layer in self.layers:
            x = layer(x)
        return ImageClassifierOutput(logits=self.classifier(x.mean(dim=(2, 3))))


class _ConvNorm(nn.Module):
    """Convolution, normalisation and (unless disabled) ReLU, with the published names `conv` and `norm`."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel_size: int = 1, stride: int = 1, groups: int = 1, relu: bool = True, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False)
        self.norm = _normalisation(norm, outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        x = self.norm(self.conv(x))
        return torch.relu(x) if self.relu else x


class _Unit(nn.Module):
    """One unit: the right half of the channels is transformed, the left half passes; stride 2 transforms both from all channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        if stride > 1:
            self.branch1 = nn.Sequential(
                _ConvNorm(inputs, inputs, kernel_size=3, stride=stride, groups=inputs, relu=False, norm=norm),
                _ConvNorm(inputs, half, norm=norm),
            )
        self.branch2 = nn.Sequential(
            _ConvNorm(inputs if stride > 1 else half, half, norm=norm),
            _ConvNorm(half, half, kernel_size=3, stride=stride, groups=half, relu=False, norm=norm),
            _ConvNorm(half, half, norm=norm),
        )

    def forward(self, x: Tensor) -> Tensor:  # b c h w
        if self.stride > 1:
            return _shuffle(self.branch1(x), self.branch2(x))
        left, right = x.chunk(2, dim=1)
        return _shuffle(left, self.branch2(right))


def _shuffle(left: Tensor, right: Tensor) -> Tensor:
    """Channels of both halves in turn: l0 r0 l1 r1 ..."""
    return torch.stack([left, right], dim=2).flatten(1, 2)


def _normalisation(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


AutoConfig.register(ShuffleNetConfig.model_type, ShuffleNetConfig)
AutoModelForImageClassification.register(ShuffleNetConfig, ShuffleNetV2)
