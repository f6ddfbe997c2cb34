"""The probe: the numbers of scikit-learn, the head that it becomes, and a strength that few images cannot throw about."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from medlore.errors import DataError, InputError
from medlore.tuning.probe import STRENGTHS, choose_strength, fit_probe, fold_rows, log_prior


def blobs(
    per_class: int, *, classes: int = 3, width: int = 40, apart: float = 1.5, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), per_class)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart / np.sqrt(width)
    return (centres[targets] + rng.normal(size=(len(targets), width))) * np.linspace(0.1, 9, width) + 3, targets


@pytest.mark.parametrize("per_class", [3, 60])  # fewer and more images than dimensions
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_one_label_equals_scikit_learn(per_class: int, strength: float) -> None:
    features, targets = blobs(per_class)
    probe = fit_probe(features, targets, classes=3, strength=strength)
    standard = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(standard, targets)
    assert np.allclose(probe.weight, theirs.coef_, atol=1e-5)
    ours = probe.logits(features)
    assert np.allclose(
        ours - ours.mean(1, keepdims=True),
        theirs.decision_function(standard) - theirs.decision_function(standard).mean(1, keepdims=True),
        atol=1e-4,
    )


def test_several_labels_equal_one_regression_each() -> None:
    features, _ = blobs(20)
    targets = (np.random.default_rng(1).random((60, 4)) < 0.4).astype(np.int64)
    probe = fit_probe(features, targets, classes=4, task="multi", strength=0.1)
    standard = (features - features.mean(0)) / features.std(0)
    for label in range(4):
        theirs = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(standard, targets[:, label])
        assert np.allclose(probe.weight[label], theirs.coef_[0], atol=1e-4)
        assert probe.bias[label] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_the_head_for_raw_features_gives_the_same_logits() -> None:
    features, targets = blobs(5)
    probe = fit_probe(features, targets, classes=3)
    weight, bias = probe.as_linear()
    assert np.allclose(features @ weight.T + bias, probe.logits(features))


def test_a_constant_feature_counts_nowhere() -> None:
    features, targets = blobs(5)
    features[:, 7] = 5.0
    assert np.abs(fit_probe(features, targets, classes=3).weight[:, 7]).max() < 1e-12


def test_few_images_leave_the_strength_of_the_development_sets_and_many_decide_it() -> None:
    centre = max(STRENGTHS, key=lambda c: log_prior(c, 40))
    noise = np.random.default_rng(3)
    few, targets = blobs(5, apart=0.0)
    chosen = choose_strength(few, targets, classes=3)
    assert abs(np.log10(chosen.strength / centre)) <= 1
    many = noise.normal(size=(600, 40))
    assert choose_strength(many, noise.integers(0, 3, 600), classes=3, repeats=1).strength < centre / 5  # nothing to learn
    clear, labels = blobs(200, apart=12.0)
    assert choose_strength(clear, labels, classes=3, repeats=1).strength > centre


def test_one_image_of_a_class_chooses_nothing() -> None:
    features, targets = blobs(1)
    choice = choose_strength(features, targets, classes=3)
    assert (choice.folds, choice.held_out) == (0, {})
    assert choice.strength == max(STRENGTHS, key=lambda c: log_prior(c, 40))


def test_folds_share_no_patient_and_hold_every_class() -> None:
    _, targets = blobs(10)
    groups = [f"patient {i // 2}" for i in range(30)]
    seen: list[int] = []
    for train, held in fold_rows(targets, "single", groups, folds=5, seed=0):
        assert not {groups[i] for i in train} & {groups[i] for i in held}
        assert set(targets[held]) == {0, 1, 2}
        seen += held.tolist()
    assert sorted(seen) == list(range(30))


def test_bad_features_are_named() -> None:
    features, targets = blobs(5)
    features[3, 2] = np.nan
    with pytest.raises(DataError, match=r"features: not finite in 1 images \(first: 4\)"):
        fit_probe(features, targets, classes=3)
    with pytest.raises(DataError, match="features: the same for every image"):
        fit_probe(np.ones((6, 4)), np.array([0, 0, 0, 1, 1, 1]), classes=2)
    with pytest.raises(InputError, match="images: 1 class"):
        choose_strength(blobs(5)[0], np.zeros(15, np.int64), classes=3)
