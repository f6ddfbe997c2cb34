"""The table of predictions: one row an image, its label where known, the answer, and one score per class."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.missing_labels import MISSING
from medlore.files import write_text

THRESHOLD = 0.5  # from which score on a label counts as given, in multi-label sets


def write_predictions(path: str | Path, images: ImageSet, scores: NDArray[np.float32]) -> Path:
    """Write `image, label, predicted, CLASS_1, ..., CLASS_C` as CSV; several labels are joined by `|`.

    A set with labels that are not known has a column `unknown` behind `label`, which names them.

    Args:
        path: the file.
        images: b images; the column `label` is empty for unlabelled ones.
        scores: (b, c) from 0 to 1.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    gaps = images.missing_labels > 0
    writer.writerow(["image", "label", *(["unknown"] if gaps else []), "predicted", *images.classes])
    for item, row in zip(images.items, scores, strict=True):
        cells = [labels_text(images, item), *([_unknown_text(images, item)] if gaps else [])]
        writer.writerow([item.key, *cells, answer_text(images, row), *(f"{s:.8f}" for s in row)])
    return write_text(path, text.getvalue())


def labels_text(images: ImageSet, item: ImageItem) -> str:
    """Names of the classes that one image is known to have."""
    return "|".join(images.classes[c] for c in images.present(item))


def _unknown_text(images: ImageSet, item: ImageItem) -> str:
    return "|".join(name for name, label in zip(images.classes, item.labels, strict=True) if label == MISSING)


def answer_text(images: ImageSet, scores: NDArray[Any]) -> str:
    """The best class, or every label from the threshold on."""
    if images.task == "single":
        return images.classes[int(scores.argmax())]
    return "|".join(name for name, score in zip(images.classes, scores, strict=True) if score >= THRESHOLD)
