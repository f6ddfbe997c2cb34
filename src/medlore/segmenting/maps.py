"""The maps of a case as files: probabilities, uncertainty, and the brain that a first pass found, on the grid of the masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medlore.data.formats import write_volume
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import write_nifti
from medlore.segmenting.case_masks import CaseMasks
from medlore.segmenting.segmentation import Segmentation, canvas_of
from medlore.segmenting.watch import LEVELS, ProbabilityWatch, planes_on

PROBABILITIES, UNCERTAINTY, BRAIN = "probabilities", "uncertainty.nii.gz", "brain_mask.nii.gz"


def map_names(maps: ProbabilityWatch | None, files: Mapping[str, str]) -> list[str]:
    """Files of the maps that were kept, below the folder of the case.

    Args:
        maps: of the result.
        files: label -> file of its mask.
    """
    if maps is None:
        return []
    probabilities = [f"{PROBABILITIES}/{files[label]}" for label in maps.probabilities]
    return [*probabilities, *([UNCERTAINTY] if maps.uncertainty is not None else [])]


def write_maps(folder: Path, case: CaseMasks) -> None:
    """Write what was kept: one map at a time is brought to the grid of the masks. A byte holds a share, the slope in the header is 1/255.

    Args:
        folder: of the case.
        case: its masks, with the grid on which they are written.
    """
    result, affine = case.result, case.other_affine
    if result.brain is not None:
        write_volume(folder / BRAIN, case.cut(result.brain.astype(np.uint8)), result.volume, labels={1: "brain"}, affine=affine)
    maps = result.maps
    if maps is None or not (maps.probabilities or maps.uncertainty is not None):
        return
    values, view = canvas_of(result, np.uint8)
    if maps.probabilities:
        (folder / PROBABILITIES).mkdir()
    for label, levels in maps.probabilities.items():
        _fill(view, levels, result)
        write_nifti(folder / PROBABILITIES / case.files[label], case.cut(values), result.volume, affine=affine, slope=1 / LEVELS)
    if maps.uncertainty is not None:
        _fill(view, maps.uncertainty, result)
        write_nifti(folder / UNCERTAINTY, case.cut(values), result.volume, affine=affine, slope=1 / LEVELS)


def _fill(view: Array, levels: Array, result: Segmentation) -> None:
    for planes, part in planes_on(levels, result.path):
        view[planes] = part
