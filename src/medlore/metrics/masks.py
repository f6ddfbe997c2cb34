"""Dice and surface Dice of two masks, in mm, with the empty-mask rule stated.

Surface Dice counts surface *area*: each 2 x 2 x 2 neighbourhood of voxels is cut as in marching cubes and weighs as much as
the surface in it, so that thick slices and slanted surfaces count rightly. Both masks empty: 1. One of them empty: 0.

Source: Nikolov et al., "Clinically applicable segmentation of head and neck anatomy" (surface Dice); the areas are derived
here from the geometry of the cube.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from medlore.errors import InputError

Array = npt.NDArray[Any]
EMPTY_RULE = "both masks empty: 1; one of them empty: 0"

_CORNERS = tuple(itertools.product((0, 1), repeat=3))  # corner i is bit 7 - i of a neighbourhood's code
_EDGES = tuple((a, b) for a, b in itertools.combinations(range(8), 2) if (a ^ b) in (1, 2, 4))


def dice(pred: Array, truth: Array) -> float:
    """Twice the common voxels over the sum of both; 1 where both are empty, 0 where one is.

    Args:
        pred: Boolean, any shape.
        truth: Boolean, the same shape.

    Raises:
        InputError: shapes that differ.

    Examples:
        >>> a = np.zeros((20, 20, 10), bool); a[:10] = True
        >>> dice(a, np.roll(a, 1, axis=0))
        0.9
    """
    _check_shapes(pred, truth)
    total = np.count_nonzero(pred) + np.count_nonzero(truth)
    return 1.0 if total == 0 else float(2 * np.count_nonzero(pred & truth) / total)


def surface_dice(pred: Array, truth: Array, *, spacing_mm: Sequence[float], tolerance_mm: float = 1.0) -> float:
    """Share of both surfaces that lies within `tolerance_mm` of the other one; 1 where both are empty, 0 where one is.

    Args:
        pred: Boolean x y z.
        truth: Boolean, the same shape.
        spacing_mm: voxel edges.
        tolerance_mm: distance that counts as agreement, in mm.

    Raises:
        InputError: shapes that differ, not three axes, or a tolerance below 0.
    """
    _check_shapes(pred, truth)
    if pred.ndim != 3 or tolerance_mm < 0:
        raise InputError("surface_dice", f"{pred.ndim}D and {tolerance_mm} mm", "3D masks and a tolerance from 0", "correct them")
    if not pred.any() or not truth.any():
        return 1.0 if not pred.any() and not truth.any() else 0.0
    pred, truth = _cropped(pred, truth)
    areas = surface_areas((float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])))
    first, second = _codes(pred), _codes(truth)
    common = total = 0.0
    for mine, other in ((first, second), (second, first)):
        here, there = (mine > 0) & (mine < 255), (other > 0) & (other < 255)
        far = scipy.ndimage.distance_transform_edt(~there, sampling=spacing_mm)
        weights = areas[mine[here]]
        common += float(weights[far[here] <= tolerance_mm].sum())
        total += float(weights.sum())
    return common / total


@functools.lru_cache(maxsize=64)
def surface_areas(spacing_mm: tuple[float, float, float]) -> Array:
    """Area in mm² of the surface in a 2 x 2 x 2 neighbourhood, for each of its 256 codes.

    Where a face has two opposite corners inside, the rarer kind of corner of the cube is cut off alone; a polygon that is not
    flat is cut into the fan of triangles that is largest in the unit cube.
    """
    return np.array([sum(_polygon_area(loop, spacing_mm) for loop in _loops(code)) for code in range(256)])


def _check_shapes(pred: Array, truth: Array) -> None:
    if pred.shape != truth.shape:
        raise InputError("masks", f"shapes {pred.shape} and {truth.shape}", "two masks on one grid", "resample one of them")


def _cropped(pred: Array, truth: Array) -> tuple[Array, Array]:
    """Both masks in the box around either of them, with a rim of one empty voxel."""
    either = pred | truth
    seen = [np.flatnonzero(either.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    box = tuple(slice(int(s[0]), int(s[-1]) + 1) for s in seen)
    return np.pad(pred[box], 1), np.pad(truth[box], 1)


def _codes(mask: Array) -> Array:
    """Code of each 2 x 2 x 2 neighbourhood: 0 outside, 255 inside, the surface between."""
    small = mask.astype(np.uint8)
    shape = tuple(size - 1 for size in mask.shape)
    codes = np.zeros(shape, np.uint8)
    for bit, corner in enumerate(_CORNERS):
        codes |= small[tuple(slice(c, c + size) for c, size in zip(corner, shape, strict=True))] << np.uint8(7 - bit)
    return codes


def _faces() -> list[tuple[int, int, int, int]]:
    """The corners of each face, in the order of its rim."""
    faces = []
    for axis, side in itertools.product(range(3), (0, 1)):
        u, v = (a for a in range(3) if a != axis)
        rim = []
        for first, second in ((0, 0), (0, 1), (1, 1), (1, 0)):
            corner = [0, 0, 0]
            corner[axis], corner[u], corner[v] = side, first, second
            rim.append(_CORNERS.index((corner[0], corner[1], corner[2])))
        faces.append((rim[0], rim[1], rim[2], rim[3]))
    return faces


def _loops(code: int) -> list[list[Array]]:
    """The polygons that cut a cube: lists of edge midpoints, in units of the cube."""
    inside = [bool(code >> (7 - i) & 1) for i in range(8)]
    rarer = sum(inside) <= 4
    segments: list[tuple[int, int]] = []
    for face in _faces():
        edges = [_EDGES.index((min(a, b), max(a, b))) for a, b in zip(face, (*face[1:], face[0]), strict=True)]
        cut = [i for i in range(4) if inside[face[i]] != inside[face[(i + 1) % 4]]]
        if len(cut) == 2:
            segments.append((edges[cut[0]], edges[cut[1]]))
        elif len(cut) == 4:
            segments += [(edges[i - 1], edges[i]) for i in range(4) if inside[face[i]] == rarer]
    return [[(np.array(_CORNERS[a]) + np.array(_CORNERS[b])) / 2 for a, b in (_EDGES[e] for e in loop)] for loop in _chains(segments)]


def _chains(segments: list[tuple[int, int]]) -> list[list[int]]:
    """Closed chains of edges; each edge is in two segments."""
    left, chains = list(segments), []
    while left:
        chain = list(left.pop())
        while chain[-1] != chain[0]:
            following = next(s for s in left if chain[-1] in s)
            left.remove(following)
            chain.append(following[1] if following[0] == chain[-1] else following[0])
        chains.append(chain[:-1])
    return chains


def _polygon_area(points: list[Array], spacing_mm: Sequence[float]) -> float:
    apex = int(np.argmax(np.round([_fan(points, start) for start in range(len(points))], 9)))
    return _fan([point * np.asarray(spacing_mm) for point in points], apex)


def _fan(points: list[Array], start: int) -> float:
    p = points[start:] + points[:start]
    return sum(float(np.linalg.norm(np.cross(p[i] - p[0], p[i + 1] - p[0]))) / 2 for i in range(1, len(p) - 1))
