"""A moving average of the weights, judged and kept in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of parameters; at first over fewer steps, since the start should not weigh on it.

    Args:
        parameters: by name.
        decay: share of the old average in each new one, once (step + 1) / (step + 10) has come above it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0)."""
        share = 1 - min(self._decay, (step + 1) / (step + 10))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the network has the average, afterwards its own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """The network has the average from now on."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self.values[name])

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Put the values of a checkpoint back."""
        for name, value in values.items():
            self.values[name].copy_(value)

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
