"""Warps and grey changes: what they must leave alone, and what they must change."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medlore.data.volumes.augmentation import (
    GreyRules,
    WarpRules,
    along_axes,
    blur_matrix,
    change_greys,
    cut,
    draw_places,
    draw_view,
    smooth_field,
    take,
)

SHAPE = (18, 15, 13)


def volume() -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float16)


def identity(start: tuple[float, float, float], size: tuple[int, int, int]) -> np.ndarray:  # type: ignore[type-arg]
    return np.stack(np.meshgrid(*[np.arange(n) + a for n, a in zip(size, start, strict=True)], indexing="ij")).astype(np.float32)


@pytest.mark.parametrize("nearest", [True, False])
def test_taking_voxels_where_they_lie_changes_nothing(nearest: bool) -> None:
    array = volume()
    found = take(array, identity((3, 2, 1), (9, 8, 7)), outside=-5, nearest=nearest)
    np.testing.assert_allclose(found, array[3:12, 2:10, 1:8].astype(np.float32), atol=2e-5)


def test_codes_are_never_mixed() -> None:
    codes = np.random.default_rng(1).choice([0, 7, 531], SHAPE).astype(np.uint16)
    coordinates = draw_places((9, 7, 6), (12, 12, 12), np.random.default_rng(2), WarpRules(probability=1), flip=True).coordinates
    assert coordinates is not None
    assert set(np.unique(take(codes, coordinates, outside=0, nearest=True))) <= {0.0, 7.0, 531.0}


def test_beyond_the_volume_lies_air() -> None:
    found = take(volume(), identity((-4, 0, 0), (8, 5, 5)), outside=-3.5, nearest=False)
    assert (found[:4] == -3.5).all()
    assert np.allclose(found[4:], volume()[:4, :5, :5].astype(np.float32), atol=2e-5)
    far = take(volume(), identity((100, 100, 100), (3, 3, 3)), outside=-3.5, nearest=False)
    assert (far == -3.5).all()


def test_a_cut_reaches_beyond_the_volume() -> None:
    array = volume()
    found = cut(array, (-2, 10, 3), (6, 9, 4), outside=-1)
    assert np.array_equal(found[2:, :5], array[:4, 10:15, 3:7])
    assert (found[:2] == -1).all()
    assert (found[:, 5:] == -1).all()
    assert (cut(array, (40, 0, 0), (3, 3, 3), outside=7) == 7).all()


def test_a_warp_turns_and_resizes_about_the_centre() -> None:
    rules = WarpRules(probability=1, rotation_degrees=20, scale=(0.8, 1.2), elastic_voxels=0)
    centre = np.array([20.0, 30.0, 40.0])
    for seed in range(5):
        found = draw_places(centre, (11, 11, 11), np.random.default_rng(seed), rules, flip=False).coordinates
        assert found is not None
        np.testing.assert_allclose(found[:, 5, 5, 5], centre, atol=1e-4)
        edge = np.linalg.norm(found[:, 6, 5, 5] - found[:, 5, 5, 5])
        assert 1 / 1.2**1.34 - 1e-3 < edge < 1 / 0.8**1.34 + 1e-3
        assert edge != pytest.approx(1, abs=1e-4)


def test_mirror_images_are_mirrored_along_x_only_where_allowed() -> None:
    rules = WarpRules(probability=0, flip=1)
    found = draw_places((5, 5, 5), (5, 5, 5), np.random.default_rng(0), rules, flip=True).coordinates
    assert found is not None
    assert found[0, :, 0, 0].tolist() == [7, 6, 5, 4, 3]
    assert found[1, 0, :, 0].tolist() == [3, 4, 5, 6, 7]
    assert draw_places((5, 5, 5), (5, 5, 5), np.random.default_rng(0), rules, flip=False).coordinates is None


def test_smooth_fields_are_smooth_with_unit_deviation() -> None:
    fields = np.stack([smooth_field(np.random.default_rng(seed), (24, 20, 16), 5) for seed in range(40)])
    assert fields.std() == pytest.approx(1, abs=0.15)
    assert abs(fields.mean()) < 0.1
    assert np.abs(np.diff(fields, axis=1)).mean() < 0.3 * np.abs(np.diff(fields[:, ::6], axis=1)).mean()


@pytest.mark.parametrize(("sigma", "step"), [(0.0, 1.0), (1.2, 1.0), (0.0, 3.3), (1.5, 4.0)])
def test_blur_keeps_constants_and_removes_detail(sigma: float, step: float) -> None:
    matrix = blur_matrix(17, sigma, step, 0.3)
    np.testing.assert_allclose(matrix @ np.ones(17), 1, atol=1e-5)
    alternating = np.resize([1.0, -1.0], 17)
    assert np.abs((matrix @ alternating)[2:-2]).max() < (1.01 if sigma == 0 else 0.2)


def test_matrices_work_along_their_own_axis() -> None:
    array = np.random.default_rng(3).normal(size=(4, 5, 6)).astype(np.float32)
    first, second, third = (np.random.default_rng(n).normal(size=(3, n)).astype(np.float32) for n in (4, 5, 6))
    expected = np.einsum("ax,by,cz,xyz->abc", first, second, third, array)
    np.testing.assert_allclose(along_axes(array, [first, second, third]), expected, rtol=1e-4, atol=1e-4)
    assert along_axes(array, [None, None, None]) is array


def test_grey_changes_are_finite_small_and_repeat() -> None:
    rules = GreyRules(gamma_probability=1, noise_probability=1, bias_probability=1, blur_probability=1, slice_probability=1)
    image = np.random.default_rng(4).normal(size=(20, 20, 20)).astype(np.float32)
    one, two, other = (change_greys(image.copy(), np.random.default_rng(seed), rules, air=-3.0, bias=True) for seed in (5, 5, 6))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.isfinite(one).all()
    assert one.dtype == np.float32
    assert abs(one.mean() - image.mean()) < 1.5


def test_views_are_inside_and_wide_enough() -> None:
    for seed in range(50):
        for part, n in zip(draw_view(np.random.default_rng(seed), SHAPE), SHAPE, strict=True):
            assert 0 <= part.start < part.stop <= n
            assert part.stop - part.start >= int(0.4 * n)


def test_strong_deformation_keeps_volumes_in_the_mean_and_never_tears() -> None:
    """Bent and rotated by several voxels, a ball keeps its volume over many draws (nearly), stays in one piece, and has no hole."""
    at = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"))
    ball = (np.linalg.norm(at - 19.5, axis=0) < 9).astype(np.uint8)
    rules = WarpRules(probability=1, rotation_degrees=20, scale=(1, 1), shear=0.08, elastic_voxels=2.5, bend_voxels=3.0)
    volumes, moved = [], []
    for seed in range(40):
        places = draw_places((19.5, 19.5, 19.5), (40, 40, 40), np.random.default_rng(seed), rules, flip=False)
        assert places.coordinates is not None
        found = take(ball, places.coordinates, outside=0, nearest=True) > 0
        parts, count = ndimage.label(found)
        assert np.bincount(parts.reshape(-1))[1:].max() > 0.98 * found.sum(), count
        assert (ndimage.binary_fill_holes(found) & ~found).sum() < 0.02 * found.sum()
        volumes.append(found.sum() / ball.sum())
        moved.append((found != (ball > 0)).sum() / ball.sum())
    assert np.mean(volumes) == pytest.approx(1, abs=0.08)  # 0.954 over 150 draws, with an error of 0.015
    assert np.mean(moved) > 0.2  # and it is a deformation indeed
