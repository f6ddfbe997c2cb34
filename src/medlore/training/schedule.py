"""How long and how fast a network is trained: steps, the rate of every step, decay, clipping, how often it is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

_WARMUP_START = 1e-3  # share of the rate at which a warm-up begins that is laid over a cosine


class Rate(Protocol):
    """The learning rate of a step."""

    @property
    def peak(self) -> float:
        """The highest one."""

    def __call__(self, step: int, steps: int) -> float:
        """The rate of `step` (from 0) of `steps`."""


@dataclass(frozen=True)
class CosineUnderWarmup:
    """A cosine over all steps with a linear warm-up laid over its beginning, so that the peak itself is never reached.

    Attributes:
        peak: where the cosine begins.
        lowest: where it ends.
        warmup_fraction: share of the steps.

    Source: the recipe of SR-LoRA (Zhang, Wang and Gu, ICCV 2025); golden values in the tests.

    Example:
        >>> round(CosineUnderWarmup(1e-3, warmup_fraction=0.2)(10, 100), 9)
        0.000488252
    """

    peak: float
    lowest: float = 0.0
    warmup_fraction: float = 0.1

    def __call__(self, step: int, steps: int) -> float:
        """The rate of a step."""
        rate = self.lowest + 0.5 * (self.peak - self.lowest) * (1 + math.cos(math.pi * step / steps))
        warmup = round(self.warmup_fraction * steps)
        return rate * (1 - (1 - step / warmup) * (1 - _WARMUP_START)) if step < warmup else rate


@dataclass(frozen=True)
class CosineAfterWarmup:
    """A linear warm-up in whole steps up to the peak, then a cosine down to a share of it.

    Attributes:
        peak: the highest rate.
        final_share: of the peak, at the end.
        warmup_fraction: share of the steps; at least one step.

    Example:
        >>> [CosineAfterWarmup(2.0, warmup_fraction=0.1)(step, 100) for step in (0, 9)]
        [0.2, 2.0]
    """

    peak: float
    final_share: float = 0.0
    warmup_fraction: float = 0.05

    def __call__(self, step: int, steps: int) -> float:
        """The rate of a step."""
        warmup = max(round(self.warmup_fraction * steps), 1)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
        return self.peak * (self.final_share + (1 - self.final_share) * cosine)


@dataclass(frozen=True)
class CosineOfShares:
    """The same shape as a function of the share of the steps that is done: a stage may end anywhere on it.

    Attributes:
        peak: the highest rate.
        final_share: of the peak, at the end; 1 keeps the peak.
        warmup_fraction: share of the steps.

    Example:
        >>> [round(CosineOfShares(1.0, 0.01, 0.1)(step, 100), 4) for step in (5, 10, 100)]
        [0.5, 1.0, 0.01]
    """

    peak: float
    final_share: float = 0.01
    warmup_fraction: float = 0.05

    def __call__(self, step: int, steps: int) -> float:
        """The rate of a step."""
        done = step / steps
        if done < self.warmup_fraction:
            return self.peak * max(done / self.warmup_fraction, _WARMUP_START)
        after = (done - self.warmup_fraction) / (1 - self.warmup_fraction)
        return self.peak * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * after)))


@dataclass(frozen=True)
class Schedule:
    """Everything about a training that is not its data or its network.

    Attributes:
        steps: optimiser steps of the whole schedule.
        rate: of every step.
        weight_decay: of matrices and kernels; what a task spares (vectors, always) has none.
        clip: largest gradient norm; None for no clipping.
        betas: of AdamW.
        accumulate: batches whose gradients are summed before a step.
        ema: decay of averaged weights that are judged and kept in place of the last ones; None for none.
        judge_every: steps between two judgements; 0 for the end alone, None whenever a checkpoint is due.
        log_every: steps between two lines of the history.
        patience: judgements without a better one before stopping; None never stops early.
        stop_at: leave after this step, as a stage that ends before its schedule; None goes to the end.
    """

    steps: int
    rate: Rate
    weight_decay: float = 0.0
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    accumulate: int = 1
    ema: float | None = None
    judge_every: int | None = 0
    log_every: int = 50
    patience: int | None = None
    stop_at: int | None = None

    @property
    def end(self) -> int:
        """The step after the last one."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)
