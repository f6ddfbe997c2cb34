"""Volumes to the network and masks back: places are kept, odd voxels are handled or refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medlore.data.volumes.geometry import ORIENTATION_CODES, spacing_of
from medlore.data.volumes.intensity import intensity_of
from medlore.data.volumes.nifti import Volume, header_for, read_nifti, write_nifti
from medlore.data.volumes.preparation import MaskRestorer, PackedMasks, prepare, read_volume
from medlore.errors import DataError, InputError


def make(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine, header_for(affine, array.shape), array.shape, Path("made.nii.gz"))


def oblique(code: str, spacing, angles, origin=(11.0, -23.0, 37.0)) -> np.ndarray:
    matrix = np.zeros((3, 3))
    for axis, (to, sign) in enumerate(nib.orientations.axcodes2ornt(code)):
        matrix[int(to), axis] = sign
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ matrix @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def blob(shape, affine: np.ndarray, centre_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    places = index @ affine[:3, :3].T + affine[:3, 3]
    return np.linalg.norm(places - centre_mm, axis=-1) <= radius_mm


def back(prepared, probability: torch.Tensor, resample: str = "probability", rows: int = 5) -> PackedMasks:
    restorer = MaskRestorer(prepared.path, len(probability), resample=resample)
    for start in range(0, probability.shape[1], rows):
        restorer.add(start, probability[:, start : start + rows])
    return restorer.masks


@settings(max_examples=40, deadline=None)
@given(
    code=st.sampled_from(ORIENTATION_CODES),
    angles=st.tuples(*[st.floats(-25, 25)] * 3),
    spacing=st.tuples(*[st.floats(0.8, 3.5)] * 3),
    network=st.sampled_from(("RAS", "ASR")),
    resample=st.sampled_from(("probability", "nearest")),
)
def test_a_blob_stays_in_its_place_in_the_world(code, angles, spacing, network, resample) -> None:
    """What the network sees lies where it lay, and what it marks comes back to where it was."""
    shape = tuple(int(np.ceil(60 / s)) for s in spacing)
    affine = oblique(code, spacing, angles)
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    truth = blob(shape, affine, centre, 15)
    volume = make(np.where(truth, 400, -900).astype(np.int16), affine)
    prepared = prepare(volume, "ct", orientation_code=network)
    grey = prepared.intensity.undo(prepared.pixels[0].numpy())
    seen = grey > -250
    places = np.argwhere(seen) @ prepared.path.network_affine[:3, :3].T + prepared.path.network_affine[:3, 3]
    # mm; of the network's slices of 3 mm, the last may be above the threshold on one side alone
    assert np.abs(places.mean(axis=0) - centre).max() < 0.9
    masks = back(prepared, torch.from_numpy(seen[None].astype(np.float32)), resample)
    mask = prepared.path.reorientation.undo(masks.whole(0))
    assert mask.shape == shape
    returned = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    assert np.abs(returned.mean(axis=0) - centre).max() < 0.8
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.85
    assert masks.counts[0] == mask.sum()


@settings(max_examples=40, deadline=None)
@given(code=st.sampled_from(ORIENTATION_CODES), network=st.sampled_from(("RAS", "ASR", "LPI")), seed=st.integers(0, 99))
def test_forward_and_back_is_the_identity_on_an_equal_grid(code, network, seed) -> None:
    rng = np.random.default_rng(seed)
    affine = oblique(code, (1.0, 1.0, 1.0), (5, 9, -13))
    array = np.full((9, 10, 11), -1000, np.int16)
    array[2:7, 3:8, 1:10] = rng.integers(-400, 800, (5, 5, 9))
    prepared = prepare(make(array, affine), "ct", orientation_code=network, spacing_mm=(1, 1, 1))
    grey = prepared.intensity.undo(prepared.pixels[0].numpy())
    whole = prepared.path.crop.undo(np.asarray(grey), prepared.path.resampling.new_shape, fill=-500)
    again = prepared.path.reorientation.undo(whole)
    assert np.allclose(again, np.clip(array, -500, 1000), atol=0.05)
    marks = rng.random((1, *prepared.pixels.shape[1:])) > 0.5
    for resample in ("probability", "nearest"):
        mask = back(prepared, torch.from_numpy(marks.astype(np.float32)), resample, rows=3).whole(0)
        assert np.array_equal(prepared.path.crop.apply(mask), marks[0])
        assert mask.sum() == marks.sum()


PHANTOM = {
    "RAS 1 1 3": ("RAS", (1, 1, 3), "RAS", (60, 50, 24), (43, 35, 17), (9, 7, 4)),
    "LPS to RAS": ("LPS", (0.8, 0.8, 2.5), "RAS", (48, 40, 20), (34, 27, 13), (7, 7, 4)),
    "LPS to ASR": ("LPS", (0.8, 0.8, 2.5), "ASR", (40, 58, 17), (27, 41, 11), (7, 10, 3)),
}


@pytest.mark.parametrize("name", PHANTOM)
def test_grid_and_crop_of_the_published_loading(name: str) -> None:
    code, spacing, network, grid, crop, start = PHANTOM[name]
    array = np.full((60, 50, 24), -1000, np.int16)
    array[9:52, 7:42, 4:21] = np.arange(43)[:, None, None] + 80
    prepared = prepare(make(array, oblique(code, spacing, (0, 0, 0))), "ct", orientation_code=network, published=True)
    assert prepared.path.resampling.new_shape == grid
    assert prepared.path.crop.new_shape == crop
    assert prepared.path.crop.start == start
    assert prepared.body is None


def test_published_grey_values_are_the_plain_formula() -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(100, 900, (20, 18, 9)).astype(np.float32)
    for modality, low, high in (("ct", -500, 1000), ("mri", *np.percentile(array, (0.5, 99.5)))):
        prepared = prepare(make(array, np.diag([1.0, 1, 3, 1])), modality, published=True)
        clipped = np.clip(array, low, high)
        assert np.allclose(prepared.pixels[0].numpy(), (clipped - clipped.mean()) / clipped.std(), atol=2e-5)


def test_default_crop_takes_the_skin_but_keeps_the_statistics_of_the_training() -> None:
    array = np.full((40, 40, 10), -1000, np.int16)
    array[5:35, 5:35] = -100  # fat: outside the published box
    array[10:30, 10:30] = np.random.default_rng(0).integers(10, 90, (20, 20, 10))
    volume = make(array, np.diag([1.0, 1, 3, 1]))
    mine, published = prepare(volume, "ct"), prepare(volume, "ct", published=True)
    assert mine.path.crop.new_shape == (30, 30, 10)
    assert published.path.crop.new_shape == (20, 20, 10)
    assert mine.intensity.mean == published.intensity.mean
    assert mine.intensity.air == pytest.approx((-500 - mine.intensity.mean) / mine.intensity.deviation)
    assert mine.body is not None
    assert mine.body.all()


def test_a_ct_that_lost_its_intercept_is_shifted_and_said() -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((30, 30, 12), np.uint16)
    array[6:24, 6:24] = rng.integers(1000, 1100, (18, 18, 12))
    array[10:14, 10:14] = 1900
    right = prepare(make(array.astype(np.int16) - 1024, np.diag([1.0, 1, 3, 1])), "ct")
    shifted = prepare(make(array, np.diag([1.0, 1, 3, 1])), "ct")
    assert "1024 was subtracted" in shifted.notes[0]
    assert torch.allclose(shifted.pixels, right.pixels, atol=1e-5)
    assert right.notes == ()
    with pytest.raises(DataError, match="all values lie at 1000"):  # the published rules take it as it is
        prepare(make(array, np.diag([1.0, 1, 3, 1])), "ct", published=True)


def test_a_windowed_ct_is_not_silent(shared_data: Path) -> None:
    volume = read_nifti(shared_data / "niivue" / "CT_pitch.nii.gz")
    small = make(volume.array[::4, ::4, ::4], volume.affine @ np.diag([4, 4, 4, 1]))
    assert "not Hounsfield units" in prepare(small, "ct").notes[0]


def test_gantry_tilt_is_noted_and_returns_exactly() -> None:
    affine = np.diag([1.0, 1, 3, 1])
    affine[1:3, 2] = 3 * np.sin(np.radians(12)), 3 * np.cos(np.radians(12))
    array = np.full((20, 20, 10), -1000, np.int16)
    array[5:15, 5:15, 2:8] = np.arange(50, 60)[:, None, None]
    prepared = prepare(make(array, affine), "ct")
    assert "12.0 degrees" in prepared.notes[0]
    mask = back(prepared, torch.ones_like(prepared.pixels)).whole(0)
    assert np.array_equal(prepared.path.reorientation.undo(mask), array > -500)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_become_the_smallest_value(bad: float) -> None:
    array = np.random.default_rng(0).normal(50, 10, (12, 12, 6)).astype(np.float32)
    array[0, :3, 0] = bad
    prepared = prepare(make(array, np.diag([1.0, 1, 3, 1])), "mri")
    assert prepared.notes[0].startswith("3 voxels that were not finite")
    assert torch.isfinite(prepared.pixels).all()


def test_real_file_with_infinite_voxels(shared_data: Path) -> None:
    assert "not finite" in prepare(read_volume(shared_data / "sct" / "mt_mtr.nii.gz"), "mri").notes[0]


def test_volumes_with_nothing_in_them_are_refused() -> None:
    affine = np.diag([1.0, 1, 3, 1])
    for array, message in (
        (np.zeros((5, 5, 5), np.int16), "every voxel is 0"),
        (np.full((5, 5, 5), np.nan, np.float32), "no voxel is a finite number"),
        (np.linspace(-1000, -900, 125).reshape(5, 5, 5), "nothing but air"),
        (np.linspace(2000, 3000, 125).reshape(5, 5, 5), "all values lie at 1000"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(make(array, affine), "ct")


def test_one_slice_and_one_voxel_axes() -> None:
    array = np.full((24, 20, 1), -1000, np.int16)
    array[6:18, 5:15] = np.arange(120).reshape(12, 10, 1)
    prepared = prepare(make(array, np.diag([-0.7, -0.7, 5, 1])), "ct")
    assert prepared.pixels.shape[3] == 1
    mask = back(prepared, torch.ones(1, *prepared.pixels.shape[1:]))
    assert mask.whole(0).shape == (24, 20, 1)
    assert mask.counts[0] >= 100


def test_slab_size_does_not_matter_and_empty_labels_cost_nothing() -> None:
    volume = make(np.random.default_rng(0).integers(-200, 300, (25, 22, 9)).astype(np.int16), np.diag([-1.4, 0.9, 2.2, 1]))
    prepared = prepare(volume, "ct")
    probability = torch.rand(3, *prepared.pixels.shape[1:])
    probability[1] = 0
    probability[2] = 0
    probability[2, 3:5, 4:7, 2:4] = 1
    whole = back(prepared, probability, rows=999)
    for rows in (1, 2, 7):
        other = back(prepared, probability, rows=rows)
        assert all(np.array_equal(whole.whole(label), other.whole(label)) for label in range(3))
    assert whole.boxed(1) is None
    assert whole.counts[1] == 0
    crop, mask = whole.boxed(2)
    assert np.array_equal(crop.apply(whole.whole(2)), mask)


def test_restoring_equals_interpolating_everything() -> None:
    """The shortcut (only where a neighbour passes the threshold) against plain interpolation of the whole."""
    volume = make(np.random.default_rng(0).integers(-200, 300, (14, 13, 9)).astype(np.int16), np.diag([1.7, 0.6, 2.0, 1]))
    prepared = prepare(volume, "ct")
    path = prepared.path
    probability = torch.rand(1, *prepared.pixels.shape[1:])
    values = path.crop.undo(probability[0].numpy(), path.resampling.new_shape)
    for axis in range(3):
        at = np.clip(np.arange(path.resampling.shape[axis]) / path.resampling.step[axis], 0, values.shape[axis] - 1)
        lower = np.minimum(np.floor(at).astype(int), max(values.shape[axis] - 2, 0))
        upper = np.minimum(lower + 1, values.shape[axis] - 1)
        weight = (at - lower).reshape([-1 if a == axis else 1 for a in range(3)])
        values = np.take(values, lower, axis) * (1 - weight) + np.take(values, upper, axis) * weight
    clear = np.abs(values - 0.5) > 1e-5
    assert np.array_equal(back(prepared, probability, rows=3).whole(0)[clear], (values > 0.5)[clear])


def test_packed_masks_hold_any_mask() -> None:
    rng = np.random.default_rng(0)
    masks = PackedMasks((4, 5, 19), 2)
    truth = rng.random((4, 5, 19)) > 0.6
    truth[0] = truth[3] = False
    for x in (0, 2):
        masks.set_planes(0, x, (slice(0, 5), slice(0, 19)), truth[x : x + 2])
    assert np.array_equal(masks.whole(0), truth)
    assert masks.counts.tolist() == [truth.sum(), 0]
    assert not masks.whole(1).any()


def test_masks_of_a_written_file_lie_on_its_grid(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "sct" / "t2_t2.nii.gz"
    volume = read_volume(source)
    prepared = prepare(volume, "mri")
    masks = back(prepared, (prepared.pixels > 1).float())
    out = write_nifti(tmp_path / "m.nii.gz", prepared.path.reorientation.undo(masks.whole(0)), volume)
    mask, image = nib.load(out), nib.load(source)
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    bright = np.asanyarray(image.dataobj) > prepared.intensity.mean + prepared.intensity.deviation
    inside = np.asanyarray(mask.dataobj) > 0
    assert 2 * (inside & bright).sum() / (inside.sum() + bright.sum()) > 0.8


def test_intensities_come_back_up_to_the_clip() -> None:
    array = np.random.default_rng(0).normal(0, 300, (10, 10, 10)).astype(np.float32)
    intensity = intensity_of(array, "mri", where="x")
    again = intensity.undo(intensity.apply(array.copy()))
    assert np.allclose(again, np.clip(array, intensity.low, intensity.high), atol=1e-2)


def test_missing_files_and_spacing() -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        read_volume("nothing-here.nii.gz")
    assert np.allclose(spacing_of(oblique("PSR", (2, 3, 4), (10, 20, 30))), (2, 3, 4))
