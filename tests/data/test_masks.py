"""Reference masks in all layouts, and every way in which they can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medlore.data.volumes.cases import Case, read_cases, write_cases
from medlore.data.volumes.masks import check_mask_grid, combine, read_masks
from medlore.data.volumes.nifti import Volume, header_for, read_nifti, write_nifti
from medlore.errors import DataError

SHAPE = (7, 6, 5)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    array = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    save(tmp_path / "image.nii.gz", array)
    return read_nifti(tmp_path / "image.nii.gz")


@pytest.fixture
def codes() -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint8)


def save(path: Path, array: np.ndarray[Any, Any], affine: np.ndarray[Any, Any] = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def case(volume: Volume, labels: tuple[str, ...], mask: Path | None, **other: Any) -> Case:
    return Case(volume.path, labels, "mri", mask=mask, line=3, other=other)


def test_a_label_may_be_a_union_of_values_and_share_them(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    mask = save(tmp_path / "mask.nii.gz", codes)
    found = read_masks(case(volume, ("head", "eye"), mask, mask_values={"head": [1, 2, 3], "eye": 3}), volume)
    assert found.members == {"head": (1, 2, 3), "eye": (3,)}
    assert np.array_equal(found.mask("head"), np.isin(codes, [1, 2, 3]))
    assert np.array_equal(found.mask("eye"), codes == 3)


def test_values_come_from_a_file_beside_the_list(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    save(tmp_path / "mask.nii.gz", codes)
    (tmp_path / "values.json").write_text(json.dumps({"Left_Eye": [2, 4]}))
    line = {"image": "image.nii.gz", "label": ["left eye"], "modality": "mri", "mask": "mask.nii.gz", "mask_values": "values.json"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line))
    (found,) = read_cases(tmp_path / "cases.jsonl")
    assert np.array_equal(read_masks(found, volume).mask("left eye"), np.isin(codes, [2, 4]))


def test_values_come_from_the_files_own_table(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    write_nifti(tmp_path / "mask.nii.gz", codes, volume, labels={4: "liver", 2: "spleen"})
    found = read_masks(case(volume, ("spleen", "liver"), tmp_path / "mask.nii.gz"), volume)
    assert found.members == {"spleen": (2,), "liver": (4,)}


def test_without_a_table_the_order_of_the_labels_counts(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    mask = save(tmp_path / "mask.nii.gz", codes.astype(np.float32))
    assert read_masks(case(volume, ("a", "b"), mask), volume).members == {"a": (1,), "b": (2,)}


def separate_files(folder: Path, codes: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir()
    masks = {"whole tumor": codes > 0, "tumor core": codes > 2, "edema": (codes == 1) | (codes == 3)}
    for label, mask in masks.items():
        save(folder / f"{label.replace(' ', '_')}.nii.gz", mask.astype(np.uint8))
    return masks


def test_a_folder_of_files_that_overlap_becomes_one_map(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    masks = separate_files(tmp_path / "masks", codes)
    found = read_masks(case(volume, tuple(masks), tmp_path / "masks"), volume)
    for label, mask in masks.items():
        assert np.array_equal(found.mask(label), mask), label
    assert found.codes.dtype == np.uint8


def test_a_mapping_of_files_survives_the_jsonl(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    masks = separate_files(tmp_path / "masks", codes)
    files = {label: f"masks/{label.replace(' ', '_')}.nii.gz" for label in masks}
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "image.nii.gz", "label": list(masks), "modality": "mri", "mask": files}))
    once = read_cases(tmp_path / "a.jsonl")
    (again,) = read_cases(write_cases(tmp_path / "b.jsonl", once))
    assert np.array_equal(read_masks(again, volume).mask("edema"), masks["edema"])


@pytest.mark.parametrize("kind", ["nii.gz", "npy"])
def test_a_stack_of_masks_follows_the_order_of_the_labels(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any], kind: str) -> None:
    stack = np.stack([codes > 1, codes > 3])
    path = tmp_path / f"stack.{kind}"
    np.save(path, stack) if kind == "npy" else save(path, np.moveaxis(stack, 0, 3).astype(np.uint8))
    found = read_masks(case(volume, ("big", "small"), path), volume)
    assert np.array_equal(found.mask("big"), codes > 1)
    assert np.array_equal(found.mask("small"), codes > 3)
    with pytest.raises(DataError, match="a stack of 2 masks"):
        read_masks(case(volume, ("big", "small", "third"), path), volume)


def test_any_masks_return_from_their_combination() -> None:
    rng = np.random.default_rng(2)
    masks = {f"label {i}": rng.random(SHAPE) < 0.4 for i in range(9)}  # up to 512 combinations: more than a byte holds
    found = combine(masks.items(), SHAPE)
    assert all(np.array_equal(found.mask(label), mask) for label, mask in masks.items())


def test_another_shape_names_both_grids(tmp_path: Path, volume: Volume) -> None:
    mask = save(tmp_path / "mask.nii.gz", np.ones((7, 6, 4), np.uint8))
    with pytest.raises(DataError, match=r"7 x 6 x 4 voxels.*7 x 6 x 5"):
        read_masks(case(volume, ("a",), mask), volume)


def test_another_affine_names_both(tmp_path: Path, volume: Volume) -> None:
    moved = AFFINE.copy()
    moved[0, 3] = 4.5
    mask = save(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.uint8), moved)
    with pytest.raises(DataError, match=r"differs by up to 4\.5 mm.*4\.5.*Accepted: the affine of"):
        read_masks(case(volume, ("a",), mask), volume)
    check_mask_grid(SHAPE, AFFINE + 1e-4, volume, "rounding of a header is no fault")


def test_all_labels_without_a_value_are_reported_at_once(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    mask = save(tmp_path / "mask.nii.gz", codes)
    with pytest.raises(DataError, match=r"3 label\(s\)") as error:
        read_masks(
            case(volume, ("liver", "spleen", "heart", "lung"), mask, mask_values={"livre": 1, "lung": 2, "heart": 0, "spleen": "x"}), volume
        )
    assert "no value for 'liver'; the nearest are 'livre'" in str(error.value)
    assert "line 3" in str(error.value)
    assert "the value of 'heart' is 0" in str(error.value)
    assert "the value of 'spleen' is 'x'" in str(error.value)


def test_all_faults_of_separate_files_are_reported_at_once(tmp_path: Path, volume: Volume, codes: np.ndarray[Any, Any]) -> None:
    separate_files(tmp_path / "masks", codes)
    save(tmp_path / "masks" / "edema.nii.gz", np.ones((2, 2, 2), np.uint8))
    (tmp_path / "masks" / "tumor_core.nii.gz").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3 fault\(s\)") as error:
        read_masks(case(volume, ("whole tumor", "tumor core", "edema", "necrosis"), tmp_path / "masks"), volume)
    assert "no file for 'necrosis'" in str(error.value)
    assert "2 x 2 x 2" in str(error.value)
    assert "tumor_core" in str(error.value)


@pytest.mark.parametrize(
    ("array", "came"),
    [
        (np.full(SHAPE, 0.5, np.float32), "not whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), "not whole numbers"),
        (np.full(SHAPE, -1, np.int16), "from -1 to -1"),
        (np.full(SHAPE, 70_000, np.int32), "to 70000"),
    ],
)
def test_an_image_is_no_label_map(tmp_path: Path, volume: Volume, array: np.ndarray[Any, Any], came: str) -> None:
    mask = save(tmp_path / "mask.nii.gz", array)
    with pytest.raises(DataError, match=came):
        read_masks(case(volume, ("a",), mask), volume)


def test_a_case_without_a_mask_says_what_to_add(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'add "mask"'):
        read_masks(case(volume, ("a",), None), volume)
    with pytest.raises(DataError, match="does not exist"):
        read_masks(case(volume, ("a",), tmp_path / "none.nii.gz"), volume)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="not an array"):
        read_masks(case(volume, ("a",), tmp_path / "objects.npy"), volume)


def test_mask_of_a_wrong_kind_is_a_fault_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "i.nii", "label": ["a"], "modality": "ct", "mask": [1]}')
    with pytest.raises(DataError, match='"mask" is not text, nor'):
        read_cases(tmp_path / "a.jsonl")


def test_a_real_pair(shared_data: Path) -> None:
    folder = shared_data / "hippocampus"
    name = sorted(p.name for p in (folder / "images").iterdir())[0]
    volume = read_nifti(folder / "images" / name)
    values = {"hippocampus": [1, 2], "anterior hippocampus": 1}
    found = read_masks(case(volume, tuple(values), folder / "labels" / name, mask_values=values), volume)
    assert found.mask("hippocampus").sum() > found.mask("anterior hippocampus").sum() > 500
    shifted = replace(
        volume, affine=volume.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0 + np.eye(4), header=header_for(volume.affine, volume.shape)
    )
    with pytest.raises(DataError, match="affine"):
        read_masks(case(shifted, tuple(values), folder / "labels" / name, mask_values=values), shifted)
