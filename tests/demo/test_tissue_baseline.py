"""K-means of grey values: what it finds, that it repeats, and what it reaches on the template of nilearn."""

from __future__ import annotations

import numpy as np
import pytest

from medlore.data.volumes.nifti import read_nifti
from medlore.demo.segmentation import template_file, tissue_truth
from medlore.demo.tissue_baseline import best_dice, kmeans_classes
from medlore.errors import DataError
from medlore.metrics.masks import dice


def test_three_separate_classes_are_found_exactly() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (30, 31, 32))
    image = np.choose(truth, [7.0, 10.0, 50.0, 80.0]) + rng.normal(0, 1, truth.shape) * (truth > 0)
    found = kmeans_classes(image, truth > 0)
    np.testing.assert_array_equal(found, truth)
    assert best_dice(found, truth == 2) == 1
    np.testing.assert_array_equal(kmeans_classes(image, truth > 0), found)


def test_it_is_the_k_means_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(30, 10, 800), rng.normal(80, 12, 1500), rng.normal(120, 9, 900)])
    found = kmeans_classes(values, np.ones(values.shape, bool))
    theirs = KMeans(3, n_init=5, random_state=0).fit(values[:, None])
    order = np.argsort(np.argsort(theirs.cluster_centers_[:, 0]))
    assert (found == order[theirs.labels_] + 1).mean() > 0.995


def test_the_baseline_of_the_template() -> None:
    image = read_nifti(template_file()).array
    classes = kmeans_classes(image, image > 0)
    for label, expected in (("grey matter", 0.90), ("white matter", 0.94)):
        truth = tissue_truth(label)
        assert best_dice(classes, truth) == pytest.approx(expected, abs=0.015)
        assert best_dice(classes, truth) >= max(dice(classes == 2, truth), dice(classes == 3, truth))
    assert tissue_truth("hippocampus") is None


def test_images_without_contrast_are_refused() -> None:
    with pytest.raises(DataError, match="without contrast"):
        kmeans_classes(np.zeros((4, 4, 4)), np.ones((4, 4, 4), bool))
    with pytest.raises(DataError, match="different finite grey values"):
        kmeans_classes(np.array([0.0, np.nan, 1.0, 2.0]), np.ones(4, bool))
