"""MedMNIST-style `.npz` files: arrays of images and labels, read without pickle."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet, Task, from_arrays
from medlore.data.images.missing_labels import ADVICE, MissingLabels, missing_entries
from medlore.errors import DataError, UnknownNameError
from medlore.files import existing_file

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
NIH_FILE = re.compile(r"^(\d{8})_\d{3}\.png$")  # ChestX-ray14: patient, follow-up


def read_npz(
    path: str | Path,
    *,
    split: str | None = None,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    missing_labels: MissingLabels = "fault",
) -> ImageSet:
    """Read `{train,val,test}_images` and `_labels` (MedMNIST), or `images` and `labels`.

    Optional arrays: `classes` (names), `ids` (keys), `groups` or `patients` (patient per image), each also with the
    prefix of a split. Keys of the form of ChestX-ray14 (`00000231_013.png`) give the patient by themselves.

    Labels (b,) or (b, 1) are class indices; (b, c) with c > 1 are zeros and ones, one column a class. A one-hot table
    is distinguished by `task="single"`.

    Args:
        path: the file.
        split: `train`, `val` or `test`; None reads all of them, keys then start with the split.
        task: how to read a (b, c) label array; multi-label by default.
        classes: class names; default those in the file, else the label numbers.
        missing_labels: what becomes of a label of a (b, c) array that is NaN or -1.

    Raises:
        DataError: not an npz file, arrays missing or not fitting, or object arrays (pickle is never read).
    """
    path = existing_file(path)
    arrays = _load(path)
    parts = [part for part in ("", *(f"{s}_" for s in SPLITS)) if f"{part}images" in arrays]
    if not parts:
        raise DataError(str(path), f"arrays {sorted(arrays)}", "`images` and `labels`, or `train_images` and so on", "rename the arrays")
    if split is not None:
        parts = [_part_of(split, parts, path)]
    _check_label_numbers(arrays, path)
    names = _class_names(arrays, parts, classes, task)
    sets = [_read_part(arrays, part, path, names, task, prefix=len(parts) > 1, missing=missing_labels) for part in parts]
    items = tuple(item for part in sets for item in part.items)
    return ImageSet(path.stem, sets[0].classes, task or sets[0].task, items, str(path))


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle
        raise DataError(
            str(path),
            "not an npz file of plain arrays (no archive of arrays)",
            "a file of numpy.savez",
            "copy it again, or name its format",
        )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:  # np.load leaks a broken file's handle
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError, AttributeError, MemoryError) as error:
        message = str(error).split("\n")[0]
        reason = "it holds pickled objects, which are never loaded" if "pickle" in message else message  # NumPy advises to load them
        raise DataError(str(path), f"not an npz file of plain arrays ({reason})", "arrays of numbers or text", "save it again") from error


def _part_of(split: str, parts: list[str], path: Path) -> str:
    wanted = SPLIT_NAMES.get(split.lower(), split.lower()) + "_"
    if wanted not in parts:
        raise UnknownNameError(f"split of {path}", split, [part[:-1] for part in parts if part] or ["(none: leave it out)"])
    return wanted


def _check_label_numbers(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Labels are numbers, and class indices are numbers that are there."""
    faults = []
    for name in ("labels", *(f"{split}_labels" for split in SPLITS)):
        array = arrays.get(name)
        if array is None:
            continue
        if array.dtype.kind not in "biuf":
            faults.append(f"{name}: of type {array.dtype}")
        elif (array.ndim < 2 or array.shape[1] == 1) and not np.isfinite(array).all():
            faults += [f"{name}, row {i}: {array[i]}" for i in np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))]
    if faults:
        raise DataError(
            str(path), f"{len(faults)} faults in the labels", "numbers", "number the classes; `classes` names them", faults=faults
        )


def _class_names(arrays: Mapping[str, NDArray[Any]], parts: list[str], classes: Sequence[str] | None, task: Task | None) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    if "classes" in arrays:
        return tuple(str(name) for name in arrays["classes"])
    labels = [arrays[f"{part}labels"] for part in ("", *(f"{s}_" for s in SPLITS)) if f"{part}labels" in arrays]
    if not labels:
        return ()
    if labels[0].ndim == 2 and labels[0].shape[1] > 1:
        return tuple(str(i) for i in range(labels[0].shape[1]))
    # All parts are counted, also those not asked for: the class list must not depend on the split.
    return tuple(str(i) for i in range(int(max(array.max(initial=0) for array in labels)) + 1))


def _read_part(
    arrays: Mapping[str, NDArray[Any]],
    part: str,
    path: Path,
    classes: tuple[str, ...],
    task: Task | None,
    *,
    prefix: bool,
    missing: MissingLabels,
) -> ImageSet:
    images, labels = arrays[f"{part}images"], arrays.get(f"{part}labels")
    _check_finite(images, f"{path}:{part}images")
    ids = arrays.get(f"{part}ids")
    keys = [str(key) for key in (range(len(images)) if ids is None else ids)]
    groups = next((arrays[f"{part}{n}"] for n in ("groups", "patients") if f"{part}{n}" in arrays), None)
    known = [str(g) for g in groups] if groups is not None else _nih_patients(keys)
    if labels is not None and task == "single" and labels.ndim == 2 and labels.shape[1] > 1:
        labels = _from_one_hot(labels, path, part, missing)
    if prefix:
        keys = [f"{part[:-1]}/{key}" for key in keys]
    source = f"{path}:{part}images"
    return from_arrays(images, labels, classes=classes, name=path.stem, groups=known, keys=keys, source=source, missing_labels=missing)


def _check_finite(images: NDArray[Any], where: str) -> None:
    if images.dtype.kind != "f":
        return
    wrong = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
    if wrong:
        raise DataError(
            where,
            f"{len(wrong)} of {len(images)} images hold NaN or infinity",
            "finite numbers",
            "correct these images or leave them out",
            faults=[f"image {i}: {int((~np.isfinite(images[i])).sum())} values" for i in wrong],
        )


def _from_one_hot(labels: NDArray[Any], path: Path, part: str, missing: MissingLabels) -> NDArray[Any]:
    gaps = missing_entries(labels)
    marked = ~gaps & (labels != 0)
    wrong = np.flatnonzero(marked.sum(axis=1) != 1 if missing != "fault" else (marked.sum(axis=1) != 1) | gaps.any(axis=1))
    if len(wrong):
        raise DataError(
            f"{path}:{part}labels",
            f"{len(wrong)} rows that do not hold exactly one 1",
            "one-hot rows for task='single'",
            ADVICE if gaps.any() else "read it with task='multi'",
            faults=[f"row {i}: {labels[i].tolist()}" for i in wrong.tolist()],
        )
    index: NDArray[Any] = marked.argmax(axis=1)
    return index


def _nih_patients(keys: Sequence[str]) -> list[str] | None:
    matches = [NIH_FILE.match(key) for key in keys]
    found = [match.group(1) for match in matches if match]
    return found if keys and len(found) == len(keys) else None
