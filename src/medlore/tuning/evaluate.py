"""Measuring a tuned model on a labelled set: one pass, the whole report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.data.images.reading import read_images
from medlore.data.images.splits import part_of
from medlore.errors import DataError, InputError
from medlore.files import made_folder
from medlore.metrics.classification import classification_report
from medlore.runs.report import Run
from medlore.training.accelerator import make_accelerator
from medlore.tuning.examples import image_examples
from medlore.tuning.predictions import write_predictions
from medlore.tuning.reference import REFERENCE_FILE, compared, stored_scores
from medlore.tuning.scoring_settings import EvaluateSettings
from medlore.tuning.trained_on import seen_in_training
from medlore.tuning.training import predict_logits, probabilities
from medlore.tuning.tuned import Tuned, frozen_backbone, load_tuned
from medlore.tuning.verdict import verdict_of


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        report: see `classification_report`.
        scores: (b, c) that it was made from.
        images: what was looked at.
        probe: the logistic regression on the frozen features with the same labels, on these images; None for a model without one.
        seen: how many of the images the model was trained on; None where it does not say.
        verdict: in a sentence.
    """

    report: dict[str, Any]
    scores: NDArray[np.float32]
    images: ImageSet
    probe: dict[str, Any] | None = None
    seen: int | None = None
    verdict: str = ""


def evaluate(settings: EvaluateSettings, out: str | Path | None = None) -> Evaluation:
    """Measure a tuned model on a labelled set.

    Args:
        settings: model, images, device.
        out: folder for `report.json` and `predictions.csv`; None writes nothing.

    Raises:
        InputError: nothing tuned, or no data, where they were said to be.
        CheckpointError: the backbone is not the one that was tuned.
        DataError: other classes than the model's, or images that cannot be read.
    """
    tuned = load_tuned(settings.tuned, model=settings.model)
    images = _images(settings, tuned)
    if images.classes != tuned.card.classes or images.task != tuned.card.task:
        raise DataError(
            str(settings.data),
            f"{images.task}-label classes {', '.join(images.classes)}",
            f"{tuned.card.task}-label classes of the model: {', '.join(tuned.card.classes)}",
            "name the data set that it was tuned for",
        )
    accelerator = make_accelerator(settings.device, settings.precision, None)
    if out is None:
        return _measure(tuned, images, settings, accelerator)
    made_folder(out)
    with Run("evaluate", out, settings=settings, seed=settings.seed, device=str(accelerator.device)) as run:
        run.add_input(tuned.folder)
        result = _measure(tuned, images, settings, accelerator)
        run.results |= {"test": result.report, "verdict": result.verdict, "trained_on_images": result.seen}
        run.results |= {} if result.probe is None else {"probe": result.probe}
        run.add_output("predictions", write_predictions(Path(out) / "predictions.csv", images, result.scores))
    return result


def _images(settings: EvaluateSettings, tuned: Tuned) -> ImageSet:
    """The part that was asked for; else the set's own test part; else, for a set without parts, all of it."""
    how: dict[str, Any] = {
        "format": settings.format,
        "images": settings.images,
        "task": settings.task or tuned.card.task,
        "classes": tuned.card.classes,
        "group_pattern": settings.group_pattern,
        "missing_labels": settings.missing_labels,
    }
    if settings.split is not None:
        return read_images(settings.data, split=settings.split, **how)
    own_test = part_of(settings.data, "test", how)
    return read_images(settings.data, **how) if own_test is None else own_test


def score_images(tuned: Tuned, images: ImageSet, *, accelerator: Any) -> NDArray[np.float32]:
    """Probabilities (b, c) of all images in their order."""
    examples = image_examples(images, tuned.preprocessing)
    logits = predict_logits(tuned.model.to(accelerator.device), examples.inputs, len(examples), accelerator=accelerator)
    scores: NDArray[np.float32] = probabilities(logits, tuned.card.task).numpy()
    return scores


def _measure(tuned: Tuned, images: ImageSet, settings: EvaluateSettings, accelerator: Any) -> Evaluation:
    targets = images.targets()
    scores = score_images(tuned, images, accelerator=accelerator)
    resamples: dict[str, Any] = {"seed": settings.seed, "bootstrap": settings.bootstrap}
    report = classification_report(targets, scores, classes=images.classes, task=images.task, groups=images.groups, **resamples)
    reference, probe = _reference_scores(tuned, images, settings, accelerator), None
    if reference is not None:
        probe = compared(images, scores, reference, **resamples)
    seen = seen_in_training(tuned.folder, images, tuned.preprocessing)
    sentences = [verdict_of(report, probe, is_reference=tuned.card.is_probe)]
    if seen:
        sentences.append(f"{seen} of these {len(images)} images trained the model: only the others can say how good it is.")
    return Evaluation(report, scores, images, probe, seen, " ".join(sentences))


def _reference_scores(tuned: Tuned, images: ImageSet, settings: EvaluateSettings, accelerator: Any) -> NDArray[np.float32] | None:
    """Of the regression that was saved with the model, unless its backbone is no longer where it was."""
    if not (tuned.folder / REFERENCE_FILE).is_file():
        return None
    try:
        frozen = frozen_backbone(tuned.card, settings.model)
    except InputError:  # a network that was written whole needs no backbone, and it may have been moved since
        return None
    return stored_scores(tuned.folder, frozen, images, accelerator)
