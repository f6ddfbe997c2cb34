"""The network of the pre-training: its random start, a forward pass on part of the patches, its accuracy, its export."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from maintenance.pretrain_images import LabelledImages
from maintenance.pretrain_settings import PretrainSettings
from maintenance.vit_shape import CHANNEL_MEAN, CHANNEL_STD, export_vit
from medlore.runs.hardware import seed_everything


def build_vit(settings: PretrainSettings, classes: int) -> ViTForImageClassification:
    """The network at its random start, drawn from `settings.seed`; position embeddings start as 2D sine waves."""
    seed_everything(settings.seed)
    config = settings.config(num_labels=classes, attn_implementation="eager")  # on a CPU the fused kernel takes twice the time at 33 tokens
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = sine_positions(settings.image_size // settings.patch_size, settings.width)
    return model


def sine_positions(side: int, width: int) -> Tensor:
    """Position embeddings of a square grid: a quarter of the width each for sine and cosine of row and column.

    Args:
        side: patches along an edge.
        width: size of an embedding, a multiple of 4.

    Returns:
        side**2 d, of the spread that transformers draws position embeddings with (0.02).
    """
    place = torch.arange(side, dtype=torch.float32)
    rate = torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    wave = torch.cat([torch.sin(place[:, None] * rate), torch.cos(place[:, None] * rate)], dim=1)  # side d/2
    rows, columns = wave.repeat_interleave(side, 0), wave.repeat(side, 1)
    return 0.02 * math.sqrt(2.0) * torch.cat([rows, columns], dim=1)


def forward_kept(model: ViTForImageClassification, pixels: Tensor, kept: Tensor | None) -> Tensor:
    """Class scores from a part of the patches.

    Args:
        model: the classifier.
        pixels: b c h w, normalised.
        kept: b k, indices of the patches that are seen; None for all.

    Returns:
        b classes.
    """
    tokens = model.vit.embeddings(pixels)  # b 1+n d
    if kept is not None:
        patches = tokens[:, 1:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    for block in model.vit.layers:
        tokens = block(tokens)
    scores: Tensor = model.classifier(model.vit.layernorm(tokens)[:, 0])
    return scores


def normalise(images: Tensor) -> Tensor:
    """Images in 0 to 1 (b 3 h w) as the network takes them."""
    return (images - torch.tensor(CHANNEL_MEAN).view(3, 1, 1)) / torch.tensor(CHANNEL_STD).view(3, 1, 1)


def accuracy_by_source(model: ViTForImageClassification, data: LabelledImages) -> dict[str, float]:
    """Top-1 accuracy over all classes, separately for the images of each archive."""
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        parts = [model(pixel_values=normalise(part.float() / 255).to(dtype)).logits.argmax(1) for part in data.images.split(128)]
    right = torch.cat(parts) == data.labels
    sources = [name.split(":")[0] for name in data.classes]
    of_image = [sources[label] for label in data.labels.tolist()]
    return {source: right[torch.tensor([other == source for other in of_image])].float().mean().item() for source in dict.fromkeys(sources)}


def export_backbone(settings: PretrainSettings, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the network without its classifier as an ordinary transformers folder in float16."""
    export_vit(build_vit(settings, 2).config, weights, folder)
