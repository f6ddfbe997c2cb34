"""AUC and average precision of one class, for the sample itself and for many weighted resamples of it at once.

A resample is a row of integer weights: how often each item was drawn. The scores are sorted once; every resample is then
a sum over the same order, so a thousand of them cost little more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """AUC and average precision, one value per resample; NaN where a resample has no positive (or, for AUC, no negative).

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
    tie_group = np.cumsum(np.r_[True, sorted_scores[1:] != sorted_scores[:-1]]) - 1
    has_positive = np.bincount(tie_group, weights=hit) > 0
    # Precision and pair counts are read only at tie groups with a positive, g of them, best score first. Segment 2j + 1 is
    # the j-th of them, segment 2j the stretch of negatives before it; the last segment is what follows the last one.
    segment = (2 * np.cumsum(has_positive) - has_positive)[tie_group]
    groups = int(has_positive.sum())
    positives = _sums(segment[hit] // 2, order[hit], groups, weights)  # g r
    negatives = _sums(segment[~hit], order[~hit], 2 * groups + 1, weights)  # 2g+1 r
    tied = negatives[1::2]
    above = np.cumsum(negatives, axis=0)[0:-1:2]
    total, other = positives.sum(axis=0), negatives.sum(axis=0)
    positives_above = np.cumsum(positives, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = 1.0 - np.einsum("gr,gr->r", positives, above + 0.5 * tied) / (total * other)
        at_least = positives_above + above + tied
        precision = np.where(at_least > 0, positives_above / at_least, 0.0)
        average = np.einsum("gr,gr->r", positives, precision) / total
    auc[(total == 0) | (other == 0)] = np.nan
    return Ranking(auc, average)


def _sums(rows: NDArray[np.integer], items: NDArray[np.integer], count: int, weights: NDArray[np.float32]) -> Array:
    """Sum the weights of `items` into `count` rows; (count, r). `rows` is ascending.

    A sparse product gathers and sums in one pass. float32 holds the sums exactly while there are fewer than 2**24 items.
    """
    starts = np.searchsorted(rows, np.arange(count + 1))
    pick = scipy.sparse.csr_array((np.ones(len(items), dtype=np.float32), items, starts), shape=(count, len(weights)))
    return np.asarray(pick @ weights, dtype=np.float64)


def rank_known(
    positive: NDArray[np.bool_], known: NDArray[np.bool_], scores: NDArray[np.floating], weights: NDArray[np.float32]
) -> Ranking:
    """`rank_class` over the items whose label is known (b,); the others take no part."""
    if known.all():
        return rank_class(positive, scores, weights)
    return rank_class(positive[known], scores[known], weights[known])


def macro_auc(targets: ArrayLike, scores: ArrayLike) -> float:
    """Mean AUC over the classes that have both positives and negatives; NaN where none has.

    Args:
        targets: (b, c) zeros and ones, NaN where a label is not known.
        scores: (b, c), higher means more likely.
    """
    labels, guesses = np.asarray(targets, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    hits, known = labels == 1, ~np.isnan(labels)
    ones = np.ones((len(hits), 1), dtype=np.float32)
    values = np.array([rank_known(hits[:, c], known[:, c], guesses[:, c], ones).auc[0] for c in range(hits.shape[1])])
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
