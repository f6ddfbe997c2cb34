"""Grids: forward and back is the identity, and resampling is SimpleITK's and MONAI's."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medlore.data.volumes.geometry import (
    ORIENTATION_CODES,
    Crop,
    bounding_box,
    check_affine,
    orientation_of,
    reorientation_to,
    resampling_to,
    shear_degrees,
    spacing_of,
)
from medlore.data.volumes.interpolation import linear_taps, resample_linear
from medlore.errors import DataError, UnknownNameError


def affine_of(code: str, spacing=(1.0, 1.0, 1.0), angles=(0.0, 0.0, 0.0), origin=(0.0, 0.0, 0.0)) -> np.ndarray:
    """An affine with the given orientation, rotated by small angles (degrees)."""
    ornt = nib.orientations.axcodes2ornt(code)
    matrix = np.zeros((3, 3))
    for axis, (to, sign) in enumerate(ornt):
        matrix[int(to), axis] = sign
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ matrix @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def test_there_are_48_codes() -> None:
    assert len(set(ORIENTATION_CODES)) == 48
    assert {"RAS", "LPS", "ASR", "IPL", "PSR", "LIA"} <= set(ORIENTATION_CODES)


@pytest.mark.parametrize("code", ORIENTATION_CODES)
def test_reorientation_keeps_every_voxel_in_its_place(code: str) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 4, 5))
    affine = affine_of(code, (0.7, 2.0, 3.5), (7, -11, 5), (10, -20, 30))
    for target in ("RAS", "ASR", "LPI"):
        turn = reorientation_to(target, affine, array.shape)
        new, new_affine = turn.apply(array), turn.apply_to_affine(affine)
        assert orientation_of(new_affine) == target
        assert np.array_equal(turn.undo(new), array)
        for index in ((0, 0, 0), (2, 1, 4)):
            place = affine @ [*index, 1]
            there = np.rint(np.linalg.solve(new_affine, place)[:3]).astype(int)
            assert new[tuple(there)] == array[index]
            assert np.allclose(new_affine @ [*there, 1], place)


@settings(max_examples=60, deadline=None)
@given(
    code=st.sampled_from(ORIENTATION_CODES),
    target=st.sampled_from(("RAS", "ASR", "IPL", "LPS")),
    spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    wanted=st.tuples(*[st.floats(0.5, 4.0)] * 3),
    angles=st.tuples(*[st.floats(-20, 20)] * 3),
    shape=st.tuples(*[st.integers(1, 12)] * 3),
)
def test_resampled_grid_starts_and_ends_where_the_volume_does(code, target, spacing, wanted, angles, shape) -> None:
    affine = affine_of(code, spacing, angles, (1, 2, 3))
    turn = reorientation_to(target, affine, shape)
    oriented = turn.apply_to_affine(affine)
    change = resampling_to(wanted, oriented, turn.new_shape)
    new = change.apply_to_affine(oriented)
    assert np.allclose(new[:3, 3], oriented[:3, 3])  # first centres coincide
    assert np.allclose(spacing_of(new), wanted, rtol=2e-3)
    last = np.linalg.solve(oriented, new @ [*(np.array(change.new_shape) - 1), 1])[:3]
    overshoot = (last - (np.array(turn.new_shape) - 1)) * spacing_of(oriented)
    assert (np.abs(overshoot) <= np.array(wanted) / 2 + 0.02).all()


def test_resampling_equals_simpleitk_exactly() -> None:
    import SimpleITK

    rng = np.random.default_rng(1)
    for shape, spacing in (((31, 22, 17), (0.8, 0.8, 2.5)), ((9, 30, 40), (3.0, 0.7, 1.1))):
        array = rng.integers(-1000, 1500, shape).astype(np.int16)
        change = resampling_to((1, 1, 3), np.diag([*spacing, 1]), shape)
        image = SimpleITK.GetImageFromArray(array.T)
        image.SetSpacing(spacing)
        resample = SimpleITK.ResampleImageFilter()
        resample.SetOutputSpacing((1, 1, 3))
        resample.SetSize([int(n) for n in change.new_shape])
        resample.SetInterpolator(SimpleITK.sitkLinear)
        resample.SetOutputPixelType(SimpleITK.sitkFloat32)
        theirs = SimpleITK.GetArrayFromImage(resample.Execute(image)).T
        # beyond the last centre SimpleITK still gives the border value for half a voxel, as we do
        assert np.allclose(change.apply(array), theirs, atol=2e-3)


@pytest.mark.parametrize("code", ["RAS", "LPS", "PSR", "LIA"])
def test_grid_and_values_equal_monais_spacing(code: str) -> None:
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing

    rng = np.random.default_rng(2)
    array = rng.normal(size=(21, 18, 13)).astype(np.float32) * 300
    affine = affine_of(code, (0.8, 1.3, 2.5), (4, -7, 10), (5, 6, 7))
    turn = reorientation_to("RAS", affine, array.shape)
    oriented = turn.apply_to_affine(affine)
    change = resampling_to((1, 1, 3), oriented, turn.new_shape)
    ours = change.apply(turn.apply(array))
    theirs = Spacing(pixdim=(1, 1, 3), mode="bilinear")(
        Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(MetaTensor(array[None], affine=affine))
    )
    assert theirs.shape[1:] == ours.shape
    assert np.allclose(theirs.affine.numpy(), change.apply_to_affine(oriented), atol=1e-4)
    assert np.abs(theirs[0].numpy() - ours).max() < 0.05  # MONAI works in float32 coordinates: 1e-4 of the range


def test_half_steps_round_to_even() -> None:
    assert resampling_to((1, 1, 3), affine_of("ASR", (0.8, 2.5, 0.8)), (50, 24, 60)).new_shape == (40, 58, 17)


def test_a_grid_that_is_already_right_is_left_alone() -> None:
    change = resampling_to((1, 1, 3), np.diag([1.0003, 0.9998, 3, 1]), (10, 11, 12))
    assert not change.changes
    assert change.new_shape == (10, 11, 12)


def test_resampling_keeps_the_memory_order_and_any_number_type() -> None:
    array = np.asfortranarray(np.arange(60, dtype=">i2").reshape(3, 4, 5))
    result = resample_linear(array, (5, 4, 5), (0.5, 1, 1))
    assert result.dtype == np.float32
    assert result.flags.f_contiguous
    assert np.allclose(result[:, 0, 0], [0, 10, 20, 30, 40])


def test_taps_are_zero_beyond_a_crop_and_last_value_beyond_the_axis() -> None:
    taps = linear_taps(np.array([0.0, 1.5, 2.0, 4.25]), 4, start=0, stop=2)
    assert np.allclose(taps.lower_weight + taps.upper_weight, [1, 0.5, 0, 0])
    taps = linear_taps(np.array([3.4]), 4)
    assert taps.lower_weight + taps.upper_weight == 1
    assert taps.nearest()[0] == 3
    assert linear_taps(np.array([0.0]), 1).nearest()[0] == 0


def test_crop_goes_and_comes_back() -> None:
    mask = np.zeros((6, 7, 8), bool)
    mask[2:4, 1:6, 5:8] = True
    box = bounding_box(mask)
    assert box == Crop((2, 1, 5), (4, 6, 8))
    assert np.array_equal(box.undo(box.apply(mask), mask.shape), mask)
    assert np.allclose(box.apply_to_affine(np.diag([2.0, 3, 4, 1]))[:3, 3], [4, 3, 20])
    assert bounding_box(mask & False) is None


def test_shear_is_measured() -> None:
    affine = np.diag([1.0, 1, 3, 1])
    affine[1, 2] = 3 * np.tan(np.radians(15))
    assert shear_degrees(affine) == pytest.approx(15, abs=0.01)


@pytest.mark.parametrize(
    ("affine", "came"),
    [
        (np.diag([0.0, 1, 1, 1]), "voxel edges of 0 x 1 x 1 mm"),
        (np.diag([1.0, 1e6, 1, 1]), "voxel edges"),
        (np.full((4, 4), np.nan), "not 4x4 and finite"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "axes lie in one plane"),
    ],
)
def test_absurd_grids_are_refused(affine: np.ndarray, came: str) -> None:
    with pytest.raises(DataError, match=came):
        check_affine(affine, "ct.nii")


def test_an_unknown_orientation_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'RAS'"):
        reorientation_to("RAA", np.eye(4), (2, 2, 2))
