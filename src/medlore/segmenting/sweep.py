"""Along which axis the windows go through a volume, and its grids in that order (no torch of its own)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from medlore.data.volumes.geometry import Crop, GridPath, Reorientation, Resampling, Shape

if TYPE_CHECKING:
    from medlore.data.volumes.preparation import Prepared

T = TypeVar("T")


def sweep_axis(shape: Shape, roi_size: Shape) -> int:
    """Along which axis of the network's grid the windows go: x, unless another is longer and leaves less than half of its rows open.

    So memory stays flat along the longest axis, whichever it is, and volumes of usual sides keep their results to the last bit: the
    order of the windows decides how sums in half precision are rounded.

    Example:
        >>> sweep_axis((400, 400, 150), (288, 288, 96)), sweep_axis((300, 300, 900), (288, 288, 96))
        (0, 2)
    """
    longest = max(range(3), key=lambda axis: shape[axis])  # the first of equal ones
    return longest if 2 * open_rows(shape, roi_size, longest) < open_rows(shape, roi_size, 0) else 0


def open_rows(shape: Shape, roi_size: Shape, axis: int) -> int:
    """Voxels of the rows that are open at a time when the windows go along an axis."""
    return math.prod(shape) // shape[axis] * min(roi_size[axis], shape[axis])


def axis_order(axis: int) -> Shape:
    """The axes in the order in which they are gone through: `axis` first.

    Example:
        >>> axis_order(0), axis_order(2)
        ((0, 1, 2), (2, 0, 1))
    """
    first, second = (other for other in range(3) if other != axis)
    return axis, first, second


def path_in_order(path: GridPath, order: Shape) -> GridPath:
    """The same way with the axes of all grids but the file's in another order: new axis `i` is axis `order[i]`."""
    turn, change, crop = path.reorientation, path.resampling, path.crop
    return GridPath(
        path.affine,
        Reorientation(_sorted(turn.axes, order), _sorted(turn.flips, order), turn.shape),
        Resampling(_sorted(change.shape, order), _sorted(change.new_shape, order), _sorted(change.step, order)),
        Crop(_sorted(crop.start, order), _sorted(crop.stop, order)),
    )


def prepared_in_order(prepared: Prepared, order: Shape) -> Prepared:
    """Views of a prepared volume with its axes in another order."""
    pixels = prepared.pixels.permute(0, *(1 + axis for axis in order))
    body = None if prepared.body is None else prepared.body.transpose(order)
    return replace(prepared, pixels=pixels, body=body, path=path_in_order(prepared.path, order))


def _sorted(values: Sequence[T], order: Shape) -> tuple[T, T, T]:
    x, y, z = order
    return values[x], values[y], values[z]
