"""The data of a decomposition: every task read, split by patient, and decoded once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medlore.data.images.reading import ImageSet, read_images
from medlore.data.images.transforms import Preprocessing, TrainAugmentation, decode
from medlore.decomposing.classifiers.settings import DecomposeSettings, TaskSettings
from medlore.errors import DataError, MedloreError, UnknownNameError
from medlore.losses import TaskKind


@dataclass(frozen=True)
class LabelledImages:
    """Decoded images with their labels.

    Attributes:
        images: (n, 3, s, s) uint8.
        targets: (n,) int64 for single-label tasks, (n, c) float32 for multi-label ones, NaN where a label is not known.
        keys: names of the images.
    """

    images: Tensor
    targets: Tensor
    keys: tuple[str, ...]
    groups: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class TaskData:
    """One task with its three parts."""

    name: str
    classes: tuple[str, ...]
    kind: TaskKind
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    augment: TrainAugmentation
    settings: TaskSettings


def read_tasks(settings: DecomposeSettings, preprocessing: Preprocessing, *, folder: Path) -> dict[str, TaskData]:
    """Read all tasks; paths are relative to `folder`.

    Raises:
        DataError: tasks whose data cannot be used; all of them at once.
    """
    tasks, faults = {}, []
    for number, task in enumerate(settings.tasks):
        try:
            tasks[task.name] = _read_task(task, preprocessing, folder=folder, seed=settings.seed + 101 * number, crop=settings.crop)
        except MedloreError as error:
            faults.append(f"{task.name}: {error}")
    if faults:
        raise DataError(
            "tasks",
            f"{len(faults)} of {len(settings.tasks)} cannot be read",
            "data as docs/data.md describes",
            "see the list",
            faults=faults,
        )
    return tasks


def _read_task(task: TaskSettings, preprocessing: Preprocessing, *, folder: Path, seed: int, crop: float) -> TaskData:
    train, validation, test = _parts(task, folder=folder, seed=seed)
    parts = _at_most(train, task.limit, seed), _at_most(validation, task.validation_limit, seed), test
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if len(part) == 0:
            raise DataError(str(task.data), f"no {name} images", "at least one in each part", "check the names of the parts or the classes")
    augment = TrainAugmentation(preprocessing, seed=seed, crop=(crop, 1.0), flip=task.flip)
    decoded = [_decoded(part, preprocessing) for part in parts]
    return TaskData(task.name, train.classes, train.task, decoded[0], decoded[1], decoded[2], augment, task)


def fingerprint(task: TaskData) -> str:
    """What distinguishes one task's data from another's: classes, and pixels and labels of the parts that are trained and selected on."""
    digest = hashlib.sha256(repr((task.classes, task.kind)).encode())
    for part in (task.train, task.validation):
        for tensor in (part.images, part.targets):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _at_most(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(seed).permutation(len(images))[:limit]))


def _parts(task: TaskSettings, *, folder: Path, seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
    def read(split: str | None) -> ImageSet:
        images = None if task.images is None else folder / task.images
        how = {"split": split, "images": images, "missing_labels": task.missing_labels}
        found = read_images(folder / task.data, format=task.format, **how)  # type: ignore[arg-type]
        return found if task.classes is None else only_classes(found, task.classes)

    if task.train is None:
        test, rest = split_by_group(read(None), share=task.held_out, seed=seed)
        validation, train = split_by_group(rest, share=task.held_out / (1 - task.held_out), seed=seed + 1)
        return train, validation, test
    train = read(task.train)
    if task.test is None:
        test, train = split_by_group(train, share=task.held_out, seed=seed)
    else:
        test = read(task.test)
    if task.validation is None:
        validation, train = split_by_group(train, share=task.held_out, seed=seed + 1)
    else:
        validation = read(task.validation)
    return train, validation, test


def split_by_group(images: ImageSet, *, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """A seeded split in which no patient stands on both sides: (about `share` of the images, the rest).

    Images without a group are groups of their own.
    """
    names = [f"\0{i}" if group is None else group for i, group in enumerate(images.groups)]
    sizes = Counter(names)
    wanted, taken, chosen = share * len(images), 0, set()
    for name in np.random.default_rng(seed).permutation(sorted(sizes)).tolist():
        if taken >= wanted:
            break
        chosen.add(name)
        taken += sizes[name]
    inside = [i for i, name in enumerate(names) if name in chosen]
    outside = [i for i, name in enumerate(names) if name not in chosen]
    return images.subset(inside), images.subset(outside)


def only_classes(images: ImageSet, classes: Sequence[str]) -> ImageSet:
    """The images of some classes of a single-label set, renumbered in the given order.

    Raises:
        UnknownNameError: a class that the set does not have.
        DataError: the set is multi-label.
    """
    if images.task != "single":
        raise DataError(images.source, "a multi-label set", "a single-label set, when classes are chosen", "leave `classes` out")
    for name in classes:
        if name not in images.classes:
            raise UnknownNameError(f"{images.source}, classes", name, images.classes)
    numbers = {images.classes.index(name): new for new, name in enumerate(classes)}
    items = tuple(replace(item, labels=(numbers[item.labels[0]],)) for item in images.items if item.labels and item.labels[0] in numbers)
    return replace(images, classes=tuple(classes), items=items)


def _decoded(part: ImageSet, preprocessing: Preprocessing) -> LabelledImages:
    return LabelledImages(decode(part.items, preprocessing), torch.from_numpy(part.targets()), part.keys, part.groups)
