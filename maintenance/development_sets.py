"""Few-shot tasks on which defaults are chosen, and on which nothing is reported.

digits        handwritten digits of scikit-learn, ten classes
MedNIST       five kinds of images; not its chest X-rays, whose source is reported on
natural       the classes of Tiny-ImageNet that are kept for development
hippocampus   coronal slices of MR: anterior part, posterior part, neither; by person
heart levels  cine MR at end-diastole: basal, middle or apical third of the left ventricle; by person
digit pairs   two digits side by side: several labels an image

Not among them: the modified PneumoniaMNIST, whose images come from the study that made the chest X-rays that are reported on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maintenance.labelled_sets import read_set, square
from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.splits import hold_out

SIDE = 64
_PEOPLE = 60  # of the hippocampus, in the order of their numbers


def development_task(name: str, folder: Path, *, most: int = 300) -> tuple[ImageSet, ImageSet]:
    """The images that shots are drawn from, and at most about `most` that judge; whole persons on one side."""
    pool = _TASKS[name](folder)
    pool, test = hold_out(pool, 0.5, seed=0)
    kept = np.sort(np.random.default_rng(0).permutation(len(test))[:most])
    return pool, test.subset([int(i) for i in kept])


def _digits(_folder: Path) -> ImageSet:
    images, labels = _digit_arrays()
    return from_arrays(
        [square(Image.fromarray(image), SIDE) for image in images], labels, classes=[str(i) for i in range(10)], name="digits"
    )


def _digit_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


def _digit_pairs(_folder: Path) -> ImageSet:
    """Each digit is used once; a label is there when one of the two digits is it."""
    images, labels = _digit_arrays()
    order = np.random.default_rng(0).permutation(len(images))[: len(images) // 2 * 2].reshape(-1, 2)
    pairs = [np.concatenate([images[a], images[b]], axis=1) for a, b in order]
    present = np.zeros((len(pairs), 10), np.int64)
    for row, (a, b) in enumerate(order):
        present[row, [labels[a], labels[b]]] = 1
    return from_arrays([square(Image.fromarray(p), SIDE) for p in pairs], present, classes=[str(i) for i in range(10)], name="digit pairs")


def _labelled(name: str) -> Callable[[Path], ImageSet]:
    def read(folder: Path) -> ImageSet:
        found = read_set(name, folder, SIDE)
        return from_arrays(list(found.images), found.labels, classes=list(found.classes), name=name, groups=list(found.groups))

    return read


def _hippocampus(folder: Path) -> ImageSet:
    images, labels, people = [], [], []
    for file in sorted((folder / "hippocampus" / "images").glob("*.nii.gz"))[:_PEOPLE]:
        volume, mask = _volume(file), _volume(folder / "hippocampus" / "labels" / file.name)
        for label, present in enumerate((mask == 1, mask == 2)):
            images.append(_slice(volume, int(present.sum(axis=(0, 2)).argmax())))
            labels.append(label)
            people.append(file.name)
        images.append(_slice(volume, int((mask > 0).sum(axis=(0, 2)).argmin())))
        labels.append(2)
        people.append(file.name)
    return from_arrays(images, np.array(labels), classes=["anterior", "posterior", "neither"], name="hippocampus", groups=people)


def _hearts(folder: Path) -> ImageSet:
    images, labels, people = [], [], []
    for file in sorted((folder / "acdc").glob("*_ed.nii.gz")):
        volume, mask = _volume(file), _volume(file.with_name(file.name.replace("_ed.", "_ed_labels.")))
        levels = np.flatnonzero((mask > 0).any(axis=(0, 1)))
        for place, level in enumerate(levels):
            images.append(square(Image.fromarray(_grey(volume[:, :, level].T)), SIDE))
            labels.append(min(2, 3 * place // len(levels)))
            people.append(file.name)
    return from_arrays(images, np.array(labels), classes=["first third", "middle third", "last third"], name="heart levels", groups=people)


def _volume(file: Path) -> NDArray[Any]:
    import nibabel

    return np.asarray(nibabel.load(str(file)).dataobj)  # type: ignore[attr-defined]


def _slice(volume: NDArray[Any], place: int) -> NDArray[np.uint8]:
    return square(Image.fromarray(_grey(volume[:, place, :].T[::-1])), SIDE)


def _grey(plane: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = np.percentile(plane, (1, 99))
    return (255 * np.clip((plane - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


_TASKS: dict[str, Callable[[Path], ImageSet]] = {
    "digits": _digits,
    "MedNIST": _labelled("MedNIST"),
    "natural": _labelled("natural"),
    "hippocampus": _hippocampus,
    "heart levels": _hearts,
    "digit pairs": _digit_pairs,
}
TASKS = tuple(_TASKS)
