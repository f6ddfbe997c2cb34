"""The result files of the MedFMC challenge: one CSV per data set and number of shots, `filename,score1,...`, no header."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.lists import MEDFMC_CLASSES, MedfmcName
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.files import existing_file, write_text

MedfmcShots = Literal[1, 5, 10]
ACCEPTED = "lines `filename,score,...` without a header, in the order of the list, scores from 0 to 1"


def submission_name(dataset: MedfmcName, shots: int) -> str:
    """The file name that the challenge expects.

    Examples:
        >>> submission_name("endo", 5)
        'endo_5-shot_submission.csv'
    """
    if dataset not in MEDFMC_CLASSES:
        raise UnknownNameError("dataset", dataset, MEDFMC_CLASSES)
    if shots not in (1, 5, 10):
        raise InputError("shots", f"got {shots}", "1, 5 or 10", "the challenge takes no other number")
    return f"{dataset}_{shots}-shot_submission.csv"


def write_submission(folder: str | Path, *, dataset: MedfmcName, shots: int, files: Sequence[str], scores: NDArray[np.floating]) -> Path:
    """Write one result file, whole and checked.

    Args:
        folder: where to; it is made when absent.
        dataset: `chest`, `colon` or `endo`.
        shots: 1, 5 or 10.
        files: image names, in the order of the challenge's list (`test_WithoutLabel.txt`, or the `*_val.csv` handed out).
        scores: (b, c) probabilities; c is 19, 2 or 4.

    Returns:
        The path of the file.

    Raises:
        DataError: scores of another shape, not finite, or outside 0 to 1; file names that stand twice.
    """
    target = Path(folder) / submission_name(dataset, shots)
    values = np.asarray(scores, dtype=np.float64)
    width = len(MEDFMC_CLASSES[dataset])
    if values.shape != (len(files), width):
        raise DataError(
            "scores",
            f"shape {values.shape}",
            f"({len(files)}, {width}): one row per file, one column per class of {dataset}",
            "correct them",
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([file, *(f"{value:.8f}" for value in row)] for file, row in zip(files, values, strict=True))
    _raise_on(_faults(text.getvalue(), width, files), str(target))
    return write_text(target, text.getvalue())


def validate_submission(path: str | Path, *, dataset: MedfmcName | None = None, files: Sequence[str] | None = None) -> int:
    """Check a result file, ours or anyone's.

    Args:
        path: the CSV.
        dataset: which one; default from the file's name.
        files: the names that must stand there, in their order; None checks the lines alone.

    Returns:
        The number of lines.

    Raises:
        DataError: all faults at once: columns, names, order, missing or surplus rows, scores not finite or outside 0 to 1.
    """
    path = existing_file(path)
    name = dataset or path.name.split("_")[0]
    if name not in MEDFMC_CLASSES:
        raise UnknownNameError(f"{path.name}, data set", name, MEDFMC_CLASSES, "name the file as the challenge does, or give dataset=...")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"not UTF-8 text ({error.reason})", ACCEPTED, "write it again") from error
    _raise_on(_faults(text, len(MEDFMC_CLASSES[name]), files), str(path))
    return len(text.splitlines())


def _raise_on(faults: list[str], where: str) -> None:
    if faults:
        raise DataError(where, f"{len(faults)} faults", ACCEPTED, "correct the scores or the list", faults=faults)


def _faults(text: str, width: int, files: Sequence[str] | None) -> list[str]:
    faults = []
    seen: dict[str, int] = {}
    rows = list(csv.reader(text.splitlines()))
    for number, row in enumerate(rows, start=1):
        if len(row) != width + 1:
            faults.append(f"line {number}: {len(row)} columns instead of {width + 1}")
            continue
        if (first := seen.setdefault(row[0], number)) != number:
            faults.append(f"line {number}: {row[0]} stands already on line {first}")
        if files is not None and number <= len(files) and row[0] != files[number - 1]:
            faults.append(f"line {number}: {row[0]} where {files[number - 1]} belongs")
        wrong = [cell for cell in row[1:] if not _is_score(cell)]
        if wrong:
            faults.append(f"line {number}: {wrong[0]!r} is no score from 0 to 1" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    if files is not None and len(rows) != len(files):
        faults.append(f"{len(rows)} lines for {len(files)} files")
    return faults if rows else ["no lines"]


def _is_score(cell: str) -> bool:
    try:
        value = float(cell)
    except ValueError:
        return False
    return math.isfinite(value) and 0 <= value <= 1
