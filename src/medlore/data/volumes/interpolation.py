"""Linear interpolation along the axes of a grid: what each output position reads, with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Taps:
    """For each position on one axis: two neighbours and their weights (which add up to 1, or to less beyond a crop)."""

    lower: Array
    upper: Array
    lower_weight: Array
    upper_weight: Array

    def nearest(self) -> Array:
        """Index of the heavier neighbour; -1 where the crop's outside is heavier."""
        index = np.where(self.upper_weight > self.lower_weight, self.upper, self.lower)
        return np.where(np.maximum(self.lower_weight, self.upper_weight) >= 0.5, index, -1)

    def reached(self, first: int, last: int) -> slice:
        """The positions one of whose neighbours lies in `first:last`."""
        low = (self.lower >= first) & (self.lower < last) & (self.lower_weight > 0)
        found = np.flatnonzero(low | ((self.upper >= first) & (self.upper < last) & (self.upper_weight > 0)))
        return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)

    def read(self, part: slice) -> slice:
        """What is read for some positions."""
        return slice(int(self.lower[part].min()), int(self.upper[part].max()) + 1)

    def gather(self, values: Array, part: slice, *, axis: int) -> Array:
        """Some positions, interpolated along one axis of an array that begins with what is read first."""
        shape = tuple(-1 if a == axis % values.ndim else 1 for a in range(values.ndim))
        first = self.read(part).start
        lower = np.take(values, self.lower[part] - first, axis=axis)
        lower *= self.lower_weight[part].astype(np.float32).reshape(shape)
        if self.upper_weight[part].any():
            upper = np.take(values, self.upper[part] - first, axis=axis)
            upper *= self.upper_weight[part].astype(np.float32).reshape(shape)
            lower += upper
        return np.asarray(lower)


def linear_taps(positions: Array, size: int, *, start: int = 0, stop: int | None = None) -> Taps:
    """Linear interpolation at `positions` (in voxels) on an axis of `size` voxels, of which `start:stop` are at hand.

    Beyond the axis the last value goes on; inside the axis but beyond `start:stop` the value is 0. Indices count from `start`.
    """
    stop = size if stop is None else stop
    at = np.clip(positions, 0, size - 1)
    lower = np.minimum(np.floor(at), max(size - 2, 0)).astype(np.int64)
    weight = at - lower
    upper = np.minimum(lower + 1, size - 1)
    low_weight = np.where((lower >= start) & (lower < stop), 1 - weight, 0.0)
    high_weight = np.where((upper >= start) & (upper < stop), weight, 0.0)
    inside = stop - start - 1
    return Taps(np.clip(lower - start, 0, inside), np.clip(upper - start, 0, inside), low_weight, high_weight)


def resample_linear(array: Array, shape: Sequence[int], step: Sequence[float]) -> Array:
    """Separable linear interpolation, plane by plane along the slowest axis in memory.

    Args:
        array: x y z, any number type and any strides.
        shape: of the result.
        step: distance of neighbouring results, in voxels of `array`.

    Returns:
        float32 with the memory order of `array`. Besides the result only a few planes are held.
    """
    order = [int(a) for a in np.argsort([-abs(s) for s in array.strides], kind="stable")]
    source = array.transpose(order)
    result = np.empty([shape[a] for a in order], np.float32)
    outer, rows, columns = (linear_taps(np.arange(shape[a]) * step[a], array.shape[a]) for a in order)

    def fill(first: int, last: int) -> None:
        for k in range(first, last):
            plane = _mix(source[outer.lower[k]], source[outer.upper[k]], float(outer.upper_weight[k]))
            result[k] = _along_columns(_along_rows(plane, rows), columns)

    workers = min(4, cpu_count() or 1)
    edges = np.linspace(0, len(result), workers * 4 + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fill, edges[:-1], edges[1:]))
    return result.transpose(np.argsort(order))


def _mix(first: Array, second: Array, weight: float) -> Array:
    if weight == 0:
        return first.astype(np.float32)
    mixed = second.astype(np.float32)
    lower = first.astype(np.float32)
    mixed -= lower
    mixed *= np.float32(weight)
    mixed += lower
    return mixed


def _along_rows(plane: Array, taps: Taps) -> Array:
    if len(taps.lower) == len(plane) and not taps.upper_weight[:-1].any():
        return plane
    lower = plane[taps.lower]
    mixed = plane[taps.upper]
    mixed -= lower
    mixed *= taps.upper_weight.astype(np.float32)[:, None]
    mixed += lower
    return mixed


def _along_columns(plane: Array, taps: Taps) -> Array:
    if len(taps.lower) == plane.shape[1] and not taps.upper_weight[:-1].any():
        return plane
    lower = np.take(plane, taps.lower, axis=1)
    mixed = np.take(plane, taps.upper, axis=1)
    mixed -= lower
    mixed *= taps.upper_weight.astype(np.float32)
    mixed += lower
    return mixed
