"""Masks that overlap as one map of codes: every combination of labels that occurs has a code of its own."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from medlore.data.volumes.geometry import Array, Shape
from medlore.errors import DataError

LARGEST_CODE = 65535


def combined_codes(masks: Iterable[tuple[str, Array]], shape: Shape) -> tuple[Array, dict[str, tuple[int, ...]]]:
    """The map, in the smallest type that holds it, and the codes that belong to each label.

    Args:
        masks: label and its mask (x y z), one at a time; a generator keeps only one of them in memory.
        shape: of the masks.

    Raises:
        DataError: more than 65,535 combinations.

    Examples:
        >>> codes, members = combined_codes([("a", np.array([[[1, 1, 0]]])), ("b", np.array([[[0, 1, 0]]]))], (1, 1, 3))
        >>> codes.tolist(), members
        ([[[1, 2, 0]]], {'a': (1, 2), 'b': (2,)})
    """
    codes: Array = np.zeros(shape, np.uint16)
    meaning: list[frozenset[str]] = [frozenset()]
    known = {meaning[0]: 0}
    labels = []
    for label, mask in masks:
        labels.append(label)
        inside = np.asarray(mask) != 0
        before = codes[inside]
        renamed = np.arange(len(meaning), dtype=np.uint16)
        for code in np.unique(before):
            wanted = meaning[code] | {label}
            if wanted not in known:
                known[wanted] = len(meaning)
                meaning.append(wanted)
            if known[wanted] > LARGEST_CODE:
                raise DataError("masks", f"more than {LARGEST_CODE:,} combinations of labels", "fewer overlaps", "split the case")
            renamed[code] = known[wanted]
        codes[inside] = renamed[before]
    members = {label: tuple(code for code, combination in enumerate(meaning) if label in combination) for label in labels}
    return narrow(codes), members


def narrow(codes: Array) -> Array:
    """Codes in the smallest type that holds them."""
    return np.asarray(codes, np.uint8 if codes.max(initial=0) < 256 else np.uint16)
