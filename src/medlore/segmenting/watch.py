"""What is kept of the probabilities while the windows go by: the entropy along borders, and the maps that a user asked for.

Maps are held on the network's grid, one byte a voxel, and brought to the image's grid one at a time when they are written, so that the plan
of the memory knows them. A slab is gone through a few rows at a time: nothing here is as large as the slab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.geometry import Array, GridPath, Shape
from medlore.data.volumes.preparation import PackedMasks

_ROWS = 8  # at a time
LEVELS = 255  # of a byte, for a share from 0 to 1


@dataclass(frozen=True)
class Keeping:
    """What is to be kept.

    Args:
        entropy: of the borders, for the verdict.
        masks: on the network's grid, to be compared with other looks at the image.
        probabilities: of every label.
        uncertainty: the entropy of every voxel.
    """

    entropy: bool = False
    masks: bool = False
    probabilities: bool = False
    uncertainty: bool = False

    def bytes_per_voxel(self, labels: int) -> float:
        """On the network's grid."""
        return labels * self.probabilities + self.uncertainty + labels * self.masks / 8


class ProbabilityWatch:
    """Takes finished slabs and keeps what was asked for.

    Args:
        labels: that a user asked for; others are not kept.
        shape: of the network's grid within the crop.
        keeping: what is to be kept.
        threshold: above which a voxel belongs to a label.
    """

    def __init__(self, labels: Sequence[str], shape: Shape, keeping: Keeping, *, threshold: float = 0.5) -> None:
        self.labels, self.shape, self.keeping = tuple(labels), shape, keeping
        self.probabilities = {label: np.zeros(shape, np.uint8) for label in labels} if keeping.probabilities else {}
        self.uncertainty: Array | None = np.zeros(shape, np.uint8) if keeping.uncertainty else None
        self.masks = PackedMasks(shape, len(self.labels)) if keeping.masks else None
        self._threshold = threshold
        self._sums = np.zeros((len(self.labels), 2))  # entropy in bits, voxels

    def entropies(self) -> dict[str, float]:
        """Label -> mean entropy of its border, in bits, where it has one."""
        return {label: float(total / count) for label, (total, count) in zip(self.labels, self._sums, strict=True) if count}

    def keep(self, group: Sequence[str], start: int, probability: Tensor) -> None:
        """Take the finished rows from `start` on (q rows y z) of a group of labels."""
        for index, label in enumerate(group):
            if label in self.labels:
                self._keep(label, start, probability[index].cpu())

    def _keep(self, label: str, start: int, slab: Tensor) -> None:
        place = self.labels.index(label)
        for first in range(0, len(slab), _ROWS):
            last = min(first + _ROWS, len(slab))
            rows = slice(start + first, start + last)
            part = slab[first:last]
            if self.keeping.probabilities:
                self.probabilities[label][rows] = _levels(part)
            if self.uncertainty is not None:
                levels = _levels(torch.from_numpy(entropy_bits(part.float().numpy())))
                np.maximum(self.uncertainty[rows], levels, out=self.uncertainty[rows])
            above = (part > self._threshold).numpy()
            if not above.any():
                continue
            if self.masks is not None:
                self.masks.set_planes(place, rows.start, (slice(0, self.shape[1]), slice(0, self.shape[2])), above)
            if self.keeping.entropy:
                self._sums[place] += _border_sums(slab, first, last, self._threshold)


def entropy_bits(probability: Array) -> Array:
    """Entropy of a yes or no, in bits.

    Examples:
        >>> entropy_bits(np.array([0.0, 0.5, 1.0], np.float32)).tolist()
        [0.0, 1.0, 0.0]
    """
    p = np.clip(np.asarray(probability, np.float32), 1e-6, 1 - 1e-6)
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return np.asarray(np.where((probability <= 1e-6) | (probability >= 1 - 1e-6), np.float32(0), bits))


def planes_on(values: Array, path: GridPath, most: int = 16) -> Iterator[tuple[slice, Array]]:
    """A byte map of the network's grid, interpolated to the frame of the output: some planes at a time, as bytes.

    Args:
        values: x y z, on the network's grid within the crop; beyond it is 0.
        path: from the output grid to the network's.
        most: planes at a time.
    """
    x, y, z = (path.taps(axis) for axis in range(3))
    whole = [slice(0, n) for n in path.resampling.shape]
    for first in range(0, whole[0].stop, most):
        planes = slice(first, min(first + most, whole[0].stop))
        part = values[x.read(planes), y.read(whole[1]), z.read(whole[2])].astype(np.float32)
        for axis, (taps, kept) in enumerate(zip((x, y, z), (planes, whole[1], whole[2]), strict=True)):
            part = taps.gather(part, kept, axis=axis)
        yield planes, np.rint(part).astype(np.uint8)


def _levels(share: Tensor) -> Array:
    return np.asarray(np.rint(share.float().numpy() * LEVELS), np.uint8)


def _border_sums(slab: Tensor, first: int, last: int, threshold: float) -> tuple[float, int]:
    """Sum of entropies and number of the voxels of a mask that touch its outside (6 neighbours), in some rows of a slab.

    What lies beyond the slab or the volume counts as inside: a mask has no border there that could be seen.
    """
    low, high = max(first - 1, 0), min(last + 1, len(slab))
    mask = (slab[low:high] > threshold).numpy()
    padded = np.pad(mask, 1, mode="edge")
    centre = padded[1:-1, 1:-1, 1:-1]
    within = centre.copy()
    for axis in range(3):
        for step in (0, 2):
            box = tuple(slice(step, step + n) if a == axis else slice(1, 1 + n) for a, n in enumerate(mask.shape))
            within &= padded[box]
    border = (centre & ~within)[first - low : last - low]
    at = np.nonzero(border)
    return float(entropy_bits(slab[first:last].float().numpy()[at]).sum(dtype=np.float64)), len(at[0])
