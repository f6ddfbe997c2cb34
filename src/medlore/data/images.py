"""The one door that reads every 2D data format into an `ImageSet`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from medlore.data.imageset import ImageItem, ImageSet, Task, from_arrays
from medlore.data.imagetree import read_folder
from medlore.data.npz import read_npz
from medlore.data.trees import tree_of
from medlore.errors import InputError, UnknownNameError

__all__ = ["Format", "ImageItem", "ImageSet", "Task", "from_arrays", "read_images"]

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

    Raises:
        InputError: there is no such path, or an argument is wrong.
        DataError: the content cannot be used; all faults of one file are reported at once.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(str(path), "no such file or folder", "an image folder, list, table, npz or zip", "check the spelling")
    if format not in get_args(Format):
        raise UnknownNameError("format", format, get_args(Format))
    if path.suffix.lower() == ".npz":
        found = read_npz(path, split=split, task=task, classes=classes)
    else:
        found = read_folder(tree_of(path), split=split, classes=classes)
    return found if group_pattern is None else _grouped(found, group_pattern)


def _grouped(images: ImageSet, pattern: str) -> ImageSet:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError("group_pattern", f"{pattern!r} is no regular expression ({error})", "e.g. '^([^_]+)_'", "mend it") from error
    if expression.groups < 1:
        raise InputError("group_pattern", f"{pattern!r} has no bracket", "one bracket around the patient id, e.g. '^([^_]+)_'", "add it")

    def group_of(key: str) -> str | None:
        match = expression.search(key)
        return match.group(1) if match else None

    return replace(images, items=tuple(replace(item, group=group_of(item.key)) for item in images.items))
