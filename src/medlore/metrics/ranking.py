"""AUC and average precision of one class, for the sample itself and for many weighted resamples of it at once.

A resample is a row of integer weights: how often each item was drawn. The scores are sorted once; every resample is then
a sum over the same order, so a thousand of them cost little more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """AUC and average precision, one value a resample; NaN where a resample has no positive (or, for AUC, no negative).

    Args:
        auc: (r,) area under the ROC curve, ties counted half.
        precision: (r,) average precision.
    """

    auc: Array
    precision: Array


def rank_class(positive: NDArray[np.bool_], scores: NDArray[np.floating], weights: NDArray[np.float32]) -> Ranking:
    """Rank one class against the rest.

    AUC is the Mann-Whitney statistic: the share of (positive, negative) pairs in which the positive scores higher, ties
    counted half. Average precision is the mean over positives of the precision at their score: among all items that
    score at least as high, the share of positives. Without ties that is the definition of mmcls (and of MedFMC's
    baselines); tied items share one threshold, as in scikit-learn, so the result never depends on the order of the rows.

    Args:
        positive: (b,) whether the item has the class.
        scores: (b,) any monotone score; higher means more likely.
        weights: (b, r) whole numbers.

    Returns:
        One value a column of `weights`.
    """
    if not positive.any():
        nothing = np.full(weights.shape[1], np.nan)
        return Ranking(nothing, nothing.copy())
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hit = scores[order], positive[order]
    # Tie groups, best score first; runs of groups without positives are merged with the group that follows, since
    # precision and pair counts are read at positives alone.
    starts = np.flatnonzero(np.r_[True, sorted_scores[1:] != sorted_scores[:-1]])
    has_positive = np.add.reduceat(hit.astype(np.int64), starts) > 0
    hits = weights[order[hit]]  # p r
    group_of_hit = np.cumsum(has_positive)[np.searchsorted(starts, np.flatnonzero(hit), side="right") - 1] - 1
    first_hit = np.flatnonzero(np.r_[True, group_of_hit[1:] != group_of_hit[:-1]])
    positives = np.add.reduceat(hits, first_hit, axis=0, dtype=np.float64)  # g r: positives of each tie group with one
    negatives_before, negatives_tied, negatives = _negatives(weights[order], hit, starts, has_positive)
    total = positives.sum(axis=0)
    positives_above = np.cumsum(positives, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        wrong = np.einsum("gr,gr->r", positives, negatives_before + 0.5 * negatives_tied)
        auc = 1.0 - wrong / (total * negatives)
        at_least = positives_above + negatives_before + negatives_tied
        precision = np.where(at_least > 0, positives_above / at_least, 0.0)
        average = np.einsum("gr,gr->r", positives, precision) / total
    auc[(total == 0) | (negatives == 0)] = np.nan
    return Ranking(auc, average)


def _negatives(
    weights: NDArray[np.float32], hit: NDArray[np.bool_], starts: NDArray[np.int64], has_positive: NDArray[np.bool_]
) -> tuple[Array, Array, Array]:
    """Negative weight strictly above each tie group with a positive, inside it, and in all. Each (g, r), the last (r,)."""
    weights[hit] = 0  # `weights` is the sorted copy
    with_positive = starts[has_positive]
    following = np.r_[starts[1:], len(hit)][has_positive]  # where each of these groups ends
    edges = np.stack([with_positive, following], axis=1).ravel()
    edges = np.r_[0, edges]
    # Sums over [edge, next edge); an empty stretch would give its first row in reduceat, so it is set to nothing.
    padded = np.vstack([weights, np.zeros((1, weights.shape[1]), dtype=weights.dtype)])
    sums = np.add.reduceat(padded, edges, axis=0, dtype=np.float64)
    lengths = np.diff(np.r_[edges, len(padded)])
    sums[lengths == 0] = 0
    between, tied = sums[0::2], sums[1::2]  # (g + 1) r: before, between and after the groups; g r: inside
    before = np.cumsum(between[:-1], axis=0)
    before[1:] += np.cumsum(tied, axis=0)[:-1]
    return before, tied, between.sum(axis=0) + tied.sum(axis=0)
