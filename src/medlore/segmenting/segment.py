"""Segmentation of a cohort from Python: the same run as `medlore segment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medlore.runs.settings_file import check_settings
from medlore.segmenting.cohort import CohortWatcher, segment_cases
from medlore.segmenting.settings import SegmentSettings


def segment(
    model: str | Path, cases: str | Path | None = None, *, out: str | Path, watcher: CohortWatcher | None = None, **settings: Any
) -> dict[str, Any]:
    """Segment one image or a cohort and write a folder of masks for each case.

    Args:
        model: a pack, a published .pth file, or `medlore:NAME`.
        cases: a jsonl of cases, a folder of volumes, or one DICOM series; None with `image="ct.nii.gz"`.
        out: folder of the results.
        watcher: hears of plans, windows and finished cases.
        settings: any other setting of `SegmentSettings`, such as `labels=("liver",)` and `modality="ct"`.

    Returns:
        What `OUT/report.json` says under `results`: counts, and an entry a case.

    Raises:
        InputError: wrong settings, all at once, or cases that cannot be found.
        DataError: broken lines in a list.

    Example:
        >>> import medlore
        >>> medlore.segment("no-such-pack", image="ct.nii.gz", out="out", labels=["liver"], overlap=2)
        Traceback (most recent call last):
        medlore.errors.InputError: medlore.segment: 1 fault. Accepted: the settings of SegmentSettings. To do: correct what is listed.
          - overlap: Input should be less than 1, got 2
    """
    values = {"model": str(model), "cases": cases, "out": out, **settings}
    return segment_cases(check_settings(SegmentSettings, values, where="medlore.segment"), watcher=watcher)
