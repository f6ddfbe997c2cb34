"""Means over few-shot draws, with the interval that so few draws allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlore.errors import InputError


@dataclass(frozen=True)
class DrawMean:
    """A mean over draws.

    Attributes:
        mean: of the values.
        low: lower end of its 95 % confidence interval; None for a single draw, which has none.
        high: upper end.
        draws: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    draws: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None or self.high is None else f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero, which a difference must do to count as one."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def mean_of_draws(values: Sequence[float]) -> DrawMean:
    """Mean and 95 % interval by Student's t, which is wide for few draws, as it should be.

    The interval speaks of other draws of the same pool judged on the same test images. It can leave the range of the measure.

    Args:
        values: one result a draw.

    Raises:
        InputError: no value, or values that are not finite.

    Examples:
        >>> print(mean_of_draws([0.5, 0.6, 0.7]))
        0.600 (0.352 to 0.848)
    """
    from scipy import stats

    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size or not np.isfinite(numbers).all():
        raise InputError("values", f"{list(values)}", "one finite number per draw", "leave out what is not defined, and say so")
    mean = float(numbers.mean())
    if numbers.size == 1:
        return DrawMean(mean, None, None, 1)
    half = float(stats.t.ppf(0.975, numbers.size - 1)) * float(numbers.std(ddof=1)) / math.sqrt(numbers.size)
    return DrawMean(mean, mean - half, mean + half, int(numbers.size))


def mean_difference(values: Sequence[float], others: Sequence[float]) -> DrawMean:
    """Mean of the differences draw by draw, which removes what a lucky draw gives to both.

    Raises:
        InputError: different numbers of draws.

    Examples:
        >>> print(mean_difference([0.50, 0.62, 0.70], [0.40, 0.50, 0.61]))
        0.103 (0.065 to 0.141)
    """
    if len(values) != len(others):
        raise InputError("others", f"{len(others)} draws against {len(values)}", "the same draws of both", "pair them by draw")
    return mean_of_draws([a - b for a, b in zip(values, others, strict=True)])
