"""The cache of prepared volumes: the same as at segment time, never stale, and robust against what lies on disks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medlore.data.volumes.cases import Case, read_cases
from medlore.data.volumes.geometry import orientation_of, spacing_of
from medlore.data.volumes.preparation import prepare, read_volume
from medlore.data.volumes.training_cache import CachedCase, build_cache
from medlore.errors import DataError

PREPROCESSING: dict[str, Any] = {"orientation": "RAS", "spacing_mm": {"ct": [2, 2, 2], "mri": [1, 1, 1]}}


def scene(shape: tuple[int, int, int] = (20, 24, 16)) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """An image with air around it, and a label map whose labels follow from the image's grey values."""
    rng = np.random.default_rng(0)
    codes = np.zeros(shape, np.uint8)
    codes[3:9, 4:20, 3:13] = 1
    codes[11:17, 4:12, 3:13] = 2
    image = np.select([codes == 1, codes == 2], [400, 800], 0) + rng.integers(0, 40, shape) * (codes > 0)
    image[2:18, 3:21, 2:14] += 100
    return image.astype(np.int16), codes


def write_case(folder: Path, name: str = "one", *, code: str = "RAS", spacing: float = 1.0, **other: Any) -> Case:
    """The scene in some orientation, on disk."""
    image, codes = scene()
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (-7, 11, 5)
    folder.mkdir(exist_ok=True)
    for kind, array in (("image", image), ("mask", codes)):
        whole = nib.Nifti1Image(array, affine)
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
        nib.save(whole.as_reoriented(turn), folder / f"{name}_{kind}.nii.gz")
    labels = other.pop("labels", ("left box", "right box"))
    return Case(folder / f"{name}_image.nii.gz", labels, other.pop("modality", "mri"), mask=folder / f"{name}_mask.nii.gz", other=other)


def build_one(case: Case, cache: Path, preprocessing: dict[str, Any] = PREPROCESSING) -> CachedCase:
    report = build_cache([case], cache, preprocessing)
    assert not report.faults
    return report.cases[0]


def test_the_image_is_what_the_network_sees_at_segment_time(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    found = build_one(case, tmp_path / "cache")
    prepared = prepare(read_volume(case.image), "mri", spacing_mm=(1, 1, 1))
    assert found.image is not None
    np.testing.assert_allclose(found.image, prepared.pixels[0], atol=2e-3)
    assert found.air == pytest.approx(prepared.intensity.air)
    assert found.shape == found.image.shape == found.codes.shape


@pytest.mark.parametrize("code", ["LIA", "PSR", "LPS", "ASR"])
def test_every_orientation_becomes_the_same_case(tmp_path: Path, code: str) -> None:
    straight = build_one(write_case(tmp_path / "a"), tmp_path / "cache")
    turned = build_one(write_case(tmp_path / "b", code=code), tmp_path / "cache")
    assert np.array_equal(straight.codes, turned.codes)
    assert np.array_equal(straight.image, turned.image)  # type: ignore[arg-type]
    np.testing.assert_allclose(straight.affine, turned.affine, atol=1e-6)
    assert orientation_of(turned.affine) == "RAS"


@pytest.mark.parametrize("spacing", [0.7, 1.0, 2.5])
def test_codes_follow_the_image_through_resampling(tmp_path: Path, spacing: float) -> None:
    found = build_one(write_case(tmp_path, spacing=spacing), tmp_path / "cache")
    assert found.image is not None
    image, codes = found.image.astype(float), found.codes
    one, two = np.median(image[codes == 1]), np.median(image[codes == 2])
    nearer = np.where(np.abs(image - one) < np.abs(image - two), 1, 2)  # what the grey values say where there is a label
    assert np.mean(nearer[codes > 0] == codes[codes > 0]) > 0.93
    assert np.mean(image[codes == 0] < one) > 0.93


def test_spacing_goes_by_modality(tmp_path: Path) -> None:
    mri = build_one(write_case(tmp_path), tmp_path / "cache")
    image = nib.load(tmp_path / "one_image.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) - 1000, image.affine), tmp_path / "one_image.nii.gz")
    ct = build_one(Case(tmp_path / "one_image.nii.gz", ("a", "b"), "ct", mask=tmp_path / "one_mask.nii.gz"), tmp_path / "cache")
    assert spacing_of(mri.affine) == pytest.approx([1, 1, 1])
    assert spacing_of(ct.affine) == pytest.approx([2, 2, 2])
    with pytest.raises(DataError, match="no case could be prepared") as error:
        build_cache([write_case(tmp_path, modality="pet")], tmp_path / "cache", PREPROCESSING)
    assert "no spacing for pet (there is one for ct, mri)" in str(error.value)


def test_boxes_points_and_counts_are_those_of_the_codes(tmp_path: Path) -> None:
    values = {"left box": [1], "both": [1, 2], "nowhere": [9]}
    found = build_one(write_case(tmp_path, labels=tuple(values), mask_values=values), tmp_path / "cache")
    assert found.present == {"left box", "both"}
    for label in found.present:
        mask = np.isin(found.codes, values[label])
        assert found.voxels[label] == mask.sum()
        (a, b), where = found.boxes[label], np.argwhere(mask)
        assert where.min(0).tolist() == list(a)
        assert (where.max(0) + 1).tolist() == list(b)
        assert all(mask[point] for point in found.points[label])
        assert len(set(found.points[label])) == 128


def test_what_lies_in_the_cache_is_used_again(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    first = build_cache([case], tmp_path / "cache", PREPROCESSING)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    again = build_cache([case], tmp_path / "cache", PREPROCESSING)
    assert (first.built, first.reused, again.built, again.reused) == (1, 0, 0, 1)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}


def test_nothing_stale_is_used(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    keys = {build_one(case, tmp_path / "cache").key}
    keys.add(build_one(case, tmp_path / "cache", {**PREPROCESSING, "spacing_mm": [2, 2, 2]}).key)
    keys.add(build_one(case, tmp_path / "cache", {**PREPROCESSING, "intensity": {"other": {"clip_percentiles": [1, 99]}}}).key)
    keys.add(build_one(Case(case.image, ("left box",), "mri", mask=case.mask), tmp_path / "cache").key)
    codes = nib.load(tmp_path / "one_mask.nii.gz")
    array = np.asarray(codes.dataobj).copy()
    array[array == 2] = 1
    nib.save(nib.Nifti1Image(array, codes.affine), tmp_path / "one_mask.nii.gz")
    changed = build_one(case, tmp_path / "cache")
    keys.add(changed.key)
    assert len(keys) == 5
    assert changed.present == {"left box"}


@pytest.mark.parametrize("part", ["codes.npy", "image.npy", "json"])
def test_a_cut_off_entry_is_built_again(tmp_path: Path, part: str) -> None:
    case = write_case(tmp_path)
    whole = build_one(case, tmp_path / "cache")
    expected = np.array(whole.image)
    (file,) = (tmp_path / "cache").glob(f"*.{part}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    report = build_cache([case], tmp_path / "cache", PREPROCESSING)
    assert report.built == 1
    assert np.array_equal(np.load(tmp_path / "cache" / f"{whole.key}.image.npy"), expected)


def test_broken_cases_are_reported_and_left_out(tmp_path: Path) -> None:
    good = write_case(tmp_path)
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing of the kind")
    other = tmp_path / "small_mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), other)
    empty = tmp_path / "empty_mask.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((20, 24, 16), np.uint8), nib.load(good.image).affine), empty)
    cases = [
        Case(tmp_path / "broken.nii.gz", ("a",), "mri", mask=good.mask, line=1),
        Case(good.image, ("a",), "mri", mask=other, line=2),
        good,
        Case(good.image, ("a",), "mri", mask=empty, line=4),
        Case(tmp_path / "gone.nii.gz", ("a",), "mri", mask=good.mask, line=5),
        Case(good.image, ("a",), "T1", mask=good.mask, line=6, other={"split": "dev", "absent": ["a"], "synthesise": "yes"}),
        Case(good.image, ("a",), "mri", line=7),
    ]
    seen = []
    report = build_cache(cases, tmp_path / "cache", PREPROCESSING, on_case=lambda done, total, name: seen.append((done, total, name)))
    assert len(report.cases) == 1
    assert [fault.split(",")[0] for fault in report.faults] == ["line 1", "line 2", "line 4", "line 5", "line 6", "line 7"]
    text = "\n".join(report.faults)
    for part in (
        "not NIfTI",
        "3 x 3 x 3",
        "none of its labels has a voxel",
        "no such file",
        "modality 'T1'",
        "split 'dev'",
        "absent at once",
        "synthesise 'yes'",
        'add "mask"',
    ):
        assert part in text, part
    assert seen[-1][:2] == (7, 7)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no case could be prepared"):
        build_cache([Case(tmp_path / "gone.nii.gz", ("a",), "mri", mask=tmp_path / "gone.nii.gz")], tmp_path / "cache", PREPROCESSING)


def test_a_label_map_may_stand_for_images_to_come(tmp_path: Path) -> None:
    case = write_case(tmp_path, code="LIA", labels=("left box",), mask_values={"left box": [1]}, synthesise=True)
    found = build_one(Case(case.mask, case.labels, "mri", mask=case.mask, other=case.other), tmp_path / "cache")  # type: ignore[arg-type]
    assert found.image is None
    assert set(np.unique(found.codes)) == {0, 1, 2}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert orientation_of(found.affine) == "RAS"


def test_a_case_travels_to_workers_without_its_voxels(tmp_path: Path) -> None:
    found = build_one(write_case(tmp_path, patient="p7", split="test", absent=["liver"]), tmp_path / "cache")
    assert found.image is not None
    packed = pickle.dumps(found)
    again = pickle.loads(packed)
    assert len(packed) < 40_000
    assert np.array_equal(again.image, found.image)
    assert (again.patient, again.split, again.absent) == ("p7", "test", ("liver",))


def test_real_head_and_real_crop_face_the_same_way(shared_data: Path, tmp_path: Path) -> None:
    """In RAS the amygdala (18, 54) lies before the hippocampus (17, 53), and its anterior part before the posterior one."""
    lines = [
        {"image": str(shared_data / "synthseg" / "training_seg_02.nii.gz"), "label": ["amygdala", "hippocampus", "left", "right"],
         "synthesise": True, "mask": str(shared_data / "synthseg" / "training_seg_02.nii.gz"),
         "mask_values": {"amygdala": [18, 54], "hippocampus": [17, 53], "left": [17], "right": [53]}},
        {"image": str(shared_data / "hippocampus" / "images" / "hippocampus_003.nii.gz"), "label": ["anterior", "posterior"],
         "mask": str(shared_data / "hippocampus" / "labels" / "hippocampus_003.nii.gz")},
    ]  # fmt: skip
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps({"modality": "mri", **line}) + "\n" for line in lines))
    head, crop = build_cache(read_cases(tmp_path / "cases.jsonl"), tmp_path / "cache", PREPROCESSING).cases
    middle = {(case.name, label): np.mean(points, axis=0) for case in (head, crop) for label, points in case.points.items()}
    assert middle[head.name, "amygdala"][1] > middle[head.name, "hippocampus"][1] + 5
    assert middle[head.name, "left"][0] < middle[head.name, "right"][0] - 20
    assert middle[crop.name, "anterior"][1] > middle[crop.name, "posterior"][1] + 5
    assert middle[crop.name, "anterior"][2] < middle[crop.name, "posterior"][2]
