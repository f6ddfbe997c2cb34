"""Features of the frozen backbone: each image goes through it once, whatever is then fitted, chosen or compared on them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import identity_of
from medlore.layers.surgery import without_head
from medlore.models.backbones.cutting import Cut, block_features, read_as
from medlore.models.backbones.reading import Backbone
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.training import predict_logits
from medlore.tuning.views import View

Features = NDArray[np.float32]
_BATCH = 64
MOST_ROWS = 200_000  # that are kept; then all are let go


class FrozenFeatures:
    """What was computed in this process, by backbone and image; a network that was changed must not be asked."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, dict[Hashable, Features]] = {}

    def behind(
        self, backbone: Backbone, images: ImageSet, blocks: tuple[int, ...], *, accelerator: Any, view: View | None = None
    ) -> Features:
        """(n, len(blocks), 2 d): class token and mean of the patches behind several blocks, in one pass."""
        stores = [self._rows.setdefault((*_key(backbone), block, view), {}) for block in blocks]

        def compute(part: ImageSet) -> Features:
            return _behind(backbone, part, blocks, accelerator, view)

        return self._found(stores, images, compute)

    def read(self, backbone: Backbone, images: ImageSet, cut: Cut | None, *, accelerator: Any, view: View | None = None) -> Features:
        """(n, d): what a head reads at a cut; None for a network that can only be read as it is.

        Args:
            backbone: the whole network, not cut yet.
            images: any set; labels are not looked at.
            cut: where.
            accelerator: device and precision.
            view: which look at the images; None for the images as they are.
        """
        if cut is not None:
            rows = self.behind(backbone, images, (cut.block,), accelerator=accelerator, view=view)
            return read_as(torch.from_numpy(rows[:, 0]), cut.reading).numpy()
        store = self._rows.setdefault((*_key(backbone), "own", view), {})
        return self._found([store], images, lambda part: _own(backbone, part, accelerator, view)[:, None])[:, 0]

    def _found(self, stores: Sequence[dict[Hashable, Features]], images: ImageSet, compute: Callable[[ImageSet], Features]) -> Features:
        """(n, stores, w): rows that are kept; those of images that lack one are computed, each image once."""
        names = [identity_of(item) for item in images.items]
        if sum(len(store) for store in self._rows.values()) > MOST_ROWS:
            for store in self._rows.values():
                store.clear()
        missing = sorted({name: i for i, name in enumerate(names) if any(name not in store for store in stores)}.values())
        if missing:
            for i, rows in zip(missing, compute(images.subset(missing)), strict=True):
                for store, row in zip(stores, rows, strict=True):
                    store[names[i]] = row
        return np.stack([[store[name] for store in stores] for name in names])


def _key(backbone: Backbone) -> tuple[Hashable, ...]:
    return backbone.source, backbone.sha256, backbone.image_size, backbone.mean, backbone.std


def _own(backbone: Backbone, images: ImageSet, accelerator: Any, view: View | None) -> Features:
    examples = image_examples(images, preprocessing_of(backbone), view=view)
    with without_head(backbone.model.to(accelerator.device), backbone.head_name) as body:
        rows: Features = predict_logits(body, examples.inputs, len(examples), accelerator=accelerator).numpy()
    return rows.copy()


def _behind(backbone: Backbone, images: ImageSet, blocks: tuple[int, ...], accelerator: Any, view: View | None) -> Features:
    examples = image_examples(images, preprocessing_of(backbone), view=view)
    backbone.model.to(accelerator.device).eval()
    rows = []
    for start in range(0, len(images), _BATCH):
        pixels = examples.inputs(np.arange(start, min(start + _BATCH, len(images))), step=None).to(accelerator.device)
        with accelerator.autocast():
            rows.append(block_features(backbone, pixels, blocks).numpy())
    return np.concatenate(rows)
