"""List files: one image and its labels a line, as MedFMC, VTAB-1k and RadImageNet publish them.

A list is read whole, and every fault in it is reported with its line number. Lines are split from the right, so file
names may hold spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from medlore.data.images.imageset import Task
from medlore.errors import UnknownNameError

MedfmcName = Literal["chest", "colon", "endo"]

CHEST_CLASSES = (
    "pleural_effusion", "nodule", "pneumonia", "cardiomegaly", "hilar_enlargement", "fracture_old", "fibrosis",
    "aortic_calcification", "tortuous_aorta", "thickened_pleura", "TB", "pneumothorax", "emphysema", "atelectasis",
    "calcification", "pulmonary_edema", "increased_lung_markings", "elevated_diaphragm", "consolidation",
)  # fmt: skip
MEDFMC_CLASSES: dict[MedfmcName, tuple[str, ...]] = {
    "chest": CHEST_CLASSES,
    "colon": ("negative", "positive"),
    "endo": ("ulcer", "erosion", "polyp", "tumor"),
}
# task folder -> classes; the order is that of the published tables: 7 natural, 4 specialised, 8 structured
VTAB_CLASSES = {
    "caltech101": 102, "cifar": 100, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "sun397": 397, "svhn": 10,
    "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5,
    "clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16,
    "smallnorb_azi": 18, "smallnorb_ele": 9,
}  # fmt: skip
VTAB_GROUPS = {
    "natural": tuple(VTAB_CLASSES)[:7],
    "specialized": tuple(VTAB_CLASSES)[7:11],
    "structured": tuple(VTAB_CLASSES)[11:],
}
VTAB_TEST_SIZES = dict(zip(VTAB_CLASSES, (
    6084, 10000, 1880, 6149, 3669, 21750, 26032, 32768, 5400, 6300, 42670, 15000, 15000, 22735, 711, 73728, 73728, 12150, 12150,
), strict=True))  # fmt: skip
# published lines of each list of MedFMC
MEDFMC_SIZES: dict[str, dict[str, int]] = {
    "chest": {"trainval": 979, "test_WithLabel": 1161, "test_WithoutLabel": 2708, "train_20": 783, "val_20": 196},
    "colon": {"trainval": 2358, "test_WithLabel": 3296, "test_WithoutLabel": 4355, "train_20": 1677, "val_20": 681},
    "endo": {"trainval": 929, "test_WithLabel": 881, "test_WithoutLabel": 2055, "train_20": 743, "val_20": 186},
}
# The anatomies of RadImageNet as ranges of its 165 labels: the tasks of LoRKD.
RADIMAGENET_RANGES = (
    (0, 5), (6, 33), (34, 35), (36, 48), (49, 66), (67, 80), (81, 89), (90, 114), (115, 140), (141, 150), (151, 164),
)  # fmt: skip


@dataclass(frozen=True)
class ListFormat:
    """How the lines of a list are read.

    Args:
        name: the format's name in messages.
        line: an example of a right line.
        classes: class names.
        task: single- or multi-label.
        ending: a regular expression of the labels with the white space before them, at the end of a line.
        labels: the matched text to labels.
        group_of: file name to patient or study.
    """

    name: str
    line: str
    classes: tuple[str, ...]
    task: Task
    ending: re.Pattern[str]
    labels: Callable[[str], tuple[int, ...]]
    group_of: Callable[[str], str | None] = lambda _: None


def medfmc_format(dataset: MedfmcName) -> ListFormat:
    """The list format of one MedFMC data set.

    Raises:
        UnknownNameError: not `chest`, `colon` or `endo`.
    """
    if dataset not in MEDFMC_CLASSES:
        raise UnknownNameError("dataset", dataset, MEDFMC_CLASSES)
    classes = MEDFMC_CLASSES[dataset]
    if dataset == "chest":
        return ListFormat("medfmc-chest", "a.png 0,1,0,... (19 labels)", classes, "multi", re.compile(r"\s+([-\d.,]+)$"), _split(","))
    if dataset == "endo":
        ending = re.compile(r"((?:\s+-?\d+)+)$")
        return ListFormat(
            "medfmc-endo", "a.png 0 1 0 0", classes, "multi", ending, _split(None), lambda name: PurePosixPath(name).name[:18]
        )
    return ListFormat(
        "medfmc-colon", "a b.png 0", classes, "single", re.compile(r"\s+(-?\d+)$"), _one, lambda name: PurePosixPath(name).name[:-9] or None
    )


def index_format(name: str, classes: Sequence[str]) -> ListFormat:
    """`<path> <class index>`: VTAB-1k and RadImageNet."""
    return ListFormat(name, f"images/a.jpg 0 (0 to {len(classes) - 1})", tuple(classes), "single", re.compile(r"\s+(-?\d+)$"), _one)


@dataclass(frozen=True)
class ListLine:
    """One line of a list: its number from 1, the file as written, the labels (none in an unlabelled list)."""

    number: int
    file: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ParsedList:
    """What a list says.

    Args:
        lines: one entry an image, in the order of the list.
        faults: lines that cannot be used.
        doubles: images that are named again with the same labels; the first line counts.
    """

    lines: tuple[ListLine, ...]
    faults: tuple[str, ...]
    doubles: tuple[str, ...]


def parse_list(text: str, form: ListFormat, *, labelled: bool = True) -> ParsedList:
    r"""Read the text of a list; nothing is raised, so that the caller can add faults of its own.

    Example:
        >>> parsed = parse_list("a b.png 1\nc.png 7\n", medfmc_format("colon"))
        >>> parsed.lines[0].file, parsed.faults
        ('a b.png', ('line 2: class 7, but there are 2 (0 to 1)',))
    """
    found: dict[str, ListLine] = {}
    faults, doubles = [], []
    for number, raw in enumerate(text.split("\n"), start=1):
        if not (line := raw.strip()):
            continue
        try:
            file, labels = _parsed(line, form) if labelled else (line, ())
            if ".." in PurePosixPath(file).parts:
                raise ValueError(f"{file!r} leaves the image folder")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        first = found.setdefault(file, ListLine(number, file, labels))
        if first.number != number and first.labels == labels:
            doubles.append(f"line {number}: {file} stands already on line {first.number}")
        elif first.number != number:
            faults.append(f"line {number}: {file} has other labels on line {first.number}")
    return ParsedList(tuple(found.values()), tuple(faults), tuple(doubles))


def _parsed(line: str, form: ListFormat) -> tuple[str, tuple[int, ...]]:
    match = form.ending.search(line)
    if match is None or not line[: match.start()].strip():
        raise ValueError(f"no labels at the end: {_short(line)}")
    try:
        labels = form.labels(match.group(1))
    except ValueError:
        raise ValueError(f"labels that are not whole numbers: {_short(match.group(1).strip())}") from None
    if form.task == "single":
        if not 0 <= labels[0] < len(form.classes):
            raise ValueError(f"class {labels[0]}, but there are {len(form.classes)} (0 to {len(form.classes) - 1})")
    elif len(labels) != len(form.classes):
        raise ValueError(f"{len(labels)} labels instead of {len(form.classes)}")
    elif not set(labels) <= {0, 1}:
        raise ValueError(f"labels other than 0 and 1: {_short(match.group(1).strip())}")
    return line[: match.start()].strip(), labels


def _split(separator: str | None) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(int(part) for part in text.split(separator))


def _one(text: str) -> tuple[int, ...]:
    return (int(text),)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-57:]}")
