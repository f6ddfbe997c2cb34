"""The one door that reads every 2D data format into an `ImageSet`."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from medlore.data.images.imageset import ImageItem, ImageSet, Task, from_arrays
from medlore.data.images.imagetree import read_folder
from medlore.data.images.missing_labels import MissingLabels
from medlore.data.images.npz import read_npz
from medlore.data.images.published import kind_of, read_published
from medlore.data.images.tables import read_table, table_of
from medlore.data.images.trees import FolderTree, is_image_name, tree_of
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.files import existing_path

__all__ = ["Format", "ImageItem", "ImageSet", "Task", "format_of", "from_arrays", "read_images"]

Format = Literal["auto", "medfmc-chest", "medfmc-colon", "medfmc-endo", "vtab", "folder", "csv", "npz", "zip", "radimagenet"]


def read_images(
    path: str | Path,
    *,
    format: Format = "auto",  # noqa: A002 - the word that users look for
    split: str | None = None,
    images: str | Path | None = None,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    group_pattern: str | None = None,
    missing_labels: MissingLabels = "fault",
) -> ImageSet:
    """Read a 2D image set of any known format.

    Args:
        path: a folder, a list file, a CSV table, an `.npz` file or a zip archive.
        format: its format; `auto` looks at it.
        split: the part to read (`train`, `val`, `test`, or the name of a list file without its suffix); None takes all
            parts of formats that hold several in one file, and the whole labelled pool of list formats.
        images: the folder of the images, where the list lies elsewhere.
        task: `single` or `multi`, where the file could be read both ways.
        classes: class names in label order; for CSV tables also the columns to read.
        group_pattern: a regular expression searched in each key; its first bracket is the patient or study.
        missing_labels: what becomes of labels of a multi-label table that are empty, -1 or NaN: each is a `fault`, the class is absent
            (`negative`), or it is not known (`ignore`) and left out of losses, metrics and counts.

    Raises:
        InputError: there is no such path, or an argument is wrong.
        DataError: the content cannot be used; all faults of one file are reported at once.
    """
    path, place = Path(path), None if images is None else Path(images)
    if place is not None:
        existing_path(place, "the folder or zip of the images", where="images")
    how: dict[str, Any] = {"split": split, "classes": classes, "task": task, "missing_labels": missing_labels}
    found = _read(path, format_of(path, format), place, how)
    return found if group_pattern is None else _grouped(found, group_pattern)


def format_of(path: Path, format: Format = "auto") -> Format:  # noqa: A002
    """The format that a path is in; a zip is looked into like a folder.

    Raises:
        InputError: no such path, or one image.
        DataError: a list of no known format.
        UnknownNameError: a format that is not known.
    """
    existing_path(path, "an image folder, list, table, npz or zip")
    if format not in get_args(Format):
        raise UnknownNameError("format", format, get_args(Format))
    suffix = path.suffix.lower()
    if format not in ("auto", "zip"):
        return format
    if path.is_file() and suffix in (".npz", ".csv", ".tsv"):
        return "npz" if suffix == ".npz" else "csv"
    if path.is_file() and suffix == ".txt":
        kind = kind_of(FolderTree(path.parent), path.name)
        if kind is None:
            raise DataError(str(path), "a list of no known format", "MedFMC, VTAB-1k or RadImageNet lines", "say which: format=...")
        return kind
    if path.is_file() and suffix != ".zip" and is_image_name(path.name):
        raise InputError(str(path), "one image", "a folder, list, table, npz or zip", "name its folder, or use `medlore predict`")
    if path.is_file() and not zipfile.is_zipfile(path):
        what = "not a complete zip archive" if suffix == ".zip" else f"a file of type {suffix!r}" if suffix else "a file without suffix"
        raise DataError(str(path), what, "a folder of images, a .zip of one, a .csv, .tsv or .txt list, or a .npz", "name one of these")
    tree = tree_of(path)
    return kind_of(tree) or ("csv" if table_of(tree) else "folder")


def _read(path: Path, kind: Format, images: Path | None, how: dict[str, Any]) -> ImageSet:
    if kind == "npz":
        return read_npz(path, **how)
    if kind == "csv":
        return _read_csv(path, images, how)
    if kind == "folder":
        return read_folder(tree_of(path), split=how["split"], classes=how["classes"])
    return read_published(path, kind, split=how["split"], images=images, classes=how["classes"])  # type: ignore[arg-type]


def _read_csv(path: Path, images: Path | None, how: dict[str, Any]) -> ImageSet:
    place = None if images is None else tree_of(images)
    if path.is_file() and path.suffix.lower() != ".zip":
        return read_table(FolderTree(path.parent), path.name, images=place, **how)
    tree = tree_of(path)
    name = table_of(tree, sure=True)
    if name is None:
        raise DataError(str(path), "no CSV, or several", "one CSV, or one named labels.csv", "name the table itself")
    return read_table(tree, name, images=place, **how)


def _grouped(images: ImageSet, pattern: str) -> ImageSet:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(
            "group_pattern", f"{pattern!r} is not a valid regular expression ({error})", "e.g. '^([^_]+)_'", "correct it"
        ) from error
    if expression.groups < 1:
        raise InputError(
            "group_pattern", f"{pattern!r} has no group", "one group in parentheses around the patient ID, e.g. '^([^_]+)_'", "add it"
        )

    def group_of(key: str) -> str | None:
        match = expression.search(key)
        return match.group(1) if match else None

    return replace(images, items=tuple(replace(item, group=group_of(item.key)) for item in images.items))
