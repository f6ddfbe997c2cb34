"""Outlines of masks in a plane, as radiotherapy stores them, and the masks that lie in outlines.

An outline follows the half-way line between voxel centres inside and outside, so that it holds exactly the centres that the mask
holds and lies within half a voxel of the mask's border. Holes are joined to the outline around them by a channel of no width (the
"keyhole" of the DICOM standard), so that readers who fill, add or subtract outlines all see the hole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from medlore.data.volumes.geometry import Array
from medlore.extras import require

_HALF = 0.5


def outlines(mask: Array) -> Iterator[Array]:
    """The outlines of a mask, each a closed polygon whose first point is not repeated.

    Args:
        mask: i j, Boolean; voxel centres lie at whole numbers.

    Yields:
        n x 2 points (i, j), at least four.

    Raises:
        MissingExtraError: contourpy is not installed.

    Examples:
        >>> [polygon.tolist() for polygon in outlines(np.array([[True]]))]
        [[[-0.5, 0.0], [0.0, -0.5], [0.5, 0.0], [0.0, 0.5]]]
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    contourpy = require("contourpy", "RTSTRUCT")
    box = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    i, j = np.arange(box.shape[0]) + rows[0] - 1, np.arange(box.shape[1]) + columns[0] - 1
    made = contourpy.contour_generator(x=i, y=j, z=box.T.astype(np.float32), name="serial", fill_type="OuterOffset")
    for points, offsets in zip(*made.filled(_HALF, 2.0), strict=True):
        rings = [_corners(points[first : last - 1]) for first, last in itertools.pairwise(offsets)]
        yield _joined(rings)


def filled(polygons: Iterable[Array], shape: tuple[int, int]) -> Array:
    """The voxel centres that lie in an odd number of polygons.

    Args:
        polygons: n x 2 points (i, j) each, closed from the last point to the first.
        shape: of the plane.

    Returns:
        i j, Boolean.

    Examples:
        >>> filled([np.array([[-0.5, -0.5], [1.5, -0.5], [1.5, 0.5], [-0.5, 0.5]])], (3, 2)).astype(int).tolist()
        [[1, 0], [1, 0], [0, 0]]
    """
    crossed: Array = np.zeros((shape[0] + 1, shape[1]), np.int64)  # along each line j, where it crosses an edge
    for polygon in polygons:
        start, stop = polygon, np.roll(polygon, -1, axis=0)
        upward = start[:, 1] <= stop[:, 1]
        low, high = np.where(upward[:, None], start, stop), np.where(upward[:, None], stop, start)
        first = np.clip(np.ceil(low[:, 1]), 0, shape[1]).astype(
            np.int64
        )  # a line belongs to an edge that begins on it, not to one that ends
        last = np.clip(np.ceil(high[:, 1]), 0, shape[1]).astype(np.int64)
        counts = last - first
        edge = np.repeat(np.arange(len(polygon)), counts)
        j = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        share = (j - low[edge, 1]) / (high[edge, 1] - low[edge, 1])
        at = low[edge, 0] + share * (high[edge, 0] - low[edge, 0])
        np.add.at(crossed, (np.clip(np.ceil(at), 0, shape[0]).astype(np.int64), j), 1)
    return np.asarray(np.cumsum(crossed, axis=0)[:-1] % 2 == 1)


def _corners(ring: Array) -> Array:
    """A ring without the points in the middle of straight lines; coordinates are halves, so this is exact."""
    back, on = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[back[:, 0] * on[:, 1] != back[:, 1] * on[:, 0]])


def _joined(rings: list[Array]) -> Array:
    """One polygon of an outline and its holes.

    A channel leads from a point between two voxels along i to one between two voxels along j: such a line passes through no voxel
    centre (twice its slope would have to be even and odd), so that no centre lies on an edge.
    """
    from scipy.spatial import cKDTree

    whole, *holes = rings
    while holes:
        along_i = whole[:, 0] % 1 != 0
        own = np.flatnonzero(along_i)
        tree = cKDTree(whole[own])
        reach = [tree.query(hole[hole[:, 0] % 1 == 0]) for hole in holes]
        nearest = int(np.argmin([distance.min() for distance, _ in reach]))
        distance, partner = reach[nearest]
        hole, best = holes.pop(nearest), int(np.argmin(distance))
        at, begin = int(own[partner[best]]), int(np.flatnonzero(hole[:, 0] % 1 == 0)[best])
        around = np.concatenate([hole[begin:], hole[: begin + 1]])
        whole = np.concatenate([whole[: at + 1], around, whole[at:]])
    return whole
