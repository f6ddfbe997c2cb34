"""Weights as a pack holds them."""

from __future__ import annotations

import torch
from torch import nn

from medlore.errors import StepError


@torch.no_grad()
def as_stored(network: nn.Module, weights: str) -> None:
    """Round the weights to the type that the pack holds, so that what is measured is what is shipped.

    Args:
        network: changed in place.
        weights: `fp16`, or `fp32` to leave them as they are.

    Raises:
        StepError: a value is too large for that type.
    """
    if weights == "fp32":
        return
    for name, value in network.state_dict().items():
        if value.dtype == torch.float32:
            value.copy_(value.half().float())
            if not torch.isfinite(value).all():
                raise StepError(name, "values beyond 65504", "values that fp16 holds", "give `weights: fp32` in the study")
