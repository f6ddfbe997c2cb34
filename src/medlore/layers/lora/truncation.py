"""Which components of one factor pair a step uses and which of them it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PartialMode = Literal["off", "nested", "single"]


@dataclass
class Truncation:
    """The first `active` components of a factor pair of rank `rank`; None means all of them, untouched.

    The update of a step is (alpha / b) · B[:, :b] A[:b] for b active components (rsLoRA: alpha / √b). The layer multiplies by
    alpha / rank, so the columns of B carry the factor rank / b (rsLoRA: √(rank / b)).

    Attributes:
        rank: rank of the pair.
        mode: `nested` trains all active components; `single` trains the last active one, the others take part untrained.
        use_rslora: whether the layer's scaling is alpha / √rank.
        active: number of components in use, 1 to rank; None for all, as before the first draw.
    """

    rank: int = 0
    mode: PartialMode = "off"
    use_rslora: bool = False
    active: int | None = None

    def rows(self, A: Tensor) -> Tensor:
        """The active rows of lora_A."""
        if self.active is None:
            return A
        if self.mode == "single":
            return torch.cat([A[: self.active - 1].detach(), A[self.active - 1 : self.active]])
        return A[: self.active]

    def columns(self, B: Tensor) -> Tensor:
        """The active columns of lora_B, times what corrects the scaling."""
        if self.active is None:
            return B
        share = self.rank / self.active
        factor = math.sqrt(share) if self.use_rslora else share
        if self.mode == "single":
            return factor * torch.cat([B[:, : self.active - 1].detach(), B[:, self.active - 1 : self.active]], dim=1)
        return factor * B[:, : self.active]
