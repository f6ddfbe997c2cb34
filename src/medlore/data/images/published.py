"""MedFMC, VTAB-1k and RadImageNet as they lie on disk: which list a split is, and where its images are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.lists import (
    RADIMAGENET_RANGES,
    VTAB_CLASSES,
    ListFormat,
    ParsedList,
    index_format,
    medfmc_format,
    parse_list,
)
from medlore.data.images.trees import FolderTree, Tree, tree_of
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.files import existing_path

Published = Literal["medfmc-chest", "medfmc-colon", "medfmc-endo", "vtab", "radimagenet"]

# split -> list file; the first entry is the default
_LISTS: dict[str, dict[str, str]] = {
    "medfmc": {"trainval": "trainval", "train": "trainval", "val": "val_WithLabel", "test": "test_WithLabel"},
    "vtab": {"train800val200": "train800val200", "train": "train800", "val": "val200", "test": "test"},
    "radimagenet": {"train": "rad_train_shuffled", "test": "rad_test"},
}


def read_published(
    path: Path,
    kind: Published,
    *,
    split: str | None = None,
    images: Path | None = None,
    classes: Sequence[str] | None = None,
    labelled: bool | None = None,
) -> ImageSet:
    """Read one list of a published data set.

    Args:
        path: the list, or the folder (or zip) of the data set.
        kind: which one.
        split: `train`, `val`, `test`, or the name of a list without `.txt`; default the whole labelled pool.
        images: the folder of the images; default `images/` beside the list, or the folder of the list.
        classes: class names instead of the published ones.
        labelled: whether the lines carry labels; default no for `...WithoutLabel` lists.

    Returns:
        The set, in the order of the list; its notes name lines that were there twice.

    Raises:
        UnknownNameError: no such list.
        DataError: all faults of the list, with line numbers.
    """
    tree, name = _list_of(path, kind, split)
    form = _format_of(tree, name, kind, classes)
    known = "withoutlabel" not in name.lower() if labelled is None else labelled
    parsed = parse_list(tree.read_text(name), form, labelled=known)
    place, prefix = _place_of_images(tree, name, parsed, images)
    faults = list(parsed.faults)
    items = []
    for line in parsed.lines:
        inside = prefix + line.file.lstrip("/")  # RadImageNet's lists begin their paths with a slash
        if not place.has(inside):
            faults.append(f"line {line.number}: no file {inside!r} in {place.root}")
            continue
        items.append(ImageItem(line.file, place.source(inside), line.labels, form.group_of(line.file)))
    if faults or not items:
        raise DataError(
            f"{tree.root}/{name}",
            f"{len(faults)} faults" if faults else "no lines",
            f"lines like `{form.line}`, and every file in the image folder",
            "correct the list, or name the image folder (images=...)",
            faults=sorted(faults, key=lambda fault: int(fault.split(":")[0].removeprefix("line "))),
        )
    label = f"{kind} {Path(name).stem}" if kind != "vtab" else f"vtab {_vtab_task(tree)} {Path(name).stem}"
    return ImageSet(label, form.classes, form.task, tuple(items), f"{tree.root}/{name}", parsed.doubles)


def kind_of(tree: Tree, name: str | None = None) -> Published | None:
    """The published data set that a folder (or a list in it) looks like; None when it looks like none."""
    lists = [name] if name else [n for n in tree.names if n.endswith(".txt") and n.count("/") <= 1]
    stems = {Path(n).stem for n in lists}
    if {"train800val200", "train800", "val200"} & stems or (tree.root.name in VTAB_CLASSES and stems):
        return "vtab"
    if any(stem.startswith("rad_") for stem in stems):
        return "radimagenet"
    chosen = next((n for n in lists if _looks_like_medfmc(Path(n).stem)), None)
    if chosen is None and name is None:
        return None
    first = next((line.strip() for line in tree.read_text(chosen or lists[0]).splitlines() if line.strip()), "")
    for dataset in ("chest", "endo"):
        if parse_list(first, medfmc_format(dataset)).lines:
            return f"medfmc-{dataset}"  # type: ignore[return-value]
    if chosen and parse_list(first, medfmc_format("colon")).lines:
        return "medfmc-colon"
    named = next((d for d in ("chest", "colon", "endo") if d in (tree.root.name, Path(chosen or "").stem.split("_")[0])), None)
    return f"medfmc-{named}" if named else None  # type: ignore[return-value]


def _looks_like_medfmc(stem: str) -> bool:
    return stem in {"trainval", "test_WithLabel", "val_WithLabel", "test_WithoutLabel", "train_20", "val_20"} or "-shot_" in stem


def _family(kind: Published) -> str:
    if kind not in get_args(Published):
        raise UnknownNameError("format", kind, get_args(Published))
    return "medfmc" if kind.startswith("medfmc") else kind


def _list_of(path: Path, kind: Published, split: str | None) -> tuple[Tree, str]:
    """The tree of the data set and the list's name in it."""
    known = _LISTS[_family(kind)]
    if path.is_file() and path.suffix.lower() != ".zip":
        if split is not None and split != path.stem:
            raise InputError("split", f"{split!r} beside the list {path.name}", "a list, or a folder and a split", "leave the split out")
        inside = path.parent.name == "few_shot_exps"
        root = path.parent.parent if inside else path.parent
        return FolderTree(root), path.relative_to(root).as_posix()
    inner = path / kind.removeprefix("medfmc-")
    tree = tree_of(inner if path.is_dir() and inner.is_dir() and not list(path.glob("*.txt")) else path)
    wanted = known.get(split or next(iter(known)), split or "")
    options = [f"{wanted}.txt", f"few_shot_exps/{wanted}.txt"]
    found = next((name for name in options if tree.has(name)), None)
    if found is None:
        there = sorted(Path(name).stem for name in tree.names if name.endswith(".txt") and name.count("/") <= 1)
        raise UnknownNameError(f"list of {tree.root}", wanted, there, "name a split whose list is there")
    return tree, found


def _format_of(tree: Tree, name: str, kind: Published, classes: Sequence[str] | None) -> ListFormat:
    if kind == "radimagenet":
        return index_format(kind, classes or [str(i) for i in range(RADIMAGENET_RANGES[-1][1] + 1)])
    if kind == "vtab":
        return index_format(kind, classes or [str(i) for i in range(_vtab_classes(tree, name))])
    form = medfmc_format(kind.removeprefix("medfmc-"))  # type: ignore[arg-type]
    if classes is not None and len(classes) != len(form.classes):
        raise InputError(
            "classes", f"{len(classes)} names", f"{len(form.classes)} for {kind}", "leave them out to take the published names"
        )
    return form


def _vtab_task(tree: Tree) -> str:
    return tree.root.stem


def _vtab_classes(tree: Tree, name: str) -> int:
    """The published number of classes of the task that the folder is named after; else what its lists hold."""
    if (known := VTAB_CLASSES.get(_vtab_task(tree))) is not None:
        return known
    any_class = index_format("vtab", [""] * 100_000)
    lists = {name, *(n for n in ("train800val200.txt", "test.txt") if tree.has(n))}
    labels = [line.labels[0] for n in lists for line in parse_list(tree.read_text(n), any_class).lines]
    return max(labels, default=0) + 1


def _place_of_images(tree: Tree, name: str, parsed: ParsedList, images: Path | None) -> tuple[Tree, str]:
    """The tree and the folder in it where most of the first listed files are."""
    if images is not None:
        existing_path(images, "the folder of the images", where="images")
        options = [(tree_of(images), ""), (tree_of(images), "images/")]
    else:
        options = [(tree, "images/"), (tree, "")]
        if isinstance(tree, FolderTree):
            above = FolderTree(tree.root.parent)
            options += [(above, "images/"), (above, "")]
    sample = [line.file.lstrip("/") for line in parsed.lines[:50]]

    def hits(option: tuple[Tree, str]) -> int:
        return sum(option[0].has(option[1] + file) for file in sample)

    return max(options, key=hits)  # the first of the best
