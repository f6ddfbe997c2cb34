"""Decomposition from Python: the same run as `medlore decompose`, for classifiers and for segmenters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medlore.decomposing import kinds
from medlore.decomposing.classifiers import study as classifiers
from medlore.decomposing.segmenters import study as segmenters

Progress = Callable[[int, int, str], None]


def decompose(
    study: str | Path,
    out: str | Path,
    *,
    narrate: Callable[[str], Progress] = lambda _name: lambda _step, _steps, _text: None,
    **overrides: Any,
) -> classifiers.Decomposition | segmenters.SegmentationResult:
    """Split a teacher into one light shared backbone and a low-rank expert per task.

    Args:
        study: YAML file; `kind: segmenter` says that it is about segmenters. Its paths start from its own folder.
        out: folder of the pack, the report and the checkpoints.
        narrate: name of a network -> its progress: step, steps, a text.
        overrides: settings in place of the study's, such as `steps`, `seed` and `device`.

    Raises:
        InputError: the study or its data cannot be used; nothing is written.
        StepError: a training diverged; the last good checkpoint stays.
    """
    if kinds.is_segmentation_study(study):
        return segmenters.decompose_segmenter(study, out, narrate=narrate, **overrides)
    return classifiers.decompose(study, out, narrate=narrate, **overrides)
