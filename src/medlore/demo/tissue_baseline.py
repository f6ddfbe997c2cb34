"""The trivial baseline of brain tissue: k-means of the grey values, which needs no training.

On a skull-stripped T1 image three classes come close to cerebrospinal fluid, grey and white matter. A segmenter that is
not better has learnt nothing of use.
"""

from __future__ import annotations

import numpy as np

from medlore.data.volumes.geometry import Array
from medlore.errors import DataError
from medlore.metrics.masks import dice

_BINS = 2048
_ROUNDS = 500


def kmeans_classes(image: Array, inside: Array, *, classes: int = 3) -> Array:
    """K-means in one dimension, on a histogram of the grey values; the same result every time.

    Args:
        image: x y z, any real numbers.
        inside: Boolean x y z, the voxels to be sorted (the brain).
        classes: how many.

    Returns:
        x y z uint8: 0 outside, 1 for the darkest class, `classes` for the brightest.

    Raises:
        DataError: fewer different grey values than classes inside.

    Example:
        >>> image = np.array([0.0, 1.0, 1.1, 5.0, 5.2, 9.0])
        >>> kmeans_classes(image, image > 0).tolist()
        [0, 1, 1, 2, 2, 3]
    """
    values = np.asarray(image[inside], np.float32)
    if not np.isfinite(values).all() or np.unique(values[:: max(1, values.size // 100_000)]).size < classes:
        accepted = f"at least {classes} different finite grey values"
        raise DataError("k-means", f"{values.size} voxels without contrast", accepted, "check the image and the mask of the brain")
    counts, edges = np.histogram(values, bins=_BINS)
    centres = _lloyd(counts.astype(np.float64), (edges[1:] + edges[:-1]) / 2, classes)
    found = np.zeros(image.shape, np.uint8)
    found[inside] = 1 + np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return found


def best_dice(classes: Array, truth: Array) -> float:
    """Dice of the one class that fits a mask best: the baseline may choose with the truth at hand, so it is never too weak.

    Args:
        classes: x y z, from `kmeans_classes`.
        truth: Boolean x y z.
    """
    return max(dice(classes == value, truth) for value in range(1, int(classes.max()) + 1))


def _lloyd(weights: Array, values: Array, classes: int) -> Array:
    """Centres of the classes, rising. The first ones are the middles of equally full parts."""
    shares = np.cumsum(weights) / weights.sum()
    centres = np.array([values[np.searchsorted(shares, (k + 0.5) / classes)] for k in range(classes)])
    for _ in range(_ROUNDS):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        full = np.bincount(nearest, weights, classes)
        sums = np.bincount(nearest, weights * values, classes)
        moved = np.where(full > 0, sums / np.maximum(full, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres
