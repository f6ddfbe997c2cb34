"""How good scores are: AUC, average precision, accuracy and their intervals, with undefined classes named.

All values are shares of 0 to 1. A class without positives has no AUC and no average precision, one without negatives has
no AUC: such classes leave the mean and are listed under `undefined` (mmcls counts them as 0 in the mean of average precision, and the
MedFMC baselines count the class before twice in the mean of AUC).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medlore.errors import DataError, InputError
from medlore.metrics.ranking import rank_known

Task = Literal["single", "multi"]
LEVEL = 0.95
_CHUNK = 4_000_000  # weights held at a time


def classification_report(
    targets: ArrayLike,
    scores: ArrayLike,
    *,
    classes: Sequence[str],
    task: Task,
    seed: int = 0,
    bootstrap: int = 1000,
    groups: Sequence[str | None] | None = None,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Measure scores against labels.

    Args:
        targets: (b,) class indices (`single`), or (b, c) zeros and ones (`multi`), NaN where a label is not known: it takes no part
            in any metric.
        scores: (b, c), higher means more likely: probabilities or logits for the rankings; for a multi-label accuracy
            they are compared with `threshold`, so give probabilities there. Ties of the top class go to the first.
        classes: c class names.
        task: `single` or `multi`.
        seed: of the bootstrap.
        bootstrap: resamples; 0 leaves the intervals out.
        groups: patient or study of each item: whole groups are then resampled, which is right when the images of one
            patient resemble each other. Items without a group are groups of one.
        threshold: from which score on a label counts as given (`multi`).

    Returns:
        A dictionary ready for JSON: `items`, `task`, `metrics` (name to value, low, high), `majority` (the same metrics
        of a constant answer: the most frequent class, or every label's more frequent state), `undefined` (classes without
        `auc` or `average_precision`), `per_class` (one entry a class; `labelled` counts the items
        whose label is known), `bootstrap` (how the intervals were made).

        Metrics: `macro_auc`, `mean_average_precision`, `accuracy` (multi-label: share of right labels), and
        `balanced_accuracy` (single: mean recall of the classes that occur), or `exact_match`, `class_precision`,
        `class_recall`, `class_f1`, `overall_precision`, `overall_recall`, `overall_f1` (multi: as in mmcls). A value that is
        not defined is None.

        Intervals are 95 % percentile intervals; in each resample the means run over the classes defined there.

    Raises:
        InputError: shapes that do not fit, or an unknown task.
        DataError: targets out of range, or scores that are not finite.

    Examples:
        >>> report = classification_report([0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], classes=("a", "b"), task="single")
        >>> round(report["metrics"]["accuracy"]["value"], 3), report["majority"]["class"]
        (0.667, 'a')
    """
    hits, known, guesses = _checked(targets, scores, classes, task)
    count = len(hits)
    if bootstrap < 0:
        raise InputError("bootstrap", f"got {bootstrap}", "a whole number from 0", "give 0 to leave the intervals out")
    parts = [_measure(hits, known, guesses, weights, task, threshold) for weights in _resamples(count, groups, bootstrap, seed)]
    table = {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}
    return {
        "task": task,
        "items": count,
        "metrics": {name: _entry(values) for name, values in table.items() if values.ndim == 1},
        "majority": _majority(hits, known, classes, task),
        "undefined": {
            "auc": [name for name, value in zip(classes, table["_auc"][:, 0], strict=True) if np.isnan(value)],
            "average_precision": [name for name, value in zip(classes, table["_ap"][:, 0], strict=True) if np.isnan(value)],
        },
        "per_class": _per_class(hits, known, classes, table),
        "bootstrap": {
            "resamples": bootstrap,
            "unit": "item" if groups is None or all(g is None for g in groups) else "group",
            "level": LEVEL,
            "seed": seed,
        },
    }


def paired_difference(
    targets: ArrayLike,
    pair: tuple[ArrayLike, ArrayLike],
    *,
    classes: Sequence[str],
    task: Task,
    measure: str,
    seed: int = 0,
    bootstrap: int = 1000,
    groups: Sequence[str | None] | None = None,
) -> dict[str, float | None]:
    """How much better one set of scores is than another on the same items: both are measured on the same resamples.

    Args:
        targets: as in `classification_report`.
        pair: (b, c) scores of the one and of the other.
        classes: c class names.
        task: `single` or `multi`.
        measure: name of a metric.
        seed: of the bootstrap.
        bootstrap: resamples; 0 leaves the interval out.
        groups: patient or study of each item; whole groups are resampled.

    Returns:
        `value` (the one minus the other), `low` and `high` of the 95 % percentile interval; None where not defined.

    Raises:
        InputError: shapes that do not fit.
        DataError: targets out of range, or scores that are not finite.
    """
    (hits, known, ours), (_, _, theirs) = (_checked(targets, scores, classes, task) for scores in pair)
    parts = [
        _measure(hits, known, ours, weights, task, 0.5)[measure] - _measure(hits, known, theirs, weights, task, 0.5)[measure]
        for weights in _resamples(len(hits), groups, bootstrap, seed)
    ]
    return _entry(np.concatenate(parts))


def _checked(
    targets: ArrayLike, scores: ArrayLike, classes: Sequence[str], task: Task
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Which labels are present and which are known, (b, c) booleans, and scores (b, c)."""
    labels, guesses = np.asarray(targets), np.asarray(scores, dtype=np.float64)
    if task not in ("single", "multi"):
        raise InputError("task", repr(task), "'single' or 'multi'", "use one of them")
    wanted = "(b,)" if task == "single" else f"(b, {len(classes)})"
    if guesses.ndim != 2 or guesses.shape[1] != len(classes) or len(labels) != len(guesses) or not len(guesses):
        raise InputError(
            "scores", f"shape {guesses.shape} with {len(labels)} targets", f"(b, {len(classes)}), b from 1", "give one row an item"
        )
    if labels.shape != ((len(guesses),) if task == "single" else guesses.shape):
        raise InputError("targets", f"shape {labels.shape} for task {task!r}", wanted, "correct the labels or the task")
    bad = np.flatnonzero(~np.isfinite(guesses).all(axis=1))
    if len(bad):
        raise DataError("scores", f"{len(bad)} rows are not finite (first: {bad[0]})", "finite numbers", "look at the model's output")
    top = len(classes) - 1 if task == "single" else 1
    known = ~np.isnan(labels) if task == "multi" else np.ones(labels.shape, dtype=bool)
    if not (~known | ((labels >= 0) & (labels <= top) & (labels == np.round(labels)))).all():
        raise DataError("targets", "labels out of range", f"whole numbers from 0 to {top}", "correct the labels or the class list")
    if task == "single":
        return labels.astype(np.int64)[:, None] == np.arange(len(classes)), np.ones(guesses.shape, dtype=bool), guesses
    return labels == 1, known, guesses


def _resamples(count: int, groups: Sequence[str | None] | None, bootstrap: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """(b, r) weights: first the sample itself, then resamples of items or of whole groups, a few at a time."""
    if groups is not None and len(groups) != count:
        raise InputError("groups", f"{len(groups)} for {count} items", "one per item", "give one group per item")
    names = [f"item {i}" if g is None else f"group {g}" for i, g in enumerate(groups or [None] * count)]
    index = np.unique(names, return_inverse=True)[1] if groups is not None else np.arange(count)
    units = int(index.max()) + 1
    yield np.ones((count, 1), dtype=np.float32)
    generator = np.random.default_rng(seed)
    width = max(1, _CHUNK // count)
    for start in range(0, bootstrap, width):  # the stream of draws does not depend on the width
        rows = min(width, bootstrap - start)
        draws = generator.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        weights = np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float32)
        yield np.ascontiguousarray(weights[:, index].T)


def _measure(
    hits: NDArray[np.bool_],
    known: NDArray[np.bool_],
    scores: NDArray[np.float64],
    weights: NDArray[np.float32],
    task: Task,
    threshold: float,
) -> dict[str, NDArray[np.float64]]:
    """Every metric for every column of `weights`; names with an underscore hold one row per class."""
    ranked = [rank_known(hits[:, c], known[:, c], scores[:, c], weights) for c in range(hits.shape[1])]
    auc, precision = np.stack([r.auc for r in ranked]), np.stack([r.precision for r in ranked])
    values = {"macro_auc": _mean_of_defined(auc), "mean_average_precision": _mean_of_defined(precision)}
    values |= _single(hits, scores, weights) if task == "single" else _multi(hits, known, scores >= threshold, weights)
    return values | {"_auc": auc, "_ap": precision}


def _single(hits: NDArray[np.bool_], scores: NDArray[np.float64], weights: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
    answered = scores.argmax(axis=1)[:, None] == np.arange(scores.shape[1])
    drawn = weights.T.astype(np.float64)  # r b
    right = (hits & answered).any(axis=1)
    with np.errstate(invalid="ignore"):
        recall = (drawn @ (hits & answered)) / (drawn @ hits)  # r c
    return {
        "accuracy": drawn @ right / drawn.sum(axis=1),
        "balanced_accuracy": _mean_of_defined(recall.T),
        "_recall": recall.T,
    }


def _multi(
    hits: NDArray[np.bool_], known: NDArray[np.bool_], given: NDArray[np.bool_], weights: NDArray[np.float32]
) -> dict[str, NDArray[np.float64]]:
    drawn = weights.T.astype(np.float64)
    right, given = (hits == given) & known, given & known
    true, answered, present = drawn @ (hits & given), drawn @ given, drawn @ hits  # r c
    # As in mmcls, a class that is never answered counts with precision 0, one that never occurs with recall 0.
    class_precision = (true / np.maximum(answered, 1e-12)).mean(axis=1)
    class_recall = (true / np.maximum(present, 1e-12)).mean(axis=1)
    overall_precision = true.sum(axis=1) / np.maximum(answered.sum(axis=1), 1e-12)
    overall_recall = true.sum(axis=1) / np.maximum(present.sum(axis=1), 1e-12)
    with np.errstate(invalid="ignore"):
        recall = (true / present).T
        accuracy = drawn @ right.mean(axis=1) / (drawn @ known.mean(axis=1))
        exact_match = drawn @ ((right | ~known).all(axis=1) & known.any(axis=1)) / (drawn @ known.any(axis=1))
    return {
        "accuracy": accuracy,
        "exact_match": exact_match,
        "class_precision": class_precision,
        "class_recall": class_recall,
        "class_f1": _harmonic(class_precision, class_recall),
        "overall_precision": overall_precision,
        "overall_recall": overall_recall,
        "overall_f1": _harmonic(overall_precision, overall_recall),
        "_recall": recall,
    }


def _harmonic(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * a * b / np.maximum(a + b, 1e-12)


def _mean_of_defined(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(c, r) to (r,): the mean over classes that are not NaN; NaN where none is."""
    defined = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, table, 0).sum(axis=0) / defined.sum(axis=0))


def _entry(values: NDArray[np.float64]) -> dict[str, float | None]:
    """The value of the sample (column 0) and the interval of the resamples."""
    spread = values[1:][~np.isnan(values[1:])]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(spread, (tail, 1 - tail)) if len(spread) else (np.nan, np.nan)
    return {"value": _number(values[0]), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _per_class(
    hits: NDArray[np.bool_], known: NDArray[np.bool_], classes: Sequence[str], table: dict[str, NDArray[np.float64]]
) -> list[dict[str, Any]]:
    return [
        {
            "class": name,
            "labelled": int(known[:, c].sum()),
            "positives": int(hits[:, c].sum()),
            "auc": _entry(table["_auc"][c]),
            "average_precision": _entry(table["_ap"][c]),
            "recall": _entry(table["_recall"][c]),
        }
        for c, name in enumerate(classes)
    ]


def _majority(hits: NDArray[np.bool_], known: NDArray[np.bool_], classes: Sequence[str], task: Task) -> dict[str, Any]:
    """What a constant answer reaches: it ranks nothing, so its AUC is one half and its precision the prevalence."""
    share = hits.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    answer = (np.arange(len(classes)) == share.argmax()) if task == "single" else share > 0.5
    constant = np.broadcast_to(answer.astype(np.float64), hits.shape)
    ones = np.ones((len(hits), 1), dtype=np.float32)
    values = _measure(hits, known, np.asarray(constant), ones, task, 0.5)
    named = (
        {"class": classes[int(share.argmax())]} if task == "single" else {"labels": [n for n, a in zip(classes, answer, strict=True) if a]}
    )
    return named | {name: _number(value[0]) for name, value in values.items() if value.ndim == 1}
