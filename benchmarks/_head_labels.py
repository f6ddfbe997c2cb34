"""What the ten manually labelled heads call their structures, what the methods call them, and how an answer is scored.

The manual labels (Neuromorphometrics, MICCAI 2012) count sulcal fluid to the cortex. So cortex and grey matter are scored twice: against
the manual mask, and against the mask without the voxels that are darker than midway between the subject's ventricle and the subject's
cortex (medians under the manual masks). A method that leaves sulci out gains by the second, one that fills them by the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.metrics.masks import dice

SUBJECTS = ("1000", "1001", "1002", "1006", "1007", "1008", "1009", "1010", "1011", "1012")
# Numbers of the right and of the left side in the manual maps (labels.json of the set); cortex has even numbers right, odd ones left.
SIDED: dict[str, tuple[list[int], list[int]]] = {
    "cerebral cortex": ([*range(100, 208, 2)], [*range(101, 208, 2)]),
    "cerebral white matter": ([44], [45]),
    "cerebellar white matter": ([40], [41]),
    "lateral ventricle": ([49, 51], [50, 52]),
    "thalamus": ([59], [60]),
    "caudate nucleus": ([36], [37]),
    "putamen": ([57], [58]),
    "pallidum": ([55], [56]),
    "hippocampus": ([47], [48]),
    "amygdala": ([31, 33], [32, 34]),
    "nucleus accumbens": ([23], [30]),
    "ventral diencephalon": ([61], [62]),
}
_VERMIS = [71, 72, 73]
UNSIDED: dict[str, list[int]] = {
    "brainstem": [35],
    "third ventricle": [4],
    "fourth ventricle": [11],
    "cerebellar cortex": [38, 39, *_VERMIS],
    "cerebellum": [38, 39, 40, 41, *_VERMIS],
}
_DEEP_GREY = ("thalamus", "caudate nucleus", "putamen", "hippocampus", "amygdala", "nucleus accumbens", "cerebral cortex")
_DEEP_WHITE = ("cerebral white matter", "cerebellar white matter", "pallidum", "ventral diencephalon")
# The order of the table: the structures that every method can be asked for first.
STRUCTURES = (
    "grey matter", "grey matter without fluid", "white matter", "brain ventricle", "thalamus", "caudate nucleus", "putamen", "pallidum",
    "hippocampus", "amygdala", "brainstem", "cerebellum", "cerebral cortex", "cerebral cortex without fluid", "cerebral white matter",
    "cerebellar cortex", "cerebellar white matter", "lateral ventricle", "third ventricle", "fourth ventricle", "nucleus accumbens",
    "ventral diencephalon", "brain",
)  # fmt: skip
DRY = {"grey matter without fluid": "grey matter", "cerebral cortex without fluid": "cerebral cortex"}


def codes_of(structure: str) -> list[int]:
    """Numbers of a structure in the manual maps, both sides.

    Grey and white matter are put together as `studies/seg_mini_cases.py` does it: deep grey nuclei but the pallidum are grey; pallidum,
    ventral diencephalon and brainstem are white.
    """
    if structure in SIDED:
        return [code for side in SIDED[structure] for code in side]
    if structure in UNSIDED:
        return UNSIDED[structure]
    parts: dict[str, list[int]] = {
        "grey matter": [*(c for name in _DEEP_GREY for c in codes_of(name)), *UNSIDED["cerebellar cortex"]],
        "white matter": [*(c for name in _DEEP_WHITE for c in codes_of(name)), 35],
        "brain ventricle": [4, 11, 15, *codes_of("lateral ventricle")],
    }
    return parts[structure]


@dataclass(frozen=True, eq=False)
class Head:
    """One subject.

    Args:
        name: of the subject.
        volume: the skull-stripped T1.
        manual: x y z, numbers of the manual labels, on the same grid.
    """

    name: str
    volume: Volume
    manual: Array

    def truths(self) -> dict[str, Array]:
        """Structure -> Boolean mask, in the order of the table."""
        found = {name: np.isin(self.manual, codes_of(name)) for name in STRUCTURES if name not in (*DRY, "brain")}
        found["brain"] = self.manual > 0
        wet = self.volume.array < self.fluid_below()
        found |= {name: found[whole] & ~wet for name, whole in DRY.items()}
        return {name: found[name] for name in STRUCTURES}

    def fluid_below(self) -> float:
        """The grey value midway between ventricle and cortex (medians under the manual masks)."""
        inside = [np.median(self.volume.array[np.isin(self.manual, codes_of(name))]) for name in ("lateral ventricle", "cerebral cortex")]
        return float(np.mean(inside))

    def sides(self) -> Array:
        """1 where a manual label is of the right side, 2 of the left, else 0."""
        right, left = (np.isin(self.manual, [c for pair in SIDED.values() for c in (*pair[side], 38 + side)]) for side in (0, 1))
        return np.where(right, 1, np.where(left, 2, 0)).astype(np.uint8)


def read_head(folder: Path, name: str) -> Head:
    """A subject of the set."""
    volume = read_volume(folder / f"{name}_t1_stripped.nii.gz")
    return Head(name, volume, np.asarray(np.rint(read_volume(folder / f"{name}_manual.nii.gz").array), np.int32))


def stray(found: Array, truth: Array, voxel_ml: float) -> float:
    """Volume of all connected parts of an answer that touch no truth, in millilitres."""
    parts, count = ndimage.label(found)
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)
    sizes[0] = 0
    sizes[np.unique(parts[truth])] = 0
    return float(sizes.sum()) * voxel_ml


def scores(head: Head, answer: Callable[[str], Array | None]) -> dict[str, dict[str, float]]:
    """Structure -> Dice, volume ratio and stray millilitres, for the structures that the method answers.

    Args:
        head: the subject.
        answer: structure -> Boolean mask, None where the method does not know it.
    """
    voxel_ml = float(abs(np.linalg.det(head.volume.affine[:3, :3])) / 1000)
    records = {}
    for name, truth in head.truths().items():
        mask = answer(DRY.get(name, name))
        if mask is not None:
            records[name] = {
                "dice": round(dice(mask, truth), 4),
                "volume_ratio": round(float(mask.sum() / max(truth.sum(), 1)), 4),
                "stray_ml": round(stray(mask, truth, voxel_ml), 3),
            }
    return records


def confusion(head: Head, sided: Mapping[str, tuple[Array, Array]]) -> float | None:
    """Share of the voxels called right or left that lie in a manual label of the other side; None for a method without sides.

    Args:
        head: the subject.
        sided: structure -> masks of the right and of the left.
    """
    if not sided:
        return None
    sides = head.sides()
    wrong = sum(int((sides[right] == 2).sum() + (sides[left] == 1).sum()) for right, left in sided.values())
    known = sum(int((sides[right] > 0).sum() + (sides[left] > 0).sum()) for right, left in sided.values())
    return round(wrong / max(known, 1), 5)


Answer = dict[str, Any]
