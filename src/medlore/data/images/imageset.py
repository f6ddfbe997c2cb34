"""A 2D image set: names, labels, groups and places of its images.

An `ImageSet` holds no decoded pixels unless it came from arrays. Pixels are read by `medlore.data.images.pixels.load_pixels`,
batches are made by `medlore.data.images.transforms`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.missing_labels import ADVICE, MISSING, MissingLabels, missing_entries, settled
from medlore.data.images.trees import ArchiveMember
from medlore.errors import DataError

Task = Literal["single", "multi"]


@dataclass(frozen=True, eq=False)
class ImageItem:
    """One image and its labels.

    Args:
        key: the name of the image in its set, unique there; for files the relative path with forward slashes.
        source: a file, a member of a zip archive, or an array (h, w) or (h, w, c). An array that is not uint8 is
            windowed when it is read, like a 16-bit file.
        labels: multi-label: one 0, 1 or `MISSING` (not known) per class. Single-label: the class index alone. Unlabelled: empty.
        group: the patient, study or slide that the image belongs to; None where it is not known.
    """

    key: str
    source: Path | ArchiveMember | NDArray[Any]
    labels: tuple[int, ...]
    group: str | None = None

    def __repr__(self) -> str:
        place = f"array {self.source.shape} {self.source.dtype}" if isinstance(self.source, np.ndarray) else str(self.source)
        return f"ImageItem({self.key!r}, {place}, labels={self.labels}, group={self.group!r})"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with one list of classes.

    Args:
        name: a short name, for tables and file names.
        classes: class names; their order is the order of the scores.
        task: `single` (one class per image) or `multi` (any number of classes per image).
        items: the images.
        source: where the set came from: a path, or `arrays`.
        notes: what was passed over when it was read, such as lines that were there twice.

    Examples:
        >>> images = np.zeros((2, 8, 8), np.uint8)
        >>> digits = from_arrays(images, [0, 1], classes=("zero", "one"), name="two")
        >>> len(digits), digits.targets().tolist()
        (2, [0, 1])
    """

    name: str
    classes: tuple[str, ...]
    task: Task
    items: tuple[ImageItem, ...]
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the images."""
        return tuple(item.key for item in self.items)

    @property
    def groups(self) -> tuple[str | None, ...]:
        """The patient or study of each image."""
        return tuple(item.group for item in self.items)

    @property
    def labelled(self) -> bool:
        """Whether every image has labels (false for an empty set)."""
        return bool(self.items) and all(item.labels for item in self.items)

    def targets(self) -> NDArray[Any]:
        """Labels as an array: (b,) int64 class indices, or (b, c) float32 of 1 (present), 0 (absent) and NaN (not known).

        Raises:
            DataError: some images have no labels.
        """
        bare = [item.key for item in self.items if not item.labels]
        if bare:
            raise DataError(
                self.source, f"{len(bare)} of {len(self)} images have no labels", "a labelled set", "name a list with labels", faults=bare
            )
        if self.task == "single":
            return np.array([item.labels[0] for item in self.items], dtype=np.int64)
        rows = np.array([item.labels for item in self.items], dtype=np.float32).reshape(len(self), len(self.classes))
        return np.where(rows == MISSING, np.float32(np.nan), rows)

    def present(self, item: ImageItem) -> list[int]:
        """The classes that an image of this set is known to have."""
        return list(item.labels) if self.task == "single" else [c for c, label in enumerate(item.labels) if label == 1]

    @property
    def missing_labels(self) -> int:
        """How many labels of a multi-label set are not known."""
        return sum(item.labels.count(MISSING) for item in self.items) if self.task == "multi" else 0

    def subset(self, indices: Iterable[int], *, name: str | None = None) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, items=tuple(self.items[int(i)] for i in indices), name=name or self.name)

    def counts(self) -> dict[str, int]:
        """Images per class, over the labelled ones."""
        counted = np.zeros(len(self.classes), dtype=np.int64)
        for item in self.items:
            counted[self.present(item)] += 1
        return dict(zip(self.classes, counted.tolist(), strict=True))


def from_arrays(
    images: NDArray[Any] | Sequence[NDArray[Any]],
    labels: Any,
    *,
    classes: Sequence[str],
    name: str,
    groups: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    source: str = "arrays",
    missing_labels: MissingLabels = "fault",
) -> ImageSet:
    """An image set from arrays in memory.

    Args:
        images: (b, h, w) or (b, h, w, c), or a sequence of (h, w) or (h, w, c) arrays; c is 1, 3 or 4.
        labels: (b,) or (b, 1) class indices, (b, c) zeros and ones with NaN or -1 where a label is missing, or None for an unlabelled set.
        classes: class names, in label order.
        name: a short name.
        groups: patient or study of each image.
        keys: names of the images; `0`, `1`, ... when absent.
        source: where the arrays came from, for messages.
        missing_labels: what becomes of missing labels: a fault, "absent" (`negative`), or "not known" (`ignore`).

    Raises:
        DataError: lengths, shapes or labels do not fit; every fault is named.
    """
    arrays = [np.asarray(image) for image in images]
    count = len(arrays)
    rows = _label_rows(labels, count=count, classes=classes, source=source, missing=missing_labels)
    names = [str(i) for i in range(count)] if keys is None else [str(key) for key in keys]
    belongs = [None] * count if groups is None else [str(group) for group in groups]
    faults = [f"image {names[i]}: shape {a.shape}" for i, a in enumerate(arrays) if not _is_image_shape(a.shape)]
    if len(names) != count or len(belongs) != count:
        faults.append(f"{count} images, {len(names)} keys, {len(belongs)} groups")
    if faults:
        raise DataError(
            source, f"{len(faults)} faults in the arrays", "(h, w) or (h, w, c) images, c 1, 3 or 4", "correct them", faults=faults
        )
    task: Task = "multi" if _is_multi(labels, classes) else "single"
    items = tuple(ImageItem(k, a, r, g) for k, a, r, g in zip(names, arrays, rows, belongs, strict=True))
    return ImageSet(name, tuple(str(c) for c in classes), task, items, source)


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    if min(shape, default=0) < 1:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))


def _is_multi(labels: Any, classes: Sequence[str]) -> bool:
    if labels is None:
        return False
    array = np.asarray(labels)
    return array.ndim == 2 and array.shape[1] == len(classes)


def _label_rows(labels: Any, *, count: int, classes: Sequence[str], source: str, missing: MissingLabels) -> list[tuple[int, ...]]:
    if labels is None:
        return [()] * count
    array = np.asarray(labels)
    if array.dtype.kind not in "biuf":
        raise DataError(source, f"labels of type {array.dtype}", "numbers", "number the classes and give their names as `classes`")
    accepted = f"({count},) class indices below {len(classes)}, or ({count}, {len(classes)}) zeros and ones"
    multi = _is_multi(labels, classes)
    flat = array if multi else array.reshape(len(array), -1) if array.size else array.reshape(count, 0)
    if len(array) != count or (not multi and flat.shape[1] != 1):
        raise DataError(source, f"labels of shape {array.shape} for {count} images", accepted, "give one label row per image")
    gaps = missing_entries(flat) if multi else np.zeros(flat.shape, dtype=bool)
    top = 1 if multi else len(classes) - 1
    wrong = np.flatnonzero((~gaps & ~((flat >= 0) & (flat <= top) & (flat == np.round(flat)))).any(axis=1))
    if len(wrong):
        faults = [f"image {i}: label {array[i].tolist()}" for i in wrong.tolist()]
        raise DataError(
            source, f"{len(wrong)} images with labels out of range", accepted, "correct the labels or the class list", faults=faults
        )
    if gaps.any() and missing == "fault":
        faults = [f"image {i}: no label for {', '.join(str(classes[c]) for c in np.flatnonzero(gaps[i]).tolist())}" for i in _rows_of(gaps)]
        raise DataError(source, f"{int(gaps.sum())} labels are missing (-1 or NaN)", accepted, ADVICE, faults=faults)
    return [tuple(int(v) for v in row) for row in np.where(gaps, settled(missing), flat)]


def _rows_of(gaps: NDArray[np.bool_]) -> list[int]:
    return [int(i) for i in np.flatnonzero(gaps.any(axis=1))]
