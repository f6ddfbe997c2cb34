"""What an image folder, list, table or archive holds, and what is wrong with it: the words behind `medlore info`."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medlore.data.images.fewshot import read_official_draw
from medlore.data.images.lists import MEDFMC_SIZES, VTAB_CLASSES, VTAB_TEST_SIZES
from medlore.data.images.pixels import Pixels, load_pixels
from medlore.data.images.published import Published, read_published
from medlore.data.images.reading import Format, ImageSet, format_of, read_images
from medlore.data.images.trees import FolderTree, tree_of
from medlore.errors import DataError, MedloreError, UnknownNameError

SAMPLE = 64
_DRAW = re.compile(r"^(?:(chest|colon|endo)_(\d+)-shot_train|train_(\d+)-shot)_exp(\d+)$")


def describe_images(
    path: str | Path,
    *,
    format: Format = "auto",  # noqa: A002 - the word that users look for
    images: str | Path | None = None,
    pixels: Literal["all", "sample", "none"] = "all",
) -> dict[str, Any]:
    """Look through a 2D image set.

    Args:
        path: whatever `read_images` reads.
        format: its format.
        images: the folder of the images, where it lies elsewhere.
        pixels: decode every image, 64 of them spread over the set, or none.

    Returns:
        A dictionary ready for JSON: `path`, `format`, `name`, `task`, `images`, `labelled`, `classes` (name to count),
        `without_label` (images without labels, or with none present), `missing_labels` (labels of a multi-label set that are empty, -1 or
        NaN), `groups` (patients or studies, None where unknown),
        `most_shots` (the most that a draw can take), `splits` (name to count), `decoded` (images looked at),
        `sizes` (height and width: smallest, median, largest),
        `faults` (images that cannot be read), `duplicates` (keys with the same pixels), `leaks` (what two splits share), `lists` (of
        MedFMC and VTAB-1k folders: lines against the published number, and the draws), `notes`.

    Raises:
        DataError: the set cannot be read at all; all faults of its list, table or tree at once.
    """
    path = Path(path)
    place = None if images is None else Path(images)
    kind = format_of(path, format)
    whole = read_images(path, format=kind, images=place, missing_labels="ignore")
    found = {
        "path": str(path),
        "format": kind,
        **_content(whole),
        "splits": {},
        "decoded": 0,
        "sizes": None,
        "faults": [],
        "duplicates": [],
        "leaks": [],
        "lists": {},
        "notes": list(whole.notes),
    }
    splits = _splits(path, kind, place)
    found["splits"] = {name: len(part) for name, part in splits.items()}
    found["leaks"] = _shared_groups(splits)
    if kind in get_args(Published) and path.is_dir():
        found["lists"] = _lists(path, kind, place)  # type: ignore[arg-type]
    if pixels != "none":
        found |= _pixel_facts(_looked_at(whole, pixels), splits, found["leaks"])
    return found


def _content(images: ImageSet) -> dict[str, Any]:
    counts = images.counts()
    bare = sum(not images.present(item) for item in images.items)
    groups = {group for group in images.groups if group is not None}
    return {
        "name": images.name,
        "task": images.task,
        "images": len(images),
        "labelled": images.labelled,
        "classes": counts,
        "without_label": bare,
        "missing_labels": images.missing_labels,
        "groups": len(groups) or None,
        "most_shots": min(counts.values(), default=0),
    }


def _splits(path: Path, kind: Format, place: Path | None) -> dict[str, ImageSet]:
    """The parts that are there; a part whose list has faults is shown under `lists`."""
    found: dict[str, ImageSet] = {}
    if path.is_file() and path.suffix.lower() == ".txt":
        return found
    for split in ("train", "val", "test"):
        try:
            found[split] = read_images(path, format=kind, split=split, images=place, missing_labels="ignore")
        except (UnknownNameError, DataError):
            continue
    return found


def _shared_groups(splits: dict[str, ImageSet]) -> list[str]:
    names = list(splits)
    leaks = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = {g for g in splits[first].groups if g} & {g for g in splits[second].groups if g}
            if shared:
                leaks.append(f"{first} and {second} share {len(shared)} patients or studies ({', '.join(sorted(shared)[:3])}, ...)")
    return leaks


def _looked_at(images: ImageSet, pixels: Literal["all", "sample", "none"]) -> ImageSet:
    if pixels == "all" or len(images) <= SAMPLE:
        return images
    return images.subset(np.linspace(0, len(images) - 1, SAMPLE).round().astype(int).tolist())


def _pixel_facts(images: ImageSet, splits: dict[str, ImageSet], leaks: Sequence[str]) -> dict[str, Any]:
    shapes: list[tuple[int, int]] = []
    faults: list[str] = []
    same: dict[bytes, list[str]] = defaultdict(list)
    for item in images.items:
        try:
            content: Pixels = load_pixels(item)
        except DataError as error:
            faults.append(f"{error.where}: {error.came}")
            continue
        shapes.append((content.shape[0], content.shape[1]))
        same[hashlib.blake2b(content.tobytes(), digest_size=16).digest() + bytes(str(content.shape), "ascii")].append(item.key)
    doubles = [keys for keys in same.values() if len(keys) > 1]
    split_of = {key: name for name, part in splits.items() for key in part.keys}
    crossing = [keys for keys in doubles if len({split_of.get(key) for key in keys}) > 1]
    return {
        "decoded": len(images),
        "sizes": _sizes(shapes),
        "faults": faults,
        "duplicates": doubles,
        "leaks": [*leaks, *(f"the same pixels in two splits: {', '.join(keys)}" for keys in crossing)],
    }


def _sizes(shapes: Sequence[tuple[int, int]]) -> dict[str, list[int]] | None:
    if not shapes:
        return None
    ordered = sorted(shapes, key=lambda s: s[0] * s[1])
    return {"smallest": list(ordered[0]), "median": list(ordered[len(ordered) // 2]), "largest": list(ordered[-1])}


def _lists(path: Path, kind: Published, place: Path | None) -> dict[str, Any]:
    """Every list of a published data set: its lines, the published number, and its first fault."""
    tree = tree_of(path)
    dataset = kind.removeprefix("medfmc-") if kind != "vtab" else path.name
    expected = MEDFMC_SIZES.get(dataset, {}) if kind != "vtab" else _vtab_sizes(dataset)
    found: dict[str, Any] = {}
    for name in (n for n in tree.names if n.endswith(".txt") and n.count("/") <= 1):
        stem = Path(name).stem
        entry: dict[str, Any] = {"lines": None, "published": expected.get(stem), "problem": None, "notes": []}
        try:
            part = read_published(tree.root / name if isinstance(tree, FolderTree) else path, kind, split=stem, images=place)
            entry |= {"lines": len(part), "notes": list(part.notes)}
            if match := _DRAW.match(stem):
                named = match.group(1) or dataset
                drawn = read_official_draw(path, named, int(match.group(2) or match.group(3)), int(match.group(4)), images=place)
                entry["notes"] = list(drawn.notes)
        except MedloreError as error:
            entry["problem"] = str(error).split("\n")[0]
        found[stem] = entry
    return found | {
        stem: {"lines": None, "published": size, "problem": "not there", "notes": []}
        for stem, size in expected.items()
        if stem not in found
    }


def _vtab_sizes(task: str) -> dict[str, int]:
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000}
    return sizes | {"test": VTAB_TEST_SIZES[task]} if task in VTAB_CLASSES else sizes
