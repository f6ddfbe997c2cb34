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
from medlore.errors import DataError
from medlore.files import made_folder
from medlore.metrics.classification import classification_report
from medlore.runs.report import Run
from medlore.training.accelerator import make_accelerator
from medlore.tuning.examples import image_examples
from medlore.tuning.predictions import write_predictions
from medlore.tuning.scoring_settings import EvaluateSettings
from medlore.tuning.training import predict_logits, probabilities
from medlore.tuning.tuned import Tuned, load_tuned


@dataclass(frozen=True)
class Evaluation:
    """A report (see `classification_report`) and the scores that it was made from."""

    report: dict[str, Any]
    scores: NDArray[np.float32]  # b c
    images: ImageSet


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
        run.results["test"] = result.report
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
    report = classification_report(
        targets, scores, classes=images.classes, task=images.task, seed=settings.seed, bootstrap=settings.bootstrap, groups=images.groups
    )
    return Evaluation(report, scores, images)
