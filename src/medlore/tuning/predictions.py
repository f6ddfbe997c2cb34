"""The table of predictions: one row an image, its label where known, the answer, and one score a class."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.files import write_text

THRESHOLD = 0.5  # from which score on a label counts as given, in multi-label sets


def write_predictions(path: str | Path, images: ImageSet, scores: NDArray[np.float32]) -> Path:
    """Write `image, label, predicted, CLASS_1, ..., CLASS_C` as CSV; several labels are joined by `|`.

    Args:
        path: the file.
        images: b images; the column `label` is empty for unlabelled ones.
        scores: (b, c) from 0 to 1.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "predicted", *images.classes])
    for item, row in zip(images.items, scores, strict=True):
        writer.writerow([item.key, labels_text(images, item.labels), answer_text(images, row), *(f"{s:.8f}" for s in row)])
    return write_text(path, text.getvalue())


def labels_text(images: ImageSet, labels: tuple[int, ...]) -> str:
    """Class names of the labels of one image."""
    if images.task == "single":
        return images.classes[labels[0]] if labels else ""
    return "|".join(name for name, present in zip(images.classes, labels, strict=False) if present)


def answer_text(images: ImageSet, scores: NDArray[Any]) -> str:
    """The best class, or every label from the threshold on."""
    if images.task == "single":
        return images.classes[int(scores.argmax())]
    return "|".join(name for name, score in zip(images.classes, scores, strict=True) if score >= THRESHOLD)
