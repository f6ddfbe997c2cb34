"""Labels of a multi-label set that are not there: which cells count as missing, and what a user may decide about them.

A class is present (1), absent (0) or not known (`MISSING`). What is not known is never turned into "absent" unless the user says so:
CheXpert leaves cells empty for findings that a report does not mention and writes -1 for those that it leaves open.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

MissingLabels = Literal["fault", "negative", "ignore"]

MISSING = -1  # in the labels of an image; NaN in arrays of targets
FLAG = "--missing-labels"
ADVICE = f"fill these cells, or say {FLAG} negative (the class is absent) or {FLAG} ignore (not known: left out of losses and metrics)"
HELP = "What an empty cell, -1 or NaN of a multi-label table is: a fault, negative (absent), or ignore (not known, left out)."
_WORDS = frozenset({"", "nan", "na", "n/a", "<na>", "null", "none"})


def says_nothing(cell: str) -> bool:
    """Whether a cell holds no label: empty, -1, or a word that tables write for a value that is not there.

    Examples:
        >>> [says_nothing(cell) for cell in (" ", "-1.0", "NaN", "0", "no")]
        [True, True, True, False, False]
    """
    text = cell.strip().lower()
    if text in _WORDS:
        return True
    try:
        return float(text) == MISSING
    except ValueError:
        return False


def settled(policy: MissingLabels) -> int:
    """The label that stands for a missing one under a policy other than `fault`."""
    return 0 if policy == "negative" else MISSING


def missing_entries(labels: NDArray[np.floating] | NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which entries of an array of labels hold no label: NaN or -1."""
    found: NDArray[np.bool_] = np.isnan(labels) | (labels == MISSING)
    return found
