"""The images of a cell: what trains, what selects, what judges."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.data.images.digits import digits
from medlore.data.images.splits import ImageSplits, SplitRules, hold_out, read_splits, split_images
from medlore.studies.settings import DIGITS, Shots

_DIGITS_TEST_IMAGES = 400


def parts_of(entry: Mapping[str, Any], rules: Mapping[str, Any], folder: str | Path, *, shots: Shots, draw: int) -> ImageSplits:
    """Parts of one draw; the test images are the same for every draw.

    Args:
        entry: a `DataEntry` as plain values.
        rules: `validation_shots` and `data_seed`.
        folder: what paths of the entry start from.
        shots: labelled images per class, or `all`.
        draw: number of the draw, from 1.

    Raises:
        InputError: nothing is there.
        DataError: too few images, or faults of the files.
    """
    return _parts(json.dumps(dict(entry), sort_keys=True), json.dumps(dict(rules), sort_keys=True), str(folder), shots, draw)


@functools.lru_cache(maxsize=4)  # the contenders of a draw come one after the other
def _parts(entry_text: str, rules_text: str, folder: str, shots: Shots, draw: int) -> ImageSplits:
    entry, rules = json.loads(entry_text), json.loads(rules_text)
    without = rules["validation_shots"] == "none"
    split = SplitRules(
        shots=None if shots == "all" else shots,
        draw=draw,
        seed=rules["data_seed"],
        per=entry["per"],
        validation_shots=None if without else rules["validation_shots"] or (None if shots == "all" else shots),
        validation_fraction=0.0 if without else 0.2,
        test_fraction=entry["test_fraction"],
    )
    if entry["data"] == DIGITS:
        pool, judges = digits(entry["test_limit"] or _DIGITS_TEST_IMAGES, seed=rules["data_seed"])
        found = split_images(pool, split, test=judges)
    else:
        found = _read(entry, split, Path(folder))
    test, limit = found.test, entry["test_limit"]
    if test is not None and limit is not None and limit < len(test) and entry["data"] != DIGITS:
        test = hold_out(test, limit / len(test), seed=rules["data_seed"] + 1)[1]
    return ImageSplits(found.train, None if without else found.validation, test, found.notes)


def _read(entry: Mapping[str, Any], split: SplitRules, folder: Path) -> ImageSplits:
    places = {name: None if entry[name] is None else folder / entry[name] for name in ("data", "images", "test_data")}
    how = {name: entry[name] for name in ("format", "task", "classes", "group_pattern", "missing_labels")}
    data, test_data = places["data"], places["test_data"]
    assert data is not None  # noqa: S101  # nosec B101 # the entry demands it
    return read_splits(data, split, test_data=test_data, official=entry["official_draw"], images=places["images"], **how)
