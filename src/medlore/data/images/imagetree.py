"""Folders (or zips) with one subfolder per class, and flat folders of unlabelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.trees import BESIDE_SUFFIXES, Tree, is_image
from medlore.errors import DataError, UnknownNameError

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def read_folder(tree: Tree, *, split: str | None = None, classes: Sequence[str] | None = None) -> ImageSet:
    """Read `<class>/<any>/<file>`, or `<train|val|test>/<class>/<any>/<file>`; images at the top alone are unlabelled.

    Hidden files are passed over, and so are lists, tables and texts; any other file that is not an image is a fault,
    and so is a class folder without images. All faults are reported at once. Whether an image can be decoded shows
    when it is read: `medlore.data.images.pixels.check_pixels` reads all of them.

    Args:
        tree: the folder or archive.
        split: the first level to read where that level is `train`, `val`, `test` (or their long names).
        classes: class names in label order; default the folder names, sorted.

    Raises:
        DataError: no images, files that are no images, images outside a class folder, classes without images.
        UnknownNameError: a split that is not there.
    """
    parted = [_parted(name) for name in tree.names if not name.lower().endswith(BESIDE_SUFFIXES)]
    images = [entry for entry in parted if is_image(tree, entry[2])]
    empty = {label for _, label, _ in map(_parted, (f"{folder}/." for folder in tree.empty_folders)) if label}
    # The class list comes from all splits: it must not depend on the one that is read.
    found = sorted({label for _, label, _ in images if label} | (empty if any(label for _, label, _ in images) else set()))
    names = tuple(classes) if classes is not None else tuple(found)
    faults = _faults(parted, images, names, found)
    if faults or not images:
        raise DataError(
            str(tree.root),
            f"{len(faults)} faults" if faults else "no images",
            "one folder per class with images (png, jpg, bmp, tif, gif, webp, dcm), or images alone",
            "correct or remove what is listed" if faults else "name the folder that holds the class folders",
            faults=faults,
        )
    if split is not None:
        images = _of_split(images, split, tree)
    index = {name: i for i, name in enumerate(names)}
    items = tuple(ImageItem(name, tree.source(name), (index[label],) if label else ()) for _, label, name in images)
    return ImageSet(tree.root.stem, names, "single", items, str(tree.root))


def _parted(name: str) -> tuple[str | None, str | None, str]:
    """Split, class and full name of one file."""
    parts = name.split("/")
    split = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 1 else None
    rest = parts[1:] if split else parts
    return split, rest[0] if len(rest) > 1 else None, name


def _of_split(images: Sequence[tuple[str | None, str | None, str]], split: str, tree: Tree) -> list[tuple[str | None, str | None, str]]:
    wanted = SPLIT_NAMES.get(split.lower(), split.lower())
    chosen = [entry for entry in images if entry[0] == wanted]
    if not chosen:
        there = sorted({part for part, *_ in images if part})
        raise UnknownNameError(f"split of {tree.root}", split, there or ["(none: leave it out)"])
    return chosen


def _faults(
    parted: Iterable[tuple[str | None, str | None, str]],
    images: Sequence[tuple[str | None, str | None, str]],
    classes: Sequence[str],
    found: Sequence[str],
) -> list[str]:
    known = {name for _, _, name in images}
    faults = [f"{name}: not an image file" for _, _, name in parted if name not in known]
    if found:
        faults += [f"{name}: an image outside the class folders" for _, label, name in images if not label]
    faults += [f"{label}: a folder that is not in the class list" for label in found if label not in classes]
    counted = Counter(label for _, label, _ in images)
    return faults + [f"class {label!r}: no images" for label in classes if not counted[label]]
