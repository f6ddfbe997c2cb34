"""Dice of whole volumes by sliding window, with the project's own windows, in memory that does not grow with the volume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.intensity import IntensityRule, intensity_of, published_foreground
from medlore.data.volumes.synthesis import SynthesisRules, synthesise
from medlore.data.volumes.training_cache import CachedCase
from medlore.data.volumes.window_grid import WindowGrid
from medlore.data.volumes.windows import sliding_windows
from medlore.decomposing.segmenters.cohort import Cohort
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.settings import Precision
from medlore.models.segmenter.vocabulary import WHOLE_BODY
from medlore.training.accelerator import autocast


@dataclass(frozen=True)
class WindowSettings:
    """How volumes are gone through.

    Attributes:
        roi_size: x y z of a window.
        overlap: share of a window.
        precision: of the network.
        synthesis: rules of images that are made from label maps.
        seed: of those images.
    """

    roi_size: tuple[int, int, int]
    overlap: float
    precision: Precision
    synthesis: SynthesisRules
    seed: int = 0


def dice_of_cases(
    network: PromptedSegmenter, cohort: Cohort, cases: Iterable[tuple[str, CachedCase]], windows: WindowSettings
) -> list[dict[str, Any]]:
    """One row a case and label: list, case, region, label (`modality/label`), dice, voxels of truth and of the answer.

    The grid is the network's. Both masks empty: 1; one of them empty: 0.
    """
    network.eval()
    rows = []
    for name, case in cases:
        image = _image(case, windows)
        for expert, labels in _questions(network, cohort, case):
            counts = _counts(network, cohort, case, image, labels, expert, windows)
            for label, (common, answered, true) in zip(labels, counts.tolist(), strict=True):  # plain numbers: they go into checkpoints
                both = answered + true
                prompt = cohort.prompts[case.modality, label]
                row = {"list": name, "case": case.name, "region": prompt.region, "label": prompt.key}
                rows.append(row | {"dice": 1.0 if both == 0 else 2 * common / both, "truth": true, "found": answered})
    return rows


def _questions(network: PromptedSegmenter, cohort: Cohort, case: CachedCase) -> list[tuple[str | None, list[str]]]:
    """(expert, labels): all labels at once where the network has no experts."""
    if not network.routed:
        return [(None, cohort.labels_of(case))]
    return [(None if r == WHOLE_BODY else r, cohort.labels_of(case, r)) for r in cohort.regions_of(case)]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean Dice per label over cases, and the mean over labels (None without a row)."""
    labels: dict[str, list[float]] = {}
    for row in rows:
        labels.setdefault(row["label"], []).append(row["dice"])
    means = {label: sum(values) / len(values) for label, values in sorted(labels.items())}
    return {"labels": means, "cases": {label: len(v) for label, v in sorted(labels.items())}, "mean": _mean(list(means.values()))}


def make_validation(cohort: Cohort, windows: WindowSettings, *, cases: int) -> Callable[[PromptedSegmenter], dict[str, Any]] | None:
    """A validation over the first cases of each list; None where there are none."""
    chosen = [(name, case) for name, found in cohort.parts["validation"].items() for case in found[:cases]]
    return (lambda network: summary(dice_of_cases(network, cohort, chosen, windows))) if chosen else None


def _mean(values: list[float]) -> float | None:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else None


def _image(case: CachedCase, windows: WindowSettings) -> Tensor:
    """1 x y z float32; made from the label map, always the same one, where the case has no image of its own."""
    if case.image is not None:
        return torch.from_numpy(np.array(case.image, np.float32))[None]
    rng = np.random.default_rng([windows.seed, sum(case.name.encode())])
    grey = synthesise(np.asarray(case.codes), rng, windows.synthesis)
    box = published_foreground(grey, IntensityRule().foreground_above)
    found = intensity_of(grey if box is None else box.apply(grey), "mri", where=case.name)
    return torch.from_numpy(found.apply(grey))[None]


def membership(case: CachedCase, label: str) -> np.ndarray:
    """Whether a code belongs to a label, for every code that the map's type can hold."""
    table = np.zeros(np.iinfo(case.codes.dtype).max + 1, np.bool_)
    table[[code for code in case.members[label] if code < len(table)]] = True  # others are not in this map
    return table


def _counts(
    network: PromptedSegmenter,
    cohort: Cohort,
    case: CachedCase,
    image: Tensor,
    labels: Sequence[str],
    expert: str | None,
    windows: WindowSettings,
) -> np.ndarray:
    """(labels, 3): common voxels, answered voxels, true voxels."""
    device = next(network.parameters()).device
    rows = torch.tensor([[cohort.prompts[case.modality, label].row for label in labels]], device=device)

    def predict(pixels: Tensor) -> Tensor:
        regions = None if expert is None else [expert] * len(pixels)
        with torch.no_grad(), autocast(device, windows.precision):
            logits: Tensor = network(pixels, rows.expand(len(pixels), -1), regions)[0]
            return logits.float()

    grid = WindowGrid(tuple(image.shape[1:]), windows.roi_size, windows.overlap)  # type: ignore[arg-type]
    counts = np.zeros((len(labels), 3), np.int64)
    tables = [membership(case, label) for label in labels]
    slabs = sliding_windows(
        image, predict, grid, labels=len(labels), padding_value=float(image.min()) if case.synthesise else case.air, device=device
    )
    for slab in slabs:
        answer = (slab.probability > 0.5).cpu().numpy()
        codes = np.asarray(case.codes[slab.start : slab.start + answer.shape[1]])
        del slab  # as large as the band: it must not rest beside the maps of the next windows
        for index, table in enumerate(tables):
            truth = table[codes]
            counts[index] += (np.count_nonzero(answer[index] & truth), np.count_nonzero(answer[index]), np.count_nonzero(truth))
    return counts
