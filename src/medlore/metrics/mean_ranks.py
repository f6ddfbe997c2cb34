"""Mean ranks of methods over many comparisons, and how far two of them must differ to be distinguished."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medlore.errors import InputError


@dataclass(frozen=True)
class MeanRanks:
    """Mean places of methods.

    Attributes:
        ranks: of each method, 1 for one that is best everywhere; equal scores share their places.
        critical_difference: mean ranks closer than this do not differ significantly at 5 % (Nemenyi's test, which counts all pairs).
        probability: of mean ranks this uneven if all methods were the same (Friedman's test); None where all scores are equal.
        blocks: comparisons that the means are over.
    """

    ranks: tuple[float, ...]
    critical_difference: float
    probability: float | None
    blocks: int


def mean_ranks(scores: Sequence[Sequence[float]]) -> MeanRanks:
    """Mean ranks with Friedman's and Nemenyi's tests.

    Args:
        scores: (blocks, methods); a block is one comparison of all methods under the same conditions, higher is better.

    Raises:
        InputError: fewer than two blocks or two methods, or a score that is not finite.

    Examples:
        >>> found = mean_ranks([[0.9, 0.5, 0.7], [0.8, 0.4, 0.6], [0.7, 0.6, 0.5]])
        >>> [round(rank, 3) for rank in found.ranks], round(found.critical_difference, 3)
        ([1.0, 2.667, 2.333], 1.914)

    Source: Demsar, Journal of Machine Learning Research 7, 2006, section 3.2.
    """
    from scipy import stats

    table = np.asarray(scores, dtype=np.float64)  # blocks methods
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise InputError("scores", f"shape {table.shape}", "finite scores of two methods or more in two blocks or more", "leave gaps out")
    blocks, methods = table.shape
    ranks = stats.rankdata(-table, axis=1).mean(axis=0)
    return MeanRanks(
        tuple(float(rank) for rank in ranks),
        _quantile(methods) * math.sqrt(methods * (methods + 1) / (6 * blocks)),
        _friedman(table),
        blocks,
    )


@functools.cache  # a second of work
def _quantile(methods: int) -> float:
    from scipy import stats

    return float(stats.studentized_range.ppf(0.95, methods, math.inf)) / math.sqrt(2)


def _friedman(table: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float | None:
    from scipy import stats

    if (table == table[:, :1]).all():
        return None
    blocks, methods = table.shape
    ranks = stats.rankdata(-table, axis=1)
    # written out for two methods too, with the correction for shared places
    spread = float((ranks**2).sum() - blocks * methods * (methods + 1) ** 2 / 4)
    between = float(((ranks.mean(axis=0) - (methods + 1) / 2) ** 2).sum()) * blocks
    return float(stats.chi2.sf((methods - 1) * blocks * between / spread, methods - 1))
