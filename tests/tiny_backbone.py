"""A small random ViT and images that it can tell apart, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from medlore.data.images.imageset import ImageSet, from_arrays


def write_backbone(folder: Path, *, seed: int = 0, image_size: int = 16) -> Path:
    import transformers

    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=image_size, patch_size=4, num_labels=2
    )
    model: Any = transformers.ViTForImageClassification(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def striped(count: int = 20, *, classes: int = 3, seed: int = 0, groups: bool = False) -> ImageSet:
    """`count` images a class: stripes whose direction tells the class, under noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:16, :16]
    waves = [rows, columns, rows + columns][:classes]
    images = [
        (120 + 80 * np.sin(wave * 1.2 + rng.uniform(0, 6)) + rng.normal(0, 15, (16, 16))).clip(0, 255).astype(np.uint8)
        for wave in waves
        for _ in range(count)
    ]
    labels = np.repeat(np.arange(classes), count)
    names = [f"p{i // 2}" for i in range(len(labels))] if groups else None
    return from_arrays(images, labels, classes=["rows", "columns", "diagonal"][:classes], name="stripes", groups=names)


def two_labels(count: int = 40, *, seed: int = 0) -> ImageSet:
    """Multi-label: label 0 is bright, label 1 has columns."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (count, 2))
    columns = np.mgrid[:16, :16][1]
    images = [(60 + 90 * b + 50 * c * np.sin(columns * 1.2) + rng.normal(0, 10, (16, 16))).clip(0, 255).astype(np.uint8) for b, c in labels]
    return from_arrays(images, labels, classes=["bright", "columns"], name="two labels")
