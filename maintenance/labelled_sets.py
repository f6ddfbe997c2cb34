"""Labelled image sets as the maintainers' programs read them: square colour images in memory, with labels and groups.

Every set is a zip with a `labels.csv`, or an `.npz`; `SETS` says for each which column holds the label and which the person,
lesion or patient that must not be on both sides of a split.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Keep = Callable[[dict[str, str]], bool]

CHEST_CLASS = "CXR"  # of MedNIST: its images come from NIH ChestX-ray14, which is reported on


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images of one set.

    Attributes:
        name: of the set.
        classes: class names, in label order.
        images: n h w 3, uint8.
        labels: n for one class an image (int64), n k for several (0 or 1).
        groups: n, what belongs together; the image's own name where nothing is known.
    """

    name: str
    classes: tuple[str, ...]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: tuple[str, ...]

    @property
    def multi(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class _Archive:
    """A zip of images with `labels.csv`.

    Attributes:
        file: its name in the data folder.
        label: column of the class; several columns with counts make a set of several labels.
        group: column of the person or lesion; empty where there is none.
        keep: which rows are used.
    """

    file: str
    label: tuple[str, ...] = ("label",)
    group: str = ""
    keep: Keep | None = None

    def read(self, name: str, folder: Path, size: int) -> LabelledSet:
        with zipfile.ZipFile(folder / self.file) as archive:
            rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode("utf-8"))))
            rows = [row for row in rows if self.keep is None or self.keep(row)]
            images = np.stack([square(Image.open(io.BytesIO(archive.read(row["file"]))), size) for row in rows])
        groups = tuple(row[self.group] if self.group else row["file"] for row in rows)
        if len(self.label) > 1:
            present = np.array([[int(float(row[column]) > 0) for column in self.label] for row in rows], dtype=np.int64)
            return LabelledSet(name, self.label, images, present, groups)
        names = sorted({row[self.label[0]] for row in rows})
        labels = np.array([names.index(row[self.label[0]]) for row in rows], dtype=np.int64)
        return LabelledSet(name, tuple(names), images, labels, groups)


@dataclass(frozen=True)
class _ChestArrays:
    """The NIH chest X-rays: an `.npz` whose ids begin with the patient."""

    file: str

    def read(self, name: str, folder: Path, size: int) -> LabelledSet:
        with np.load(folder / self.file, allow_pickle=False) as arrays:
            images = np.stack([square(Image.fromarray(image), size) for image in arrays["images"]])
            classes, labels = tuple(str(c) for c in arrays["classes"]), arrays["labels"].astype(np.int64)
            groups = tuple(str(key).split("_")[0] for key in arrays["ids"])
        return LabelledSet(name, classes, images, labels, groups)


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """An image as `size` x `size` x 3, whatever its shape and mode."""
    colour = image.convert("RGB")
    if colour.size != (size, size):
        colour = colour.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(colour, dtype=np.uint8)


def is_development_class(wnid: str) -> bool:
    """Whether a class of Tiny-ImageNet is kept for choosing between students: every twelfth by the number in its name."""
    return int(wnid.removeprefix("n")) % 12 == 0


REPORTING: dict[str, _Archive | _ChestArrays] = {
    "flowers": _Archive("flowers5.zip"),
    "textures": _Archive("dtd10.zip"),
    "brain MR": _Archive("brain_tumor_4c.zip"),
    "skin": _Archive("ham10000_half.zip", group="lesion"),
    "chest": _Archive("chest_xray_half.zip", group="person"),
    "NIH chest": _ChestArrays("nih_cxr14_64.npz"),
}
DEVELOPMENT: dict[str, _Archive | _ChestArrays] = {
    "natural": _Archive("tiny_imagenet_180.zip", ("wnid",), keep=lambda row: is_development_class(row["wnid"])),
    "MedNIST": _Archive("mednist.zip", keep=lambda row: row["label"] != CHEST_CLASS and is_held_out(row["file"])),
    "blood": _Archive("bccd.zip", ("WBC", "RBC", "Platelets")),
}
SETS = REPORTING | DEVELOPMENT


def is_held_out(file: str) -> bool:
    """Whether an image of MedNIST is kept for development: a tenth, by the number in its name."""
    return int(Path(file).stem) % 10 == 9


def read_set(name: str, folder: Path, size: int) -> LabelledSet:
    """A set of `SETS`, its images resized to `size` x `size`."""
    return SETS[name].read(name, folder, size)
