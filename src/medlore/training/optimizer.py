"""The optimiser of every training: AdamW whose weight decay spares vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from medlore.training.schedule import Schedule


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], schedule: Schedule, *, spares: Callable[[str, nn.Parameter], bool], fused: bool
) -> torch.optim.AdamW:
    """AdamW over two groups.

    Args:
        parameters: what is trained, by name.
        schedule: rate, betas and decay.
        spares: what has no decay.
        fused: one pass over the weights.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in parameters.items() if not spares(name, p)], "weight_decay": schedule.weight_decay},
        {"params": [p for name, p in parameters.items() if spares(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate.peak, betas=schedule.betas, fused=fused or None)
