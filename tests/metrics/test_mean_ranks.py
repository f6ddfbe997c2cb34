"""Mean ranks against scipy's Friedman test and the published critical values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medlore.errors import InputError
from medlore.metrics.mean_ranks import mean_ranks


def test_probability_is_scipys() -> None:
    scores = np.random.default_rng(0).normal(0, 1, (7, 5)) + np.arange(5) * 0.4
    scores[2, 1] = scores[2, 3]  # places are shared
    found = mean_ranks(scores.tolist())
    assert found.probability == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert sum(found.ranks) == pytest.approx(5 * 6 / 2)
    assert found.blocks == 7


@pytest.mark.parametrize(("methods", "quantile"), [(2, 1.960), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_difference_has_the_published_quantiles(methods: int, quantile: float) -> None:
    """Demsar 2006, table 5a: q at 0.05 for the Nemenyi test."""
    found = mean_ranks(np.random.default_rng(methods).normal(size=(14, methods)).tolist())
    assert found.critical_difference == pytest.approx(quantile * np.sqrt(methods * (methods + 1) / (6 * 14)), abs=2e-3)


def test_best_is_first_and_equals_share() -> None:
    assert mean_ranks([[3.0, 1.0, 1.0], [5.0, 2.0, 2.0]]).ranks == (1.0, 2.5, 2.5)
    same = mean_ranks([[1.0, 1.0], [2.0, 2.0]])
    assert (same.ranks, same.probability) == ((1.5, 1.5), None)


def test_false_alarms_come_as_often_as_said() -> None:
    """Of tables of equal methods, about one in twenty holds a pair that differs significantly."""
    draw = np.random.default_rng(3)
    apart = []
    for _ in range(400):
        found = mean_ranks(draw.normal(size=(30, 4)).tolist())
        apart.append(max(found.ranks) - min(found.ranks) > found.critical_difference)
    assert 0.02 < np.mean(apart) < 0.09


@pytest.mark.parametrize("scores", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, float("nan")], [1.0, 2.0]], []])
def test_too_little_is_refused(scores: list[list[float]]) -> None:
    with pytest.raises(InputError, match="leave gaps out"):
        mean_ranks(scores)
