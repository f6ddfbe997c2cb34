"""The optimiser of every training: AdamW whose weight decay spares vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from medlore.training.schedule import Schedule


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    schedule: Schedule,
    *,
    spares: Callable[[str, nn.Parameter], bool],
    fused: bool,
    share_of_rate: Callable[[str], float] = lambda _name: 1.0,
) -> torch.optim.AdamW:
    """AdamW over two groups for each rate: what decays, and what does not.

    Args:
        parameters: what is trained, by name.
        schedule: rate, betas and decay.
        spares: what has no decay.
        fused: one pass over the weights.
        share_of_rate: name -> factor on the rate of the schedule; each group keeps its own as `share`.
    """
    shares = list(dict.fromkeys(share_of_rate(name) for name in parameters)) or [1.0]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for name, p in parameters.items() if share_of_rate(name) == share and spares(name, p) is spared],
            "weight_decay": 0.0 if spared else schedule.weight_decay,
            "share": share,
        }
        for share in shares
        for spared in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate.peak, betas=schedule.betas, fused=fused or None)
