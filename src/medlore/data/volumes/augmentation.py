"""Random changes of a training patch: where its voxels are taken from, and what their grey values look like.

Everything is drawn from one NumPy generator, so a patch is a function of its seed words. Our own, because a step of
training on one core leaves some tens of milliseconds for it: one resampling for rotation, size and elastic deformation
together, and one matrix an axis for blur and lost resolution together.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from medlore.data.volumes.geometry import Array, Shape

_NEGLIGIBLE = 1e-8
_SPLINE_DEVIATION = 0.34  # of a field of cubic B-splines whose coefficients have unit deviation


@dataclass(frozen=True)
class WarpRules:
    """Geometry of a patch.

    Args:
        probability: that a patch is warped at all.
        rotation_degrees: largest angle about each axis.
        scale: smallest and largest magnification, of the whole and once more (a third of it) of each axis.
        shear: largest shear of each axis along each other one.
        elastic_voxels: deviation of the elastic displacement is drawn from 0 to this.
        control_points: of the elastic field along each axis.
        bend_voxels: the same for a second, smoother field, which bends a head as a whole.
        bend_points: of that field along each axis.
        flip: the chance of a mirror image (left and right); only where every label with a side has a partner on the other.
    """

    probability: float = 0.8
    rotation_degrees: float = 12.0
    scale: tuple[float, float] = (0.85, 1.18)
    shear: float = 0.0
    elastic_voxels: float = 2.0
    control_points: int = 5
    bend_voxels: float = 0.0
    bend_points: int = 2
    flip: float = 0.5


@dataclass(frozen=True)
class GreyRules:
    """Grey values of a patch, in normalised units (deviation 1 over the volume).

    Args:
        gain: factor 1 +- this; every patch.
        shift: plus or minus this; every patch.
        gamma: smallest and largest exponent.
        gamma_probability: of an exponent other than 1.
        noise: largest deviation of white noise.
        noise_probability: of noise.
        bias: largest deviation of a smooth multiplicative field (MR only), in logarithms.
        bias_probability: of such a field.
        blur_voxels: largest deviation of a Gaussian blur along each axis.
        blur_probability: of a blur.
        slice_voxels: thickest slice along one axis.
        slice_probability: of thick slices.
        view_probability: of a field of view that ends within the patch.
    """

    gain: float = 0.2
    shift: float = 0.2
    gamma: tuple[float, float] = (0.7, 1.5)
    gamma_probability: float = 0.3
    noise: float = 0.15
    noise_probability: float = 0.25
    bias: float = 0.25
    bias_probability: float = 0.25
    blur_voxels: float = 1.0
    blur_probability: float = 0.2
    slice_voxels: float = 4.0
    slice_probability: float = 0.15
    view_probability: float = 0.1


# -- where voxels come from --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Places:
    """Where each voxel of a patch lies in its volume.

    Args:
        coordinates: 3 x y z float32 in voxels of the volume; None where the patch is left unwarped.
        mirrored: whether left and right are exchanged, and with them what labels with a side mean.
    """

    coordinates: Array | None
    mirrored: bool = False


def draw_places(centre: Sequence[float], size: Shape, rng: np.random.Generator, rules: WarpRules, *, flip: bool) -> Places:
    """Where each voxel of a patch lies in its volume.

    Args:
        centre: of the patch, in voxels of the volume.
        size: of the patch.
        rng: draws.
        rules: how far.
        flip: whether a mirror image is allowed.

    """
    warped, mirrored = rng.random() < rules.probability, bool(flip and rng.random() < rules.flip)
    if not warped and not mirrored:
        return Places(None)
    matrix = _draw_matrix(rng, rules) if warped else np.eye(3)
    if mirrored:
        matrix = matrix @ np.diag([-1.0, 1.0, 1.0])
    found = _affine_places(matrix, centre, size)
    for largest, points in ((rules.elastic_voxels, rules.control_points), (rules.bend_voxels, rules.bend_points)) if warped else ():
        if largest > 0:
            strength = np.float32(rng.uniform(0, largest))
            for axis in range(3):
                found[axis] += strength * smooth_field(rng, size, points)
    return Places(found, mirrored)


def _draw_matrix(rng: np.random.Generator, rules: WarpRules) -> Array:
    matrix = _rotation(np.deg2rad(rng.uniform(-1, 1, 3) * rules.rotation_degrees))
    low, high = np.log(rules.scale)
    matrix = matrix @ np.diag(np.exp(-rng.uniform(low, high) - rng.uniform(low, high, 3) / 3))
    if rules.shear > 0:
        matrix = matrix @ (np.eye(3) + (1 - np.eye(3)) * rng.uniform(-rules.shear, rules.shear, (3, 3)))
    return matrix


def _affine_places(matrix: Array, centre: Sequence[float], size: Shape) -> Array:
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2).reshape([-1 if a == i else 1 for a in range(3)]) for i, n in enumerate(size)]
    found = np.empty((3, *size), np.float32)
    for row in range(3):
        np.add(np.float32(matrix[row, 0]) * axes[0] + np.float32(centre[row]), np.float32(matrix[row, 1]) * axes[1], out=found[row])
        found[row] += np.float32(matrix[row, 2]) * axes[2]
    return found


def take(volume: Array, coordinates: Array, *, outside: float, nearest: bool) -> Array:
    """The values of a volume at coordinates.

    Args:
        volume: x y z; only the part that is needed is read.
        coordinates: 3 x y z, in voxels.
        outside: the value beyond the volume.
        nearest: for label codes; else linear interpolation, which fades to `outside` over the last voxel.

    Returns:
        x y z float32.
    """
    start, stop = [], []
    for row, size in zip(coordinates, volume.shape, strict=True):
        start.append(int(np.clip(np.floor(row.min()) - 1, 0, size - 1)))
        stop.append(int(np.clip(np.ceil(row.max()) + 2, start[-1] + 1, size)))
    part = np.asarray(volume[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))], np.float32) - np.float32(outside)
    grid = np.empty((*coordinates.shape[1:], 3), np.float32)
    for axis in range(3):  # grid_sample counts axes from the last; -1 and 1 are the outer faces of the first and last voxel
        width = np.float32(2 / part.shape[axis])
        np.multiply(coordinates[axis] + np.float32(0.5 - start[axis]), width, out=grid[..., 2 - axis])
    grid -= 1
    mode = "nearest" if nearest else "bilinear"
    found = F.grid_sample(
        torch.from_numpy(part)[None, None], torch.from_numpy(grid)[None], mode=mode, padding_mode="zeros", align_corners=False
    )
    return np.asarray(found[0, 0].numpy() + np.float32(outside))


def cut(volume: Array, start: Sequence[int], size: Shape, *, outside: float) -> Array:
    """A box of a volume that may reach beyond it (x y z, in the volume's type)."""
    found = np.full(size, outside, volume.dtype)
    here = [slice(max(a, 0), max(min(a + n, whole), 0)) for a, n, whole in zip(start, size, volume.shape, strict=True)]
    there = tuple(slice(h.start - a, h.stop - a) for h, a in zip(here, start, strict=True))
    if all(h.stop > h.start for h in here):
        found[there] = volume[tuple(here)]
    return found


def _rotation(angles: Array) -> Array:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[one, one] = step[two, two] = np.cos(angle)
        step[one, two], step[two, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ step
    return matrix


# -- fields and filters ------------------------------------------------------------------------------------------------


def smooth_field(rng: np.random.Generator, shape: Shape, control_points: int) -> Array:
    """A smooth random field of mean 0 and deviation about 1: cubic B-splines over a coarse grid (x y z float32).

    Args:
        rng: draws the coefficients.
        shape: of the field.
        control_points: along each axis, from 1; more makes it rougher.
    """
    values = rng.standard_normal((control_points + 3,) * 3, np.float32)
    return along_axes(values, [_spline_matrix(n, control_points) for n in shape]) * np.float32(1 / _SPLINE_DEVIATION)


def along_axes(array: Array, matrices: Sequence[Array | None]) -> Array:
    """A matrix (out x in) applied along each axis of x y z; None leaves an axis alone."""
    first, second, third = matrices
    if first is not None:
        array = (first @ array.reshape(array.shape[0], -1)).reshape(-1, *array.shape[1:])
    if second is not None:
        array = np.matmul(second, array)
    if third is not None:
        array = array @ third.T
    return array


def blur_matrix(size: int, sigma: float, step: float = 1.0, phase: float = 0.0) -> Array:
    """Gaussian blur, sampling at every `step` voxels, and linear interpolation back, as one matrix (size x size float32).

    Args:
        size: voxels along the axis.
        sigma: deviation of the Gaussian in voxels; 0 for none.
        step: distance of the samples in voxels; 1 for none lost.
        phase: where the first sample lies, as a share of the step.
    """
    at = np.arange(size, dtype=np.float64)
    samples = at if step <= 1 else np.arange(phase * step, size, step)
    matrix = np.exp(-0.5 * ((samples[:, None] - at[None]) / max(sigma, 1e-3)) ** 2) if sigma > 0 else _linear(samples, size)
    matrix /= matrix.sum(axis=1, keepdims=True)
    if step > 1:
        matrix = _linear((at - samples[0]) / step, len(samples)) @ matrix
    matrix[matrix < _NEGLIGIBLE] = 0  # numbers too small for float32 make a product ten times slower
    return np.asarray(matrix, np.float32)


def _linear(positions: Array, size: int) -> Array:
    at = np.clip(positions, 0, size - 1)
    return np.asarray(np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(size)[None])))


@functools.lru_cache(maxsize=64)
def _spline_matrix(size: int, control_points: int) -> Array:
    """Values of the `control_points` + 3 cubic B-splines at each voxel (size x control_points + 3)."""
    at = (np.arange(size) + 0.5) / size * control_points
    distance = np.abs(at[:, None] - (np.arange(control_points + 3) - 1)[None])
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, inner, outer).astype(np.float32)


# -- grey values -------------------------------------------------------------------------------------------------------


def change_greys(image: Array, rng: np.random.Generator, rules: GreyRules, *, air: float, bias: bool) -> Array:
    """Random gain, shift, gamma, bias field, blur, thick slices and noise of a normalised patch.

    Args:
        image: x y z float32; may be changed in place.
        rng: draws.
        rules: how far.
        air: the darkest value, which bias and gamma leave alone.
        bias: whether a bias field may be added (MR).

    Returns:
        x y z float32.
    """
    if bias and rng.random() < rules.bias_probability:
        field = np.exp(np.float32(rng.uniform(0, rules.bias)) * smooth_field(rng, _shape(image), 2))
        image = (image - np.float32(air)) * field + np.float32(air)
    if rng.random() < rules.gamma_probability:
        image = _gamma(image, float(np.exp(rng.uniform(*np.log(rules.gamma)))), air)
    image = along_axes(image, draw_resolution(rng, _shape(image), rules))
    if rng.random() < rules.noise_probability:
        image += np.float32(rng.uniform(0, rules.noise)) * rng.standard_normal(image.shape, np.float32)
    image *= np.float32(rng.uniform(1 - rules.gain, 1 + rules.gain))
    image += np.float32(rng.uniform(-rules.shift, rules.shift))
    return image


def draw_resolution(rng: np.random.Generator, shape: Shape, rules: GreyRules) -> list[Array | None]:
    """A matrix an axis for blur and thick slices, None where an axis stays sharp."""
    sigma = rng.uniform(0, rules.blur_voxels, 3) if rng.random() < rules.blur_probability else np.zeros(3)
    step = np.ones(3)
    if rng.random() < rules.slice_probability:
        axis = int(rng.integers(3))
        step[axis] = rng.uniform(1, rules.slice_voxels)
        sigma[axis] = max(sigma[axis], 0.4 * step[axis])
    return [blur_matrix(n, s, t, rng.random()) if s > 0.2 or t > 1 else None for n, s, t in zip(shape, sigma, step, strict=True)]


def draw_view(rng: np.random.Generator, shape: Shape) -> tuple[slice, slice, slice]:
    """A field of view that ends within the patch: a box of at least 40 percent of each axis."""
    slices = []
    for n in shape:
        width = int(rng.integers(int(0.4 * n), n + 1))
        start = int(rng.integers(0, n - width + 1))
        slices.append(slice(start, start + width))
    return slices[0], slices[1], slices[2]


def _gamma(image: Array, exponent: float, air: float) -> Array:
    top = max(float(image.max()), air + 1e-3)
    share = np.clip((image - np.float32(air)) / np.float32(top - air), 0, None)
    return np.asarray(share ** np.float32(exponent) * np.float32(top - air) + np.float32(air))


def _shape(array: Array) -> Shape:
    x, y, z = array.shape
    return x, y, z
