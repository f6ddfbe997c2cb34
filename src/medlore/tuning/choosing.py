"""Method, rate and length chosen on the shots alone: repeated cross-validation within a time budget, the simpler of equals.

With five images a class there is none to spare for validation, and a single split says next to nothing. Every candidate is trained on the
same folds and asked about the images held out; the simplest one is taken whose log-likelihood is within one standard error of the best.

Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees", 1984, section 3.4.3.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.errors import InputError
from medlore.metrics.classification import classification_report
from medlore.training.watching import Watcher
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.facts import score_name
from medlore.tuning.fitting import fit
from medlore.tuning.idle_settings import without_idle
from medlore.tuning.preparing import Workshop, load_backbone_of, prepare
from medlore.tuning.probe import fold_rows, possible_folds
from medlore.tuning.probing import Reading, choose_reading
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import predict_logits, probabilities

FOLDS, REPEATS = 5, 4
AUTO_METHODS = ("linear-probe", "lora", "sr-lora")  # the simplest first
RATE_FACTORS, LENGTH_FACTORS = (0.3, 1.0, 3.0), (1, 3)

Clock = Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        name: in tables.
        settings: of the run that it would be.
    """

    name: str
    settings: FinetuneSettings


@dataclass(frozen=True)
class ShotChoice:
    """What cross-validation on the shots chose.

    Attributes:
        settings: of the run that follows.
        reading: where its head reads.
        report: candidates with their estimates, the chosen one, folds, time.
    """

    settings: FinetuneSettings
    reading: Reading
    report: dict[str, Any]


def candidates_of(settings: FinetuneSettings, images: int) -> list[Candidate]:
    """The simplest first: methods for `--method auto`, else lengths and rates of one method."""
    bare = settings.changed(method="linear-probe" if settings.method == "auto" else settings.method, tune="off")
    if settings.method == "auto":
        return [Candidate(name, without_idle(bare.changed(method=name))) for name in AUTO_METHODS]
    rate, head = settings.rates()
    passes = settings.passes(images)
    made = []
    for length, factor in itertools.product(LENGTH_FACTORS, RATE_FACTORS):
        changes = {"epochs": passes * length, "steps": None, "learning_rate": rate * factor, "head_learning_rate": head * factor}
        made.append(Candidate(f"{settings.method}, {passes * length} passes at {rate * factor:.2g}", bare.changed(**changes)))
    return made


@dataclass
class _Held:
    """What one candidate said of images held out: summed probabilities and log-likelihoods, image by image."""

    scores: NDArray[np.float64]
    likelihood: NDArray[np.float64]
    seconds: float = 0.0


@dataclass
class _Search:
    """A cross-validation as it goes on."""

    images: ImageSet
    candidates: Sequence[Candidate]
    budget: float
    clock: Clock
    counts: NDArray[np.int64] = field(init=False)
    held: dict[str, _Held] = field(init=False)

    def __post_init__(self) -> None:
        count, classes = len(self.images), len(self.images.classes)
        self.counts = np.zeros(count, np.int64)
        self.held = {each.name: _Held(np.zeros((count, classes)), np.zeros(count)) for each in self.candidates}


def choose_on_shots(
    settings: FinetuneSettings, images: ImageSet, workshop: Workshop, *, watcher: Watcher | None = None, clock: Clock = time.monotonic
) -> ShotChoice:
    """Try every candidate on the same folds until the budget is spent, and choose.

    Args:
        settings: with `method` auto, or `tune` cv.
        images: all labelled images of the run; the test images have no part in it.
        workshop: backbones and features that the trainings share.
        watcher: sees one step for each training.
        clock: seconds.

    Raises:
        InputError: the budget is too small for one fold.
    """
    watcher = watcher or Watcher()
    if workshop.accelerator.num_processes > 1:  # each would see another clock
        came = f"choosing on the shots in {workshop.accelerator.num_processes} processes"
        raise InputError("--method auto, --tune cv", came, "one process", "choose in one process, then name what it chose")
    candidates = candidates_of(settings, len(images))
    backbone = load_backbone_of(settings, workshop, classes=len(images.classes))
    reading = choose_reading(settings, backbone, images, workshop.features, workshop.accelerator)
    groups = images.groups if any(group is not None for group in images.groups) else None
    targets = images.targets()
    folds = possible_folds(targets, len(images.classes), images.task, groups, FOLDS)
    if folds < 2:
        why = "a class has one image (or patient), so none can be held out: nothing is chosen, the simplest candidate is taken"
        return ShotChoice(candidates[0].settings, reading, {"chosen": candidates[0].name, "why": why, "candidates": []})
    search = _Search(images, candidates, 60 * settings.choosing.budget_minutes, clock)
    rows = [
        pair
        for repeat in range(REPEATS)
        for pair in fold_rows(targets, images.task, groups, folds=folds, seed=settings.training.seed + repeat)
    ]
    begun = clock()
    watcher.note(
        f"choosing between {len(candidates)} candidates on {folds} folds, for at most {settings.choosing.budget_minutes:g} minutes"
    )
    watcher.start(len(rows) * len(candidates), 1)
    try:
        done = _walk(search, rows, reading, workshop, watcher)
    finally:
        watcher.stop()
    return _chosen(search, reading, groups, {"folds": folds, "trained_folds": done, "seconds": round(clock() - begun, 1)})


def _walk(
    search: _Search, rows: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], reading: Reading, workshop: Workshop, watcher: Watcher
) -> int:
    """Fold after fold, all candidates on each, as long as another one fits into the budget; the number of whole folds."""
    begun, longest = search.clock(), 0.0
    for done, (train, held) in enumerate(rows):
        started = search.clock()
        if done and started - begun + longest > search.budget:
            return done
        found = []
        for candidate in search.candidates:
            found.append(_asked(candidate, search, train, held, reading, workshop))
            watcher.step(-float(found[-1][1].mean()))
            spent = search.clock() - begun
            if not done and spent > search.budget and candidate is not search.candidates[-1]:
                raise _too_little(search, spent, len(found))
        for candidate, (scores, likelihood, seconds) in zip(search.candidates, found, strict=True):
            kept = search.held[candidate.name]
            kept.scores[held] += scores
            kept.likelihood[held] += likelihood
            kept.seconds += seconds
        search.counts[held] += 1
        longest = max(longest, search.clock() - started)
    return len(rows)


def _too_little(search: _Search, spent: float, tried: int) -> InputError:
    needed = spent / tried * len(search.candidates) / 60
    came = f"{search.budget / 60:g} minutes, in which {tried} of {len(search.candidates)} candidates were trained on one fold"
    return InputError(
        "--budget-minutes",
        came,
        "time for one fold at least",
        f"give about {max(needed * FOLDS, 0.1):.2g} minutes, or --method linear-probe",
    )


def _asked(
    candidate: Candidate, search: _Search, train: NDArray[np.int64], held: NDArray[np.int64], reading: Reading, workshop: Workshop
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Train on one part and ask about the other: probabilities, log-likelihoods, seconds."""
    started = search.clock()
    part, rest = (search.images.subset([int(i) for i in rows]) for rows in (train, held))
    prepared = prepare(candidate.settings, part, None, workshop, reading=reading)
    fit(candidate.settings, prepared, None, workshop.accelerator, resume=False, watcher=Watcher())
    examples = image_examples(rest, preprocessing_of(prepared.backbone))
    logits = predict_logits(prepared.tuning.model, examples.inputs, len(rest), accelerator=workshop.accelerator)
    return probabilities(logits, rest.task).numpy().astype(np.float64), _likelihood(logits, rest), search.clock() - started


def _likelihood(logits: torch.Tensor, images: ImageSet) -> NDArray[np.float64]:
    """Log-likelihood of each image's labels; several labels count as their mean."""
    targets = torch.from_numpy(images.targets())
    if images.task == "single":
        found = -torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    else:
        found = -torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="none").mean(dim=1)
    return np.asarray(found.numpy())


def _chosen(search: _Search, reading: Reading, groups: Sequence[str | None] | None, facts: Mapping[str, Any]) -> ShotChoice:
    seen = search.counts > 0
    times = search.counts[seen]
    values = {name: kept.likelihood[seen] / times for name, kept in search.held.items()}
    best = max(values, key=lambda name: values[name].mean())
    names = None if groups is None else [groups[int(i)] for i in np.flatnonzero(seen)]
    chosen = next(each for each in search.candidates if _within_one_error(values[best] - values[each.name], names))
    part = search.images.subset([int(i) for i in np.flatnonzero(seen)])
    rows = [_row(search, each.name, part, seen, values[each.name], chosen=each.name == chosen.name) for each in search.candidates]
    why = "the highest log-likelihood of images held out" if chosen.name == best else f"the simplest within one standard error of {best}"
    return ShotChoice(chosen.settings, reading, {"chosen": chosen.name, "why": why, **facts, "candidates": rows})


def _within_one_error(difference: NDArray[np.float64], groups: Sequence[str | None] | None) -> bool:
    """Whether a mean difference is at most its standard error; images of one patient count as one."""
    if groups is not None:
        keys = [f"image {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]
        index = np.unique(keys, return_inverse=True)[1]
        difference = np.bincount(index, difference) / np.bincount(index)
    if len(difference) < 2:
        return bool(difference.mean() <= 0)
    return bool(difference.mean() <= difference.std(ddof=1) / np.sqrt(len(difference)) + 1e-12)


def _row(
    search: _Search, name: str, part: ImageSet, seen: NDArray[np.bool_], values: NDArray[np.float64], *, chosen: bool
) -> dict[str, Any]:
    kept, measure = search.held[name], score_name(part)
    scores = kept.scores[seen] / search.counts[seen][:, None]
    report = classification_report(part.targets(), scores, classes=part.classes, task=part.task, groups=part.groups, bootstrap=500)
    estimate = report["metrics"][measure]
    return {
        "candidate": name,
        "chosen": chosen,
        measure: estimate,
        "log_likelihood": float(values.mean()),
        "seconds": round(kept.seconds, 1),
    }
