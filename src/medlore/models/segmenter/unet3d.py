"""The plain convolutional 3D U-Net of SAT, with the published names of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.01


class ConvBlock(nn.Module):
    """Conv3d (3x3x3, bias), instance normalisation with learnt scale and shift, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1)
        self.norm = nn.InstanceNorm3d(outputs, eps=1e-5, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w, d) -> (b, outputs, h/stride, w/stride, d/stride)."""
        # The normalised map is a fresh tensor that autograd does not keep for leaky ReLU's sake, so it can be overwritten.
        return nn.functional.leaky_relu_(self.norm(self.conv(x)), NEGATIVE_SLOPE)


class ConvStack(nn.Module):
    """Some blocks in a row; the first one changes the channels and carries the stride."""

    def __init__(self, inputs: int, outputs: int, *, blocks: int, stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvBlock(inputs, outputs, stride=stride), *(ConvBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w, d) -> (b, outputs, h/stride, w/stride, d/stride)."""
        return cast("Tensor", self.convs(x))


class UNetEncoder(nn.Module):
    """One stack a stage; every stage's map is handed out, highest resolution first."""

    def __init__(self, inputs: int, features: Sequence[int], *, blocks: int, strides: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs, *features]
        # Each stage is a Sequential of one stack: the extra `.0.` belongs to the published names.
        self.stages = nn.Sequential(
            *(nn.Sequential(ConvStack(widths[i], widths[i + 1], blocks=blocks, stride=stride)) for i, stride in enumerate(strides))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, inputs, h, w, d) -> one map (b, features[s], h/2^s, ...) a stage, for strides of 2."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class UNetDecoder(nn.Module):
    """Transposed convolution, concatenation with the encoder's map, and a stack, from the bottom up."""

    def __init__(self, features: Sequence[int], *, blocks: int, strides: Sequence[int]) -> None:
        super().__init__()
        upwards = range(len(features) - 1, 0, -1)
        self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(features[s], features[s - 1], strides[s], stride=strides[s]) for s in upwards)
        self.stages = nn.ModuleList(ConvStack(2 * features[s - 1], features[s - 1], blocks=blocks) for s in upwards)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The encoder's maps -> the decoder's maps, highest resolution first.

        `maps` is emptied on the way, so that without autograd each one is freed as soon as it was used.
        """
        x = maps.pop()
        decoded = []
        for up, stage in zip(self.transpconvs, self.stages, strict=True):
            x = stage(torch.cat((up(x), maps.pop()), dim=1))
            decoded.append(x)
        return decoded[::-1]


class UNet3d(nn.Module):
    """Encoder and decoder, with the state-dict names of the published files (`encoder.stages.0.0.convs.0.conv.weight`, ...).

    Args:
        inputs: channels of the image.
        features: channels of each stage, highest resolution first.
        blocks: convolutions a stage, in the encoder and in the decoder.
        strides: stride of each stage's first convolution; the first must be 1, so that masks have the image's grid.
    """

    def __init__(self, inputs: int, features: Sequence[int], *, blocks: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.encoder = UNetEncoder(inputs, features, blocks=blocks, strides=strides)
        self.decoder = UNetDecoder(features, blocks=blocks, strides=strides)
        self.apply(_he_initialise)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(b, inputs, h, w, d) -> (encoder maps, decoder maps), both highest resolution first."""
        encoded = self.encoder(x)
        return encoded, self.decoder(list(encoded))


def _he_initialise(module: nn.Module) -> None:
    """Kaiming's normal draw for a leaky ReLU of slope 0.01; zero biases. Nothing for weights that have no values yet.

    Drawing on the meta device would make torch import 800 modules, the largest part of the time in which a pack is loaded.
    """
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
