"""Float32 weights that are updated, beside a copy in another type that computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MasterWeights:
    """Two networks of one shape; gradients go from the copy to the masters, updated weights the other way.

    In a type of few digits an update of a thousandth of a weight is rounded away; the masters take it in.

    Args:
        masters: float32; the optimiser moves them.
        copy: what computes, e.g. in bfloat16; gets the masters' weights.
    """

    def __init__(self, masters: nn.Module, copy: nn.Module) -> None:
        self.masters, self.copy = masters, copy
        self.fill_copy()

    @torch.no_grad()
    def take_gradients(self, accelerator: Any) -> None:
        """The copy's gradients become the masters', in float32, as the mean over all processes; the copy has none afterwards."""
        pairs = [(own, c) for own, c in zip(self.masters.parameters(), self.copy.parameters(), strict=True) if c.grad is not None]
        flat = torch.cat([c.grad.flatten().float() for _, c in pairs if c.grad is not None])
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(flat, reduction="mean")
        for (own, computed), part in zip(pairs, flat.split([own.numel() for own, _ in pairs]), strict=True):
            own.grad, computed.grad = part.view_as(own), None

    @torch.no_grad()
    def fill_copy(self) -> None:
        """The copy gets the masters' weights."""
        self.copy.load_state_dict(self.masters.state_dict())
