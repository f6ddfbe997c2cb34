"""The plane between the halves of a brain: begun where a coarse network tells them apart, refined by the symmetry of the image.

A network at 5 mm puts one voxel in twenty to fifty on the wrong side; the plane through its halves, turned and shifted until the image
equals its own mirror image best, one in 150 to 300 (`python -m benchmarks.development_heads finder`, docs/evidence.md).

Source: the symmetry of the grey values as the measure of a mid-sagittal plane, after Ardekani et al., "Automatic detection of the
mid-sagittal plane in 3-D brain images", IEEE Transactions on Medical Imaging 16 (1997).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from medlore.data.volumes.geometry import Array, Crop, spacing_of

_POINTS = 6000  # of each half
_UNIT_MM = 50.0  # about the radius of a brain: coordinates are of the order of one
_RIDGE = 1e-2
_STEPS = 25  # of Newton's method
_COARSE_MM = 3.0  # distance of the voxels that are mirrored
_BLUR_MM = 2.0
_TURN, _SHIFT_MM = 0.05, 3.0  # first steps of the refinement: radians, millimetres
_EVALUATIONS = 120
_PLANE_MM = 4.0  # grid on which the plane of a mask is looked for
_TURNS = (0.0, -5.0, 5.0, -10.0, 10.0, -15.0, 15.0)  # degrees about the long and the vertical axis; of equal ones the first is kept
_SHIFTS = (0.0, -3.0, 3.0, -6.0, 6.0, -9.0, 9.0)  # mm from the centre


@dataclass(frozen=True)
class Plane:
    """The points p (mm, patient coordinates) with `normal` · p = `offset`; the normal, of length 1, shows to the left half."""

    normal: tuple[float, float, float]
    offset: float

    def is_left(self, places: Array) -> Array:
        """Whether places (n 3, mm) lie on the left side."""
        return np.asarray(places @ np.asarray(self.normal) > self.offset)

    def left_of(self, shape: tuple[int, int, int], affine: Array) -> Array:
        """Which voxels of a grid lie on the left side: Boolean x y z."""
        steps = np.asarray(self.normal) @ affine[:3, :3]
        start = float(np.asarray(self.normal) @ affine[:3, 3]) - self.offset
        x, y, z = (np.arange(n) * float(step) for n, step in zip(shape, steps, strict=True))
        return np.asarray((x[:, None] + y)[..., None] + z + start > 0)


def midplane(image: Array, brain: Array, left: Array, right: Array, affine: Array) -> Plane | None:
    """The plane between two halves.

    Args:
        image: grey values, x y z.
        brain: Boolean x y z; only what lies in it is mirrored.
        left: Boolean x y z, what was taken for the left half; it may overlap with the right one, or leave voxels out.
        right: likewise.
        affine: 4 x 4, from voxels to millimetres.

    Returns:
        The plane; None where a half has no voxel of its own.
    """
    affine = np.asarray(affine, float)
    rng = np.random.default_rng(0)
    sides = [_some_points(half, affine, rng) for half in (left & ~right, right & ~left)]
    if not all(len(points) for points in sides):
        return None
    begun = _between(*sides)
    grey = np.asarray(image, np.float32)
    return _refined(begun, grey * brain, brain, affine) if brain.any() and np.ptp(grey[brain]) > 0 else begun


def midplane_of_mask(crop: Crop, mask: Array, affine: Array) -> Plane:
    """The plane in which a brain is most like its mirror image, near the patient's mid plane, where only its mask is known.

    Turned by up to 15 degrees about the long and the vertical axis and moved by up to 9 mm from the centre; the best of a coarse search.

    Args:
        crop: where the mask lies in the image.
        mask: Boolean x y z.
        affine: of the image.
    """
    step = [max(round(_PLANE_MM / float(mm)), 1) for mm in spacing_of(affine)]
    thinned = np.ascontiguousarray(mask[tuple(slice(s // 2 if n > s // 2 else 0, None, s) for n, s in zip(mask.shape, step, strict=True))])
    coarse = np.asarray(affine, float) @ np.diag([*step, 1.0])
    first = [a + (s // 2 if n > s // 2 else 0) for a, s, n in zip(crop.start, step, mask.shape, strict=True)]
    coarse[:3, 3] = _in_mm(np.asarray(first, float), np.asarray(affine, float))
    places = _in_mm(np.argwhere(thinned), coarse)
    if not len(places):
        return Plane((-1.0, 0.0, 0.0), 0.0)
    centre, back = places.mean(axis=0), np.linalg.inv(coarse)
    best, plane = -1, Plane((-1.0, 0.0, 0.0), -float(centre[0]))
    for yaw, roll in itertools.product(_TURNS, _TURNS):
        normal = -np.array([1.0, np.tan(np.radians(yaw)), np.tan(np.radians(roll))])
        normal /= np.linalg.norm(normal)
        away = places @ normal
        for shift in _SHIFTS:
            offset = float(centre @ normal) - shift
            mirrored = places - 2 * (away - offset)[:, None] * normal
            at = np.rint(_in_mm(mirrored, back)).astype(np.int64)
            inside = ((at >= 0) & (at < thinned.shape)).all(axis=1)
            agree = int(np.count_nonzero(thinned[tuple(at[inside].T)]))
            if agree > best:
                best, plane = agree, _plane(normal, offset)
    return plane


def _some_points(mask: Array, affine: Array, rng: np.random.Generator) -> Array:
    """Places of at most `_POINTS` voxels, n x 3, mm."""
    places = np.flatnonzero(mask)
    if len(places) > _POINTS:
        places = rng.choice(places, _POINTS, replace=False)
    return _in_mm(np.stack(np.unravel_index(places, mask.shape), axis=1), affine)


def _in_mm(index: Array, affine: Array) -> Array:
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def _between(left: Array, right: Array) -> Plane:
    """Logistic regression of the side on the place, slightly regularised, by Newton's method."""
    centre = (left.mean(0) + right.mean(0)) / 2
    points = (np.concatenate([left, right]) - centre) / _UNIT_MM
    design = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    truth = np.repeat([1.0, 0.0], [len(left), len(right)])
    weights = np.zeros(4)
    for _ in range(_STEPS):
        share = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (share - truth) + _RIDGE * weights
        curvature = (design * (share * (1 - share))[:, None]).T @ design + _RIDGE * np.eye(4)
        weights = weights - np.linalg.solve(curvature, gradient)
    length = float(np.linalg.norm(weights[:3]))
    normal = weights[:3] / length
    return _plane(normal, float(normal @ centre) - _UNIT_MM * float(weights[3]) / length)


def _refined(begun: Plane, image: Array, brain: Array, affine: Array) -> Plane:
    """The plane near `begun` across which the image is most like itself: highest correlation of grey values with their mirror images."""
    spacing = spacing_of(affine)
    smooth = scipy.ndimage.gaussian_filter(image, [_BLUR_MM / float(mm) for mm in spacing])
    step = [max(1, round(_COARSE_MM / float(mm))) for mm in spacing]
    index = np.argwhere(brain[tuple(slice(None, None, s) for s in step)]) * step
    points, back = _in_mm(index, affine), np.linalg.inv(affine)
    values = scipy.ndimage.map_coordinates(smooth, index.T, order=1)
    first = np.asarray(begun.normal)
    up = np.eye(3)[int(np.argmin(np.abs(first)))]
    across = np.cross(first, up) / np.linalg.norm(np.cross(first, up))
    down = np.cross(first, across)
    centre = points.mean(0)
    place = centre - (float(first @ centre) - begun.offset) * first  # the point of the plane below the centre

    def at(change: Any) -> Plane:
        normal = first + change[0] * across + change[1] * down
        normal = normal / np.linalg.norm(normal)
        return _plane(normal, float(normal @ place) + float(change[2]))

    def unlike(change: Any) -> float:
        plane = at(change)
        normal = np.asarray(plane.normal)
        mirrored = points - 2 * (points @ normal - plane.offset)[:, None] * normal
        there = scipy.ndimage.map_coordinates(smooth, _in_mm(mirrored, back).T, order=1)
        return -float(np.corrcoef(values, there)[0, 1]) if np.ptp(there) > 0 else 1.0

    simplex = np.vstack([np.zeros(3), np.diag([_TURN, _TURN, _SHIFT_MM])])
    options = {"initial_simplex": simplex, "maxfev": _EVALUATIONS, "xatol": 1e-3, "fatol": 1e-5}
    return at(scipy.optimize.minimize(unlike, np.zeros(3), method="Nelder-Mead", options=options).x)


def _plane(normal: Array, offset: float) -> Plane:
    x, y, z = (float(v) for v in normal)
    return Plane((x, y, z), offset)
