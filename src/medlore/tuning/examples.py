"""From an image set to what the training loop reads: decoded once and kept in memory while it fits, then read as needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medlore.data.images.imageset import ImageSet
from medlore.data.images.pixels import Pixels, load_many
from medlore.data.images.transforms import Preprocessing, TrainAugmentation, decode, normalise
from medlore.layers.surgery import without_head
from medlore.models.backbones.reading import Backbone
from medlore.tuning.training import Examples, predict_logits
from medlore.tuning.views import View

CACHE_BYTES = 2 << 30  # decoded images of one set that are kept in memory


def preprocessing_of(backbone: Backbone) -> Preprocessing:
    """What the backbone was trained to see."""
    return Preprocessing(backbone.image_size, backbone.mean, backbone.std, backbone.interpolation)


@dataclass(frozen=True)
class _ImageBatches:
    """Inputs from images: cached as uint8 (b, 3, s, s), or decoded batch by batch."""

    images: ImageSet
    preprocessing: Preprocessing
    cache: Tensor | None
    augmentation: TrainAugmentation | None
    view: View | None = None

    def __call__(self, indices: NDArray[np.int64], *, step: int | None) -> Tensor:
        if self.cache is not None:
            pixels = self.cache[torch.from_numpy(indices)]
        else:
            pixels = decode([self.images.items[int(i)] for i in indices], self.preprocessing)
        if self.view is not None:
            return self.view.of(pixels, self.preprocessing)
        if step is None or self.augmentation is None:
            return normalise(pixels, self.preprocessing)
        return self.augmentation(pixels, step=step)


@dataclass(frozen=True)
class _FeatureBatches:
    """Inputs of the head, computed once."""

    features: Tensor  # b d

    def __call__(self, indices: NDArray[np.int64], *, step: int | None) -> Tensor:
        del step  # cached features are not augmented
        return self.features[torch.from_numpy(indices)]


def refuse_unreadable(*parts: ImageSet | None) -> None:
    """Read the image files of all parts once and keep none: a broken one is named before a training, not after it.

    Raises:
        DataError: images that cannot be read; those of all parts are named at once.
    """
    items = [item for part in parts if part is not None for item in part.items if not isinstance(item.source, np.ndarray)]
    load_many(items, after=_nothing_of)


def _nothing_of(pixels: Pixels) -> Pixels:
    return np.empty((0, 0, pixels.shape[2]), np.uint8)


def image_examples(
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    augmentation: TrainAugmentation | None = None,
    cache_bytes: int = CACHE_BYTES,
    view: View | None = None,
) -> Examples:
    """Examples of an image set; labels may be missing, then they are zeros that nobody reads; seen through `view`, where there is one.

    Raises:
        DataError: images that cannot be read; all are named.
    """
    size = 3 * preprocessing.image_size**2 * len(images)
    cache = decode(images.items, preprocessing) if size <= cache_bytes else None
    if cache is None:  # batches would name those of one batch, after some were worked on
        refuse_unreadable(images)
    targets: NDArray[Any] = images.targets() if images.labelled else np.zeros(len(images), dtype=np.int64)
    return Examples(_ImageBatches(images, preprocessing, cache, augmentation, view), targets, images.keys)


def feature_examples(examples: Examples, model: nn.Module, head: str, *, accelerator: Any) -> Examples:
    """The same examples as inputs of the head: one pass through the frozen network."""
    with without_head(model, head) as body:
        features = predict_logits(body, examples.inputs, len(examples), accelerator=accelerator)
    return Examples(_FeatureBatches(features.clone()), examples.targets, examples.names)  # a clone leaves inference mode


def steps_of(count: int, batch_size: int, epochs: int) -> int:
    """Optimiser steps of a whole run."""
    return math.ceil(count / batch_size) * epochs
