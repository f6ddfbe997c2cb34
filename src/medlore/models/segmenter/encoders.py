"""Image encoders of the segmenter: one record each, in one table; a new encoder is one new entry of `ENCODERS`.

An encoder is a module with two parts, `encoder` (window -> one map a stage, highest resolution first) and `decoder` (those maps, of
which it empties the list -> the decoder's maps, highest resolution first). Channels and strides of the stages are those of the
configuration; everything behind the maps (tokens, queries, masks) is the same for all. Its weights lie below `backbone.` in every file.
Nothing here imports torch, so that a plan can be made without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from medlore.models.segmenter.network import SegmenterConfig


@dataclass(frozen=True)
class LiveMaps:
    """Full-resolution maps that are alive at the widest point, counted in the channels of the first stage.

    Args:
        full: with four bytes a number.
        half: with two, converted weights included.
        ready: of `Encoder.ready`, in its own bytes.
    """

    full: float
    half: float
    ready: float


@dataclass(frozen=True)
class Encoder:
    """One kind of image encoder.

    Attributes:
        caption: for people.
        build: configuration -> the untrained module.
        targets: configuration -> names of the layers that experts adapt, below `backbone.`, each with its rank in units of the
            expert's rank.
        live_maps: for the memory plan; measured.
        ready: trained module and number type -> the same for inference on this processor; None where there is no such form.
    """

    caption: str
    build: Callable[[SegmenterConfig], nn.Module]
    targets: Callable[[SegmenterConfig], dict[str, int]]
    live_maps: LiveMaps
    ready: Callable[[nn.Module, torch.dtype], nn.Module] | None = None


def _unet(config: SegmenterConfig) -> nn.Module:
    from medlore.models.segmenter.unet3d import UNet3d

    return UNet3d(config.image_channels, config.features, blocks=config.convs_per_stage, strides=config.strides)


def _unet_targets(config: SegmenterConfig) -> dict[str, int]:
    """Every 3x3x3 convolution; the encoder has one unit of rank, the decoder two."""
    stages, blocks = len(config.features), range(config.convs_per_stage)
    encoder = {f"encoder.stages.{s}.0.convs.{i}.conv": 1 for s in range(stages) for i in blocks}
    return encoder | {f"decoder.stages.{s}.convs.{i}.conv": 2 for s in range(stages - 1) for i in blocks}


def _unet_ready(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    from medlore.models.segmenter.unet3d_inference import InferenceUNet3d

    return InferenceUNet3d(unet, dtype)  # type: ignore[arg-type]


UNET = "unet"
ENCODERS: dict[str, Encoder] = {
    UNET: Encoder("the plain U-Net of SAT and LoRKD", _unet, _unet_targets, LiveMaps(full=7.0, half=11.0, ready=5.2), _unet_ready),
}
