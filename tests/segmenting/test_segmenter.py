"""`medlore.load_segmenter`: the same masks in Python as the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medlore
from medlore.data.volumes.preparation import read_volume
from medlore.errors import InputError, UnknownNameError
from medlore.segmenting.cohort import SegmentSettings, segment_cases
from small_segmenter import write_small_pack


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenting")
    write_small_pack(folder / "pack", roi_size=(32, 32, 16))
    array = np.full((30, 32, 14), -1000, np.int16)
    array[3:-3, 3:-3, 2:-2] = np.random.default_rng(0).normal(50, 60, (24, 26, 10))
    affine = np.array([[0.0, -1.1, 0, 5], [-0.9, 0, 0, 7], [0, 0, 2.5, -3], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(array, affine), folder / "ct.nii.gz")
    return folder


def test_masks_are_those_of_the_command(work: Path, tmp_path: Path) -> None:
    labels = ("liver", "left kidney", "heart")
    out = tmp_path / "out"
    segment_cases(SegmentSettings(model=str(work / "pack"), out=out, image=work / "ct.nii.gz", labels=labels, modality="ct", picture=False))
    segmenter = medlore.load_segmenter(work / "pack", device="cpu")
    masks = segmenter.segment(work / "ct.nii.gz", ["liver", "kidney_left", "heart"], modality="ct")
    assert masks.labels == labels
    written = nib.load(out / "ct" / "prediction.nii.gz")
    np.testing.assert_array_equal(masks.label_map, np.asanyarray(written.dataobj))
    np.testing.assert_allclose(masks.affine, written.affine)
    assert masks.label_map.dtype == np.uint8
    assert masks.label_map.any()
    recorded = {entry["label"]: entry["volume_ml"] for entry in json.loads((out / "ct" / "case.json").read_text())["labels"]}
    for label in labels:
        mask = masks[label]
        assert mask.dtype == np.bool_

        np.testing.assert_array_equal(mask, np.asanyarray(nib.load(out / "ct" / f"{label}.nii.gz").dataobj) > 0)
        assert masks.volumes_ml[label] == pytest.approx(recorded[label], abs=1e-4)
    saved = masks.save(tmp_path / "saved", picture=False)
    np.testing.assert_array_equal(np.asanyarray(nib.load(saved / "prediction.nii.gz").dataobj), masks.label_map)


def test_one_prompt_a_volume_in_memory_and_the_network_grid(work: Path) -> None:
    segmenter = medlore.load_segmenter(work / "pack", device="cpu", precision="fp32", memory="4GiB")
    volume = read_volume(work / "ct.nii.gz")
    masks = segmenter.segment(volume, "liver", modality="ct", grid="processed")
    assert masks.labels == ("liver",)
    assert masks["liver"].shape == masks.shape == masks.label_map.shape
    assert masks.shape != volume.shape
    np.testing.assert_allclose(np.linalg.norm(masks.affine[:3, :3], axis=0), (1, 1, 3))
    assert "liver" in segmenter.labels("CT")
    assert segmenter.name


def test_wrong_use_says_what_to_do(work: Path) -> None:
    segmenter = medlore.load_segmenter(work / "pack", device="cpu")
    with pytest.raises(InputError, match='modality="ct"'):
        segmenter.segment(work / "ct.nii.gz", "liver")
    with pytest.raises(InputError, match="'liver'"):
        segmenter.segment(work / "ct.nii.gz", "livr", modality="ct")
    with pytest.raises(InputError, match="no such file"):
        segmenter.segment(work / "none.nii.gz", "liver", modality="ct")
    with pytest.raises(UnknownNameError, match="modality"):
        segmenter.labels("x-ray")
    masks = segmenter.segment(work / "ct.nii.gz", "liver", modality="ct")
    with pytest.raises(UnknownNameError, match="spleen"):
        masks["spleen"]
    with pytest.raises(InputError, match="6GiB"):
        medlore.load_segmenter(work / "pack", memory="much")
