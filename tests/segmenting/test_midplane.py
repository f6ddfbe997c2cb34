"""The plane between two halves: found where the halves are, moved to where the image mirrors itself, the same in any orientation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medlore.segmenting.midplane import Plane, midplane

Array = np.ndarray[Any, Any]
SHAPE = (52, 60, 48)
TILT = np.array([0.985, 0.12, -0.12])
NORMAL = -TILT / np.linalg.norm(TILT)  # to the left: small x


def scene(affine: Array) -> tuple[Array, Array, Array, Plane]:
    """A symmetric pattern in a ball, its two halves by the true plane, and that plane."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    centre = np.array([(n - 1) / 2 for n in SHAPE]) @ affine[:3, :3].T + affine[:3, 3]
    beside = np.abs((points - centre) @ NORMAL)
    along = (points - centre) @ np.cross(NORMAL, [0, 0, 1.0])
    image = 100 + 40 * np.sin(beside / 7) * np.cos(along / 9) + 30 * (np.abs(beside - 20) < 6)
    brain = np.linalg.norm(points - centre, axis=-1) < 60
    return image * brain, brain, (points - centre) @ NORMAL > 0, Plane((NORMAL[0], NORMAL[1], NORMAL[2]), float(NORMAL @ centre))


AFFINES = {
    "3 mm": np.diag([3.0, 3, 3, 1]),
    "flipped": np.array([[-3.0, 0, 0, 80], [0, -3, 0, 70], [0, 0, 3, -60], [0, 0, 0, 1]]),
    "axes exchanged": np.array([[0, 0, 3.0, -70], [3, 0, 0, -90], [0, 3, 0, -80], [0, 0, 0, 1]]),
    "thick slices": np.diag([2.5, 2.5, 4.0, 1]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_a_rough_split_comes_to_the_symmetry_of_the_image(name: str) -> None:
    affine = AFFINES[name]
    image, brain, left, truth = scene(affine)
    # the network's halves: blocks of 5 mm, shifted by 4 mm and wrong in places
    rough = Plane((-1.0, 0.0, 0.0), truth.offset + 4).left_of(SHAPE, affine)
    found = midplane(image, brain, brain & rough, brain & ~rough, affine)
    assert found is not None
    assert np.dot(found.normal, NORMAL) > np.cos(np.radians(1.0))
    wrong = (found.left_of(SHAPE, affine) != left)[brain].mean()
    assert wrong < 0.01 < (rough != left)[brain].mean()


def test_an_image_without_contrast_keeps_the_plane_of_the_halves() -> None:
    affine = AFFINES["3 mm"]
    _, brain, left, truth = scene(affine)
    found = midplane(np.full(SHAPE, 7.0), brain, brain & left, brain & ~left, affine)
    assert found is not None
    assert np.dot(found.normal, truth.normal) > np.cos(np.radians(1.5))
    assert found.offset == pytest.approx(truth.offset, abs=3.0)


def test_no_half_no_plane() -> None:
    image, brain, left, _ = scene(AFFINES["3 mm"])
    assert midplane(image, brain, brain & left, brain & False, AFFINES["3 mm"]) is None
    assert midplane(image, brain, brain, brain, AFFINES["3 mm"]) is None
