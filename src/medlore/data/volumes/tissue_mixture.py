"""Tissue by grey value and place: a Gaussian mixture whose spatial prior is what a network found.

A network knows which fold of the cortex a voxel lies in, but its borders are as coarse as its grid. The grey values of the
file are as fine as the file, but the same grey means different things in different places. Expectation and maximisation bring
the two together: one Gaussian a tissue is fitted to the grey values that the network gives to it, each voxel is then shared out
by grey value and place, and so on until nothing moves. How much there is of each tissue is fitted too. No tissue's Gaussian is
wider than the middle one: noise is the same everywhere, and what makes one wider are the voxels on its border with another.

Source: Van Leemput et al., IEEE TMI 18 (1999) 897-908; Ashburner and Friston, NeuroImage 26 (2005) 839-851 (there the prior is
an atlas).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array

ANY_TISSUE = 0.4  # voxels where the network's probabilities sum to less are none of the tissues
_ROUNDS = 40
_SETTLED = 1e-4  # of the range of grey values
_SAMPLES = 80_000
_FLOOR = 0.1  # least prior: a network is never quite sure
_LEAST_DEVIATION = 0.01  # of the range


@dataclass(frozen=True)
class TissueMixture:
    """One Gaussian a tissue.

    Args:
        mean: k grey values.
        deviation: k.
        proportion: k factors of the prior, around 1.
        background: values up to this one are no tissue (what a stripped skull leaves behind).
        kept: share of the voxels of the fit whose likeliest tissue stays the prior's.
    """

    mean: Array
    deviation: Array
    proportion: Array
    background: float = -np.inf
    kept: float = 1.0

    @property
    def separation(self) -> float:
        """The least distance of two tissues' means, in the root mean square of their deviations (d')."""
        k = len(self.mean)
        pairs = [(a, b) for a in range(k) for b in range(a)]
        spread = [np.sqrt((self.deviation[a] ** 2 + self.deviation[b] ** 2) / 2) for a, b in pairs]
        return float(min((abs(self.mean[a] - self.mean[b]) / s for (a, b), s in zip(pairs, spread, strict=True)), default=np.inf))

    def share_out(self, values: Array, prior: Array) -> Array:
        """Posterior probabilities of the tissues.

        Args:
            values: grey values, of any shape.
            prior: k and the same shape, each from 0 to 1.

        Returns:
            Like `prior`, float32; they sum to 1 where the prior's sum reaches `ANY_TISSUE` and there is no background, and are 0 elsewhere.

        Example:
            >>> mixture = TissueMixture(np.array([0.0, 10.0]), np.ones(2), np.ones(2))
            >>> mixture.share_out(np.array([4.9, 5.1, 5.1]), np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1]])).argmax(axis=0).tolist()
            [0, 1, 0]
        """
        posterior = self._shares(values, _weighted(_floored(prior), self.proportion))
        posterior *= (prior.sum(axis=0, dtype=np.float32) >= ANY_TISSUE) & (values > self.background)
        return posterior

    def _shares(self, values: Array, weighted: Array) -> Array:
        """Each tissue's share of every voxel, given the weighted prior."""
        densities = [_density(values, mean, deviation) for mean, deviation in zip(self.mean, self.deviation, strict=True)]
        return _normalised(weighted * np.stack(densities))

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        found = {name: getattr(self, name).round(4).tolist() for name in ("mean", "deviation", "proportion")}
        return {**found, "separation": round(self.separation, 3), "kept": round(self.kept, 3)}


def fit_mixture(values: Array, prior: Array) -> TissueMixture | None:
    """Fit the tissues' Gaussians.

    Args:
        values: grey values, of any shape; the smallest is background.
        prior: k and the same shape, each from 0 to 1.

    Returns:
        The same for the same input, every time; None where a tissue has no voxel.
    """
    background = float(values.min())
    inside = np.flatnonzero((prior.sum(axis=0, dtype=np.float32) >= ANY_TISSUE) & (values > background))
    inside = inside[:: max(1, len(inside) // _SAMPLES)]
    grey = values.reshape(-1)[inside].astype(np.float64)
    there = prior.reshape(len(prior), -1)[:, inside]
    if not len(inside) or (there > 0.5).sum(axis=1).min() == 0:
        return None
    span = max(float(np.ptp(grey)), 1e-6)
    there = _floored(there)
    share, proportion, mean = there, np.ones(len(there)), np.full(len(there), np.inf)
    for _ in range(_ROUNDS):
        found = _fitted(grey, share, proportion, least=_LEAST_DEVIATION * span)
        moved, mean = np.abs(found.mean - mean).max(), found.mean
        if moved < _SETTLED * span:
            break
        weighted = _weighted(there, proportion)
        share = found._shares(grey, weighted)
        proportion = _proportions(share, weighted, proportion)
    return replace(found, background=background, kept=float(np.mean(share.argmax(axis=0) == there.argmax(axis=0))))


def _fitted(grey: Array, share: Array, proportion: Array, *, least: float) -> TissueMixture:
    weight = share.sum(axis=1, dtype=np.float64) + 1e-12
    mean = (share.astype(np.float64) @ grey) / weight
    variance = np.stack([(part * (grey - m) ** 2).sum() for part, m in zip(share, mean, strict=True)]) / weight
    deviation = np.sqrt(variance + least**2)
    return TissueMixture(mean, np.minimum(deviation, np.median(deviation)), proportion)


def _proportions(share: Array, weighted: Array, before: Array) -> Array:
    """The factors under which the prior has as much of each tissue as the posterior (Ashburner and Friston 2005)."""
    found = before * share.sum(axis=1, dtype=np.float64) / (weighted.sum(axis=1, dtype=np.float64) + 1e-12)
    return np.asarray(found / found.mean())


def _floored(prior: Array) -> Array:
    return _normalised(np.maximum(prior, _FLOOR).astype(np.float32))


def _weighted(prior: Array, proportion: Array) -> Array:
    return _normalised(prior * proportion.astype(np.float32).reshape(-1, *[1] * (prior.ndim - 1)))


def _normalised(values: Array) -> Array:
    return np.asarray(values / (values.sum(axis=0) + np.float32(1e-30)))


def _density(values: Array, mean: float, deviation: float) -> Array:
    distance = (np.asarray(values, np.float32) - np.float32(mean)) * np.float32(1 / deviation)
    return np.asarray(np.exp(np.float32(-0.5) * distance * distance) * np.float32(1 / deviation))
