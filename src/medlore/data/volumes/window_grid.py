"""Where the windows lie: plain arithmetic, so that a plan needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from medlore.errors import InputError

Start = tuple[int, int, int]


@dataclass(frozen=True)
class WindowGrid:
    """Where the windows lie.

    Args:
        shape: x y z of the volume.
        roi_size: x y z of a window; a volume that is smaller is padded at its end.
        overlap: share of a window that its neighbour covers too, 0 to below 1.
    """

    shape: tuple[int, int, int]
    roi_size: tuple[int, int, int]
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise InputError("overlap", f"got {self.overlap}", "a share from 0 to below 1", "give --overlap 0.5")
        if min(self.roi_size) < 1 or min(self.shape) < 1:
            raise InputError("roi_size", f"{self.roi_size} on a volume of {self.shape}", "whole numbers from 1", "check the sizes")

    def starts(self, axis: int) -> list[int]:
        """First voxels of the windows along one axis; the last one is moved back so that it ends with the volume.

        Example:
            >>> grid = WindowGrid((400, 350, 200), (288, 288, 96))
            >>> grid.starts(0), grid.starts(1), grid.starts(2)
            ([0, 112], [0, 62], [0, 48, 96, 104])
        """
        size, roi = self.shape[axis], self.roi_size[axis]
        step = max(int(roi * (1 - self.overlap)), 1)
        count = max(math.ceil((size - roi) / step) + 1, 1)
        return [max(min(i * step, size - roi), 0) for i in range(count)]

    def windows(self) -> list[Start]:
        """All starts, x outermost."""
        x, y, z = (self.starts(axis) for axis in range(3))
        return list(product(x, y, z))
