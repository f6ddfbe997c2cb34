"""Means over draws against scipy's own t interval, and their edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medlore.errors import InputError
from medlore.metrics.draws import mean_difference, mean_of_draws


def test_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(0.6, 0.1, 5)
    found = mean_of_draws(values.tolist())
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.draws == 5


def test_interval_holds_the_truth_in_95_of_100() -> None:
    draw = np.random.default_rng(1)
    intervals = [mean_of_draws(draw.normal(0.6, 0.1, 4).tolist()) for _ in range(2000)]
    inside = np.mean([d.low <= 0.6 <= d.high for d in intervals])  # type: ignore[operator]
    assert inside == pytest.approx(0.95, abs=0.015)


def test_pairs_are_sharper_than_two_means() -> None:
    luck = np.array([0.1, -0.2, 0.15, 0.0, -0.05])
    better, worse = 0.62 + luck + [0.001, -0.001, 0.002, 0, 0], 0.6 + luck
    difference = mean_difference(better.tolist(), worse.tolist())
    assert difference.mean == pytest.approx(0.0204)
    assert difference.excludes_zero
    assert not mean_difference(luck.tolist(), [0.0] * 5).excludes_zero


def test_one_draw_has_no_interval() -> None:
    alone = mean_of_draws([0.5])
    assert (alone.mean, alone.low, alone.high, alone.excludes_zero) == (0.5, None, None, False)
    assert str(alone) == "0.500"


def test_missing_and_unpaired_values_are_refused() -> None:
    with pytest.raises(InputError, match="one finite number per draw"):
        mean_of_draws([])
    with pytest.raises(InputError, match="one finite number per draw"):
        mean_of_draws([0.5, float("nan")])
    with pytest.raises(InputError, match="1 draws against 2"):
        mean_difference([0.5, 0.6], [0.5])
