"""The probe: a regularised logistic regression on standardised features of the frozen backbone, solved to convergence.

It is what every tuning method has to beat, costs seconds, and is where the others start. Its strength is chosen on the shots alone: with
few images a cross-validation says little, so what it says is weighed against what was found on development sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from medlore.errors import DataError, InputError

Task = Literal["single", "multi"]
Array = NDArray[np.float64]

STRENGTHS = tuple(float(10.0**power) for power in np.arange(-4.0, 1.01, 0.5))
FOLDS = 5  # at most
# Where the best strength of features with d dimensions lies on development sets: its logarithm is normal around this
# mean - log10(d / 384).
PRIOR_MEAN, PRIOR_DEVIATION = -1.3, 0.5  # docs/results/recipe-probes.json


@dataclass(frozen=True)
class Probe:
    """A linear classifier of standardised features.

    Attributes:
        mean: (d,) of the training features.
        deviation: (d,) of the training features; 1 where a feature is constant.
        weight: (c, d) of the standardised features.
        bias: (c,).
        strength: inverse weight of the penalty (scikit-learn's C): the sum of the log losses plus ‖weight‖² / (2 C) is minimal.
        task: `single` (softmax) or `multi` (a sigmoid for each label).
    """

    mean: Array
    deviation: Array
    weight: Array
    bias: Array
    strength: float
    task: Task

    def logits(self, features: NDArray[np.floating]) -> Array:
        """(b, d) features -> (b, c) logits."""
        scores: Array = ((np.asarray(features, np.float64) - self.mean) / self.deviation) @ self.weight.T + self.bias
        return scores

    def as_linear(self) -> tuple[Array, Array]:
        """Weight (c, d) and bias (c,) of the same classifier for features as they are: how a head starts from the probe."""
        weight = self.weight / self.deviation
        return weight, self.bias - weight @ self.mean


@dataclass(frozen=True)
class Choice:
    """What the shots say about each strength.

    Attributes:
        strength: the chosen one.
        held_out: strength -> mean log-likelihood of a held-out image (natural logarithm); empty where nothing could be held out.
        folds: number of folds; 0 where a class has one image and the strength is that of the development sets.
        value: log-likelihood of all images held out in turn, and logarithm of the prior, at that strength; to compare features with.
    """

    strength: float
    held_out: dict[float, float]
    folds: int
    value: float = 0.0


def fit_probe(
    features: NDArray[np.floating], targets: NDArray[np.integer], *, classes: int, task: Task = "single", strength: float = 0.01
) -> Probe:
    """Fit to convergence.

    Args:
        features: (n, d).
        targets: (n,) class numbers, or (n, c) of 0 and 1 for several labels, NaN where one is not known and takes no part.
        classes: c.
        task: `single` or `multi`.
        strength: C, above 0.

    Raises:
        DataError: features that are not finite, or all the same.
    """
    return next(_path(_varied(features), targets, classes, task, (strength,)))


def _path(
    values: Array, targets: NDArray[np.integer], classes: int, task: Task, strengths: Sequence[float], *, exact: bool = True
) -> Iterator[Probe]:
    """Probes of several strengths, ascending; each is solved from where the one before it was.

    Not `exact`: as far as a comparison of strengths needs it.
    """
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    deviation = np.where(deviation > max(1e-6 * deviation.max(), 1e-300), deviation, 1.0)
    basis, coordinates = _row_space((values - mean) / deviation)
    wanted = np.eye(classes)[targets] if task == "single" else np.asarray(targets, np.float64)
    start = np.zeros(classes * (coordinates.shape[1] + 1))
    for strength in strengths:
        start = _minimise(coordinates, wanted, strength, task, start, exact=exact)
        size = classes * coordinates.shape[1]
        weight, bias = start[:size].reshape(classes, -1), start[size:]
        bias = bias - bias.mean() if task == "single" else bias  # a constant on all classes says nothing
        yield Probe(mean, deviation, weight @ basis, bias, strength, task)


def choose_strength(
    features: NDArray[np.floating],
    targets: NDArray[np.integer],
    *,
    classes: int,
    task: Task = "single",
    groups: Sequence[object] | None = None,
    repeats: int = 4,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Choice:
    """The strength whose held-out log-likelihood, plus the logarithm of the prior of the development sets, is largest.

    With n images the first term grows as n and the second does not: fifteen images hardly move the choice, five hundred decide it.

    Args:
        features: (n, d).
        targets: as in `fit_probe`.
        classes: c.
        task: `single` or `multi`.
        groups: patient of each image; whole patients are held out.
        repeats: of the whole cross-validation, with other folds.
        seed: of the folds.
        strengths: between which it chooses, ascending.

    Raises:
        DataError: features that are not finite, or all the same.
    """
    values = _varied(features)
    count = possible_folds(targets, classes, task, groups, FOLDS)
    prior = {c: log_prior(c, values.shape[1]) for c in strengths}
    if count < 2:
        return Choice(max(prior, key=lambda c: prior[c]), {}, 0)
    total = dict.fromkeys(strengths, 0.0)
    for repeat in range(repeats):
        for train, held in fold_rows(targets, task, groups, folds=count, seed=seed + repeat):
            for probe in _path(values[train], targets[train], classes, task, strengths, exact=False):
                total[probe.strength] += log_likelihood(probe.logits(values[held]), targets[held], task) / repeats
    best = max(strengths, key=lambda c: total[c] + prior[c])
    return Choice(best, {c: value / len(values) for c, value in total.items()}, count, total[best] + prior[best])


def log_prior(strength: float, width: int) -> float:
    """Logarithm of the prior of the development sets, up to a constant, for features with `width` dimensions."""
    centre = PRIOR_MEAN - np.log10(width / 384)
    return float(-0.5 * ((np.log10(strength) - centre) / PRIOR_DEVIATION) ** 2)


def usual_strengths(width: int) -> tuple[float, ...]:
    """The strengths within one deviation of the prior: enough to compare features with each other."""
    return tuple(c for c in STRENGTHS if log_prior(c, width) >= -0.6) or (max(STRENGTHS, key=lambda c: log_prior(c, width)),)


def log_likelihood(logits: Array, targets: NDArray[np.integer], task: Task) -> float:
    """Sum over images of the logarithm of what the classifier gives to the truth; several labels count as their mean."""
    if task == "single":
        return float(scipy.special.log_softmax(logits, axis=1)[np.arange(len(targets)), targets].sum())
    signs = 2.0 * np.asarray(targets, np.float64) - 1.0
    known = ~np.isnan(signs)
    each = np.where(known, -np.logaddexp(0.0, -np.nan_to_num(signs) * logits), 0.0)
    return float((each.sum(axis=1) / np.maximum(known.sum(axis=1), 1)).sum())


def fold_rows(
    targets: NDArray[np.integer], task: Task, groups: Sequence[object] | None, *, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows that train and rows that are held out: every class has its share in each fold, and no patient is in both parts."""
    rng = np.random.default_rng(seed)
    names = np.arange(len(targets)) if groups is None else _numbered(groups)
    stratum = targets if task == "single" else _rarest_label(targets)
    of_group = np.full(names.max() + 1, -1)
    sizes = np.zeros(folds)
    for label in np.unique(stratum):
        own = [group for group in np.unique(names[stratum == label]) if of_group[group] < 0]
        for group in rng.permutation(own):
            counts = np.bincount(of_group[names[(stratum == label) & (of_group[names] >= 0)]], minlength=folds)
            fold = int(np.lexsort((rng.random(folds), sizes, counts))[0])
            of_group[group] = fold
            sizes[fold] += int((names == group).sum())
    fold_of = of_group[names]
    for fold in range(folds):
        held = np.flatnonzero(fold_of == fold)
        if len(held) and len(held) < len(targets):
            yield np.flatnonzero(fold_of != fold), held


def possible_folds(targets: NDArray[np.integer], classes: int, task: Task, groups: Sequence[object] | None, folds: int) -> int:
    """Folds in which every class still has an image to train on: at most the images (patients) of the rarest class."""
    names = np.arange(len(targets)) if groups is None else _numbered(groups)
    if task == "multi":
        return min(folds, len(np.unique(names)))
    per_class = [len(np.unique(names[targets == label])) for label in range(classes)]
    present = [count for count in per_class if count]
    if len(present) < 2:
        raise InputError("images", f"{len(present)} class", "at least two classes", "add images of another class")
    return min(folds, *present)


def _minimise(coordinates: Array, wanted: Array, strength: float, task: Task, start: Array, *, exact: bool) -> Array:
    """Weights (c k) and biases (c) in one row at the minimum of log losses and penalty, by L-BFGS from `start`.

    The columns of `coordinates` are orthogonal, so the curvature is nearly diagonal at the start: in units in which it is one, a dozen
    steps do what takes hundreds without.
    """
    classes, size = wanted.shape[1], coordinates.shape[1]
    known, wanted = ~np.isnan(wanted), np.nan_to_num(wanted)
    curvature = 0.25 if task == "multi" else (1 - 1 / classes) / classes
    unit = 1 / np.sqrt(curvature * (coordinates**2).sum(axis=0) + 1 / strength)  # k
    bias_unit = 1 / np.sqrt(curvature * len(coordinates))
    units = np.concatenate([np.tile(unit, classes), np.full(classes, bias_unit)])

    def value_and_gradient(flat: Array) -> tuple[float, Array]:
        own = flat * units
        weight, bias = own[: classes * size].reshape(classes, size), own[classes * size :]
        logits = coordinates @ weight.T + bias
        if task == "single":
            shifted = logits - logits.max(axis=1, keepdims=True)
            powers = np.exp(shifted)
            total = powers.sum(axis=1, keepdims=True)
            loss = float(np.log(total).sum() - (wanted * shifted).sum())
            slope = powers / total - wanted
        else:
            loss = float((known * (np.logaddexp(0.0, logits) - wanted * logits)).sum())
            slope = known * (scipy.special.expit(logits) - wanted)
        loss += float((weight**2).sum()) / (2 * strength)
        return loss, units * np.concatenate([(slope.T @ coordinates + weight / strength).ravel(), slope.sum(axis=0)])

    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-16 if exact else 1e-6, "gtol": 1e-9 if exact else 1e-3}
    found = scipy.optimize.minimize(value_and_gradient, start / units, jac=True, method="L-BFGS-B", options=options).x
    return np.asarray(found * units)


def _row_space(standard: Array) -> tuple[Array, Array]:
    """An orthonormal basis (k, d) of the rows and their coordinates (n, k), in which the penalty is the same; the latter are orthogonal."""
    left, singular, basis = np.linalg.svd(standard, full_matrices=False)
    kept = singular > 1e-10 * max(singular[0], 1e-300)
    return basis[kept], left[:, kept] * singular[kept]


def _varied(features: NDArray[np.floating]) -> Array:
    """Features as float64 that are finite and differ."""
    values = _checked(features)
    if not (values.std(axis=0) > 0).any():
        raise DataError("features", "the same for every image", "features that differ", "check the images and the backbone")
    return values


def _checked(features: NDArray[np.floating]) -> Array:
    values = np.asarray(features, np.float64)
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        shown = ", ".join(str(row + 1) for row in rows[:5])
        raise DataError(
            "features", f"not finite in {len(rows)} images (first: {shown})", "finite numbers", "check these images and the weights"
        )
    return values


def _numbered(groups: Sequence[object]) -> NDArray[np.int64]:
    """A number for each patient; an image without one is a patient of its own."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(("image", i) if group is None else group, len(numbers)) for i, group in enumerate(groups)])


def _rarest_label(targets: NDArray[np.integer]) -> NDArray[np.integer]:
    """The rarest label that an image has (its column), or the number of labels where it has none: what its fold is balanced by."""
    frequency = np.nansum(targets, axis=0)
    ranked = np.where(targets > 0, frequency, targets.shape[0] + 1)
    chosen: NDArray[np.integer] = np.where((targets > 0).any(axis=1), ranked.argmin(axis=1), targets.shape[1])
    return chosen
