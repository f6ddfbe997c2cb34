"""Images in memory give the masks of their files; `--series`, `--frame` and one .dcm file name what is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch

from medlore.cli import main
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.rtstruct import write_rtstruct
from medlore.errors import DataError, InputError, StepError
from medlore.runs.settings_file import read_settings
from medlore.segmenting.cohort import segment_cases
from medlore.segmenting.evaluate import evaluate_masks
from medlore.segmenting.segmenter import LoadedSegmenter, Masks, load_segmenter
from medlore.segmenting.settings import SegmentSettings
from small_dicom import write_slices
from small_segmenter import write_small_pack

SHAPE = (18, 20, 10)
LABELS = ["liver", "left kidney"]
TURN = np.array([[0.96, -0.28, 0, 12], [0.28, 0.96, 0, -30.5], [0, 0, 2.5, 7], [0, 0, 0, 1]]) @ np.diag([-1.0, 1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(16, 16, 8))


@pytest.fixture(scope="module")
def segmenter(pack: Path) -> LoadedSegmenter:
    return load_segmenter(pack, precision="fp32", check="none")


def voxels(seed: int = 0) -> np.ndarray[Any, Any]:
    array = np.full(SHAPE, -1000, np.int16)
    array[3:-3, 3:-3, 2:-2] = np.random.default_rng(seed).normal(50, 60, (12, 14, 6))
    return array


def same(one: Masks, other: Masks) -> None:
    assert any(one[label].any() for label in LABELS)
    assert one.shape == other.shape
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-5)
    for label in LABELS:
        assert np.array_equal(one[label], other[label]), label


def test_every_kind_of_image_in_memory_gives_the_masks_of_its_file(segmenter: LoadedSegmenter, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(voxels(), TURN), tmp_path / "ct.nii.gz")
    from_file = segmenter.segment(tmp_path / "ct.nii.gz", LABELS, modality="ct")
    kinds = {
        "SimpleITK": SimpleITK.ReadImage(str(tmp_path / "ct.nii.gz")),
        "nibabel, from the file": nib.load(tmp_path / "ct.nii.gz"),
        "nibabel, made": nib.Nifti1Image(voxels(), TURN),
        "nibabel, another format": nib.MGHImage(voxels(), TURN),
        "NumPy": (voxels(), TURN),
        "big-endian NumPy": (voxels().astype(">i2"), TURN),
        "torch": (torch.from_numpy(voxels()), torch.from_numpy(TURN)),
        "torch in half precision": (torch.from_numpy(voxels()).to(torch.float16), TURN),
    }
    for name, image in kinds.items():
        if name != "torch in half precision":  # rounds the grey values
            same(segmenter.segment(image, LABELS, modality="ct"), from_file)
        else:
            assert segmenter.segment(image, LABELS, modality="ct").shape == SHAPE
    written = segmenter.segment(kinds["NumPy"], LABELS, modality="ct").save(tmp_path / "case", picture=False)
    read = nib.load(written / "liver.nii.gz")
    assert np.array_equal(read.get_fdata() > 0, from_file["liver"])
    np.testing.assert_allclose(read.affine, TURN, atol=1e-5)
    assert np.array_equal(nib.load(written / "image.nii.gz").get_fdata(), voxels())


def test_slopes_frames_and_trailing_axes_are_those_of_the_file(segmenter: LoadedSegmenter, tmp_path: Path) -> None:
    series = np.stack([voxels(0), voxels(1)], axis=-1)
    image = nib.Nifti1Image(series, TURN)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "series.nii")
    loaded = nib.load(tmp_path / "series.nii")
    for frame in (0, 1):
        in_memory = segmenter.segment(loaded, LABELS, modality="ct", frame=frame)
        same(in_memory, segmenter.segment(tmp_path / "series.nii", LABELS, modality="ct", frame=frame))
        assert np.array_equal(in_memory.segmentation.volume.array, read_volume(tmp_path / "series.nii", frame=frame).array)
    with pytest.raises(DataError, match="4D, 2 volumes"):
        segmenter.segment(loaded, LABELS, modality="ct")
    with pytest.raises(DataError, match="4D, 2 volumes"):
        segmenter.segment(SimpleITK.ReadImage(str(tmp_path / "series.nii")), LABELS, modality="ct")
    one = nib.Nifti1Image(voxels()[..., None], TURN)
    assert segmenter.segment(one, LABELS, modality="ct").shape == SHAPE


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros(SHAPE), "an array alone has no position in space"),
        ((np.zeros((2, *SHAPE)), np.eye(4)), "an array of shape 2 x 18 x 20 x 10"),
        ((np.zeros(SHAPE, np.complex64), np.eye(4)), "voxels of type complex64"),
        ((np.zeros(SHAPE), np.zeros((4, 4))), "voxel edges of 0 x 0 x 0 mm"),
        ((np.zeros(SHAPE), np.eye(3)), "an affine that is not 4x4"),
        (SimpleITK.Image(4, 4, SimpleITK.sitkInt16), "an image of 2 axes"),
        (SimpleITK.Image([4, 4, 4], SimpleITK.sitkVectorFloat32), "an image of 3 values a voxel"),
        (7, "a int"),
    ],
)
def test_what_is_no_image_is_refused(segmenter: LoadedSegmenter, image: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        segmenter.segment(image, LABELS, modality="ct")


def test_series_and_frame_are_flags_and_one_file_names_its_series(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_slices(tmp_path / "study" / str(seed), (voxels(seed) + 1024).astype(np.uint16), seed=f"series {seed}")
    uids = [str(read_volume(tmp_path / "study" / str(seed)).slices[0].SeriesInstanceUID) for seed in (0, 1)]
    line = ["segment", "--image", str(tmp_path / "study"), "--labels", "liver", "--model", str(pack), "--no-picture", "--precision", "fp32"]
    assert main([*line, "--out", str(tmp_path / "none")]) == 1
    assert "2 series" in capsys.readouterr().err
    assert main([*line, "--out", str(tmp_path / "out"), "--series", uids[1]]) == 0
    assert np.array_equal(nib.load(tmp_path / "out" / "study" / "image.nii.gz").get_fdata(), voxels(1))
    (tmp_path / "flat").mkdir()
    for path in (tmp_path / "study").rglob("*.dcm"):
        path.rename(tmp_path / "flat" / path.name)
    one = next(path for path in sorted((tmp_path / "flat").iterdir()) if uids[0][-6:] in path.name)
    assert np.array_equal(read_volume(one).array, voxels(0))
    nib.save(nib.Nifti1Image(np.stack([voxels(0), voxels(1)], axis=-1), TURN), tmp_path / "two.nii.gz")
    given = {"model": str(pack), "labels": ["liver"], "modality": "ct", "picture": False, "precision": "fp32"}
    result = segment_cases(read_settings(SegmentSettings, image=tmp_path / "two.nii.gz", frame=1, out=tmp_path / "frames", **given))
    assert result["counts"]["done"] == 1, result
    assert np.array_equal(nib.load(tmp_path / "frames" / "two" / "image.nii.gz").get_fdata(), voxels(1))


def test_contours_of_another_series_measure_nothing(pack: Path, tmp_path: Path) -> None:
    folders = [write_slices(tmp_path / name, (voxels() + 1024).astype(np.uint16)) for name in ("one", "other")]
    given = {"model": str(pack), "labels": LABELS, "modality": "ct", "picture": False, "precision": "fp32"}
    segment_cases(read_settings(SegmentSettings, image=folders[0], out=tmp_path / "out", **given))
    for folder, dice in ((folders[0], 1.0), (folders[1], None)):
        volume = read_volume(folder)
        masks = {label: nib.load(tmp_path / "out" / "one" / f"{label}.nii.gz").get_fdata() > 0 for label in LABELS}
        path = write_rtstruct(tmp_path / f"{folder.name}.dcm", volume, masks)
        line = {"image": str(folders[0]), "label": LABELS, "modality": "ct", "mask": str(path)}
        (tmp_path / "cases.jsonl").write_text(json.dumps(line))
        if dice is not None:
            assert evaluate_masks(tmp_path / "out", tmp_path / "cases.jsonl", out=tmp_path / "measured")["mean"]["dice"] == dice
        else:
            with pytest.raises(StepError, match="contours of series"):
                evaluate_masks(tmp_path / "out", tmp_path / "cases.jsonl", out=tmp_path / "nothing")
