"""A mixture of tissues: Gaussians that are known are found, borders that are blurred come back, and what has no contrast says so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, stats

from medlore.data.volumes.tissue_mixture import ANY_TISSUE, TissueMixture, fit_mixture
from medlore.metrics.masks import dice

MEANS, DEVIATION = (0.5, 1.2, 1.7), 0.12


def folded(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three tissues with winding borders, x y z of 0 (none), 1, 2 and 3; and their grey values."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((48, 48, 48)), 2)
    truth = 1 + np.searchsorted(np.quantile(field, [0.3, 0.7]), field)
    truth[:4] = 0
    values = np.choose(truth, (1.0, *MEANS)) + DEVIATION * rng.standard_normal(truth.shape)
    return truth, values.astype(np.float32)


def blurred(truth: np.ndarray) -> np.ndarray:
    """What a network on coarse voxels would say: k x y z."""
    return np.stack([ndimage.gaussian_filter((truth == k).astype(np.float32), 1.5) for k in (1, 2, 3)]).astype(np.float16)


def test_known_gaussians_are_found_and_borders_come_back() -> None:
    truth, values = folded()
    prior = blurred(truth)
    mixture = fit_mixture(values, prior)
    assert mixture is not None
    np.testing.assert_allclose(mixture.mean, MEANS, atol=0.02)
    np.testing.assert_allclose(mixture.deviation, DEVIATION, rtol=0.12)
    assert mixture.separation == pytest.approx(0.5 / DEVIATION, rel=0.1)
    posterior = mixture.share_out(values, prior)
    for k in range(3):
        before, after = (dice(p[k] > 0.5, truth == k + 1) for p in (prior, posterior))
        assert before < 0.9
        assert after > 0.96


def test_places_decide_where_grey_values_do_not() -> None:
    """Two tissues of one grey: the answer is the prior's, and the separation says that grey was no help."""
    truth, values = folded()
    prior = np.stack([truth == 1, truth == 2, truth == 3]).astype(np.float32) * 0.8 + 0.1
    grey = np.where(truth == 2, values - MEANS[1] + MEANS[0], values)
    mixture = fit_mixture(grey, prior)
    assert mixture is not None
    assert mixture.separation < 0.5
    posterior, inside = mixture.share_out(grey, prior), (truth == 1) | (truth == 2)
    assert ((posterior[0] > posterior[1]) == (truth == 1))[inside].mean() > 0.99


def test_the_posterior_is_that_of_bayes() -> None:
    mixture = TissueMixture(np.array([0.0, 1.0, 3.0]), np.array([0.5, 1.0, 0.7]), np.array([1.2, 1.0, 0.8]))
    values, prior = np.linspace(-1, 4, 11), np.tile(np.array([[0.2], [0.5], [0.3]]), 11)
    weights = mixture.proportion[:, None] * prior * stats.norm.pdf(values[None], mixture.mean[:, None], mixture.deviation[:, None])
    np.testing.assert_allclose(mixture.share_out(values, prior), weights / weights.sum(axis=0), rtol=1e-4)


def test_nothing_is_shared_out_where_no_tissue_is() -> None:
    mixture = TissueMixture(np.array([0.0, 1.0]), np.array([0.5, 0.5]), np.ones(2))
    prior = np.array([[0.15, 0.25], [0.15, 0.25]])
    posterior = mixture.share_out(np.array([0.0, 0.0]), prior)
    assert prior[:, 0].sum() < ANY_TISSUE <= prior[:, 1].sum()
    assert posterior[:, 0].tolist() == [0, 0]
    assert posterior[:, 1].sum() == pytest.approx(1)


def test_a_tissue_without_a_voxel_gives_no_mixture() -> None:
    truth, values = folded()
    prior = blurred(truth)
    prior[1] = 0
    assert fit_mixture(values, prior) is None
    assert fit_mixture(values, np.zeros_like(prior)) is None


def test_a_stripped_background_is_no_tissue_and_one_grey_gives_no_mixture() -> None:
    truth, values = folded()
    values[truth == 0] = 0
    mixture = fit_mixture(values, blurred(truth))
    assert mixture is not None
    np.testing.assert_allclose(mixture.mean, MEANS, atol=0.05)
    posterior = mixture.share_out(values, blurred(truth))
    assert not posterior[:, truth == 0].any()
    assert (posterior[:, 6:].sum(axis=0) > 0.99).all()
    assert fit_mixture(np.ones_like(values), blurred(truth)) is None
