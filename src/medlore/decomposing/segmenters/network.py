"""A segmenter together with its table of prompts: what is trained, distilled from and validated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.routing import route
from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.vocabulary import WHOLE_BODY


class PromptedSegmenter(nn.Module):
    """A segmenter, with or without experts, that is asked by rows of a table.

    Args:
        segmenter: the network.
        prompts: (n, query_width), one row per prompt.
        learn_prompts: whether the rows are trained; else they are a frozen buffer.
        known_rows: of rows that are trained, the first so many stay as they are to the last bit.
    """

    prompts: Tensor

    def __init__(self, segmenter: Segmenter, prompts: Tensor, *, learn_prompts: bool, known_rows: int = 0) -> None:
        super().__init__()
        self.segmenter = segmenter
        if learn_prompts:
            self.prompts = nn.Parameter(prompts.detach().clone().float())
            if known_rows:
                self.prompts.register_hook(lambda gradient: _without_first(gradient, known_rows))
        else:
            self.register_buffer("prompts", prompts.detach().clone().float())
        self.routed = any(isinstance(module, ExpertLayer) for module in segmenter.modules())

    @property
    def learns_prompts(self) -> bool:
        """Whether the rows are trained."""
        return isinstance(self.prompts, nn.Parameter)

    def forward(self, images: Tensor, rows: Tensor, regions: Sequence[str] | None = None, *, deep: bool = False) -> list[Tensor]:
        """Logits (b, q, ...) at full resolution, and with `deep` at the lower ones too.

        Args:
            images: (b, 1, x, y, z).
            rows: (b, q) rows of the table.
            regions: b regions; the shared base answers without them and for `whole body`.
            deep: with the heads of deep supervision, where the network has them.
        """
        model = self.segmenter
        deep = deep and bool(model.config.deep_widths)
        with route(model, self._experts(regions)) if self.routed and regions is not None else nullcontext():
            features = model.encode(images.expand(-1, model.config.image_channels, -1, -1, -1), deep=deep)
        queries = self.prompts[rows]  # b q width
        return model.deep_logits(features, queries) if deep else [model.decode(features, queries)]

    def _experts(self, regions: Sequence[str] | None) -> list[str | None]:
        return [None if region == WHOLE_BODY else region for region in regions or ()]


def _without_first(gradient: Tensor, rows: int) -> Tensor:
    """Rows whose gradient is always zero are never moved: Adam's moments stay zero, and prompts have no weight decay."""
    return torch.cat([torch.zeros_like(gradient[:rows]), gradient[rows:]])


def new_prompts(count: int, width: int, *, seed: int) -> Tensor:
    """Random rows (count, width) of unit variance: prompts before a teacher has learned them."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
