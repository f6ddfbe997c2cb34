"""`--format`: one table of formats decides what a case leaves, what is said before the network runs, and what the next run finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from medlore.cli import main
from medlore.data.volumes.masks import read_segments
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.pages.masks import case_sections
from medlore.runs.settings_file import read_settings
from medlore.segmenting.cohort import segment_cases
from medlore.segmenting.evaluate import evaluate_masks
from medlore.segmenting.mask_formats import MASK_FORMATS
from medlore.segmenting.segmenter import load_segmenter
from medlore.segmenting.settings import SegmentSettings
from small_dicom import GONE, write_slices
from small_segmenter import write_small_pack

SHAPE = (18, 20, 10)
LABELS = ["liver", "left kidney"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(16, 16, 8))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stored = np.full(SHAPE, 24, np.uint16)
    stored[3:-3, 3:-3, 2:-2] = np.random.default_rng(0).normal(1074, 60, (12, 14, 6))
    return write_slices(tmp_path_factory.mktemp("ct") / "series", stored)


def segment(pack: Path, out: Path, **values: Any) -> dict[str, Any]:
    given = {"precision": "fp32", "picture": False, "labels": LABELS, "modality": "ct", **values}
    return segment_cases(read_settings(SegmentSettings, model=str(pack), out=out, **given))


def nifti(path: Path, series: Path) -> Path:
    volume = read_volume(series)
    nib.save(
        nib.Nifti1Image(
            volume.array[:, ::-1], volume.affine @ np.array([[1, 0, 0, 0], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
        ),
        path,
    )
    return path


def test_all_formats_of_a_case_hold_the_same_masks_and_the_next_run_finds_them(pack: Path, series: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert segment(pack, out, image=series, format=["rtstruct", "nifti", "seg-nrrd", "dicom-seg"])["counts"]["done"] == 1
    folder, volume = out / "series", read_volume(series)
    assert json.loads((folder / "case.json").read_text())["formats"] == {name: made.file for name, made in MASK_FORMATS.items()}
    masks = {label: nib.load(folder / f"{label}.nii.gz").get_fdata() > 0 for label in LABELS}
    assert all(mask.any() for mask in masks.values())
    for name in ("rtstruct", "seg-nrrd"):
        found = read_segments(folder / MASK_FORMATS[name].file, volume)
        assert all(np.array_equal(found.mask(label), mask) for label, mask in masks.items()), name
    assert pydicom.dcmread(folder / "segmentation.dcm").Modality == "SEG"
    assert segment(pack, out, image=series, format=["rtstruct", "nifti", "seg-nrrd", "dicom-seg"])["counts"]["skipped"] == 1
    assert segment(pack, out, image=series)["counts"]["skipped"] == 1  # what is asked for is there
    (folder / "structures.dcm").unlink()
    assert segment(pack, out, image=series, format=["nifti", "rtstruct"])["counts"]["done"] == 1
    assert not (folder / "segmentation.dcm").exists()


def test_masks_in_one_format_without_nifti_are_measured_all_the_same(pack: Path, series: Path, tmp_path: Path) -> None:
    for name in ("nifti", "seg-nrrd", "rtstruct", "dicom-seg"):
        out = tmp_path / name
        assert segment(pack, out, image=series, format=[name], image_copy=False)["counts"]["done"] == 1, name
        folder = out / "series"
        assert bool(list(folder.glob("*.nii.gz"))) == (name == "nifti")
        line = {"image": str(series), "label": LABELS, "modality": "ct", "mask": str(tmp_path / "nifti" / "series")}
        (tmp_path / "cases.jsonl").write_text(json.dumps(line))
        assert evaluate_masks(out, tmp_path / "cases.jsonl", out=tmp_path / f"{name} measured")["mean"]["dice"] == 1.0, name
        if name != "nifti":
            with pytest.raises(DataError, match="masks in NIfTI"):
                case_sections(folder)


def test_an_unknown_format_names_the_nearest_three_with_all_other_faults(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["segment", "--image", "a.nii.gz", "--model", "m", "--out", str(tmp_path / "o"), "--format", "nifti,rtstrct,dicomseg"]
    assert main([*line, "--overlap", "2"]) == 2
    said = capsys.readouterr().err
    assert "rtstrct" in said
    assert "the nearest of 4 are rtstruct" in said
    assert "overlap" in said
    with pytest.raises(InputError, match="format"):
        read_settings(SegmentSettings, model="m", out=tmp_path, image=tmp_path, format=[])


def test_an_rtstruct_refers_to_the_series_that_the_image_was_converted_from(pack: Path, series: Path, tmp_path: Path) -> None:
    image = nifti(tmp_path / "ct.nii.gz", series)
    wanted = {"image": image, "format": ["nifti", "rtstruct", "dicom-seg"]}
    entry = segment(pack, tmp_path / "none", **wanted)["cases"][0]
    assert "an image that is not DICOM" in entry["error"]
    assert "--dicom-reference" in entry["error"]
    assert segment(pack, tmp_path / "out", **wanted, dicom_reference=series)["counts"]["done"] == 1
    found = read_segments(tmp_path / "out" / "ct" / "structures.dcm", read_volume(series))
    read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out" / "ct" / "segmentation.dcm")))
    both = np.zeros(SHAPE, bool)
    for label in LABELS:
        mask = nib.load(tmp_path / "out" / "ct" / f"{label}.nii.gz").get_fdata()[:, ::-1] > 0
        assert np.array_equal(found.mask(label), mask), label
        both |= mask
    assert (read > 0).sum() <= both.sum()  # what overlaps lies in another file
    other = write_slices(tmp_path / "other", np.random.default_rng(1).integers(0, 2000, SHAPE).astype(np.uint16))
    entry = segment(pack, tmp_path / "wrong", **wanted, dicom_reference=other)["cases"][0]
    assert "whose grey values are others" in entry["error"]
    assert not (tmp_path / "wrong" / "ct").exists()  # said before the network ran


def test_what_a_series_lacks_is_said_before_the_network_runs(pack: Path, tmp_path: Path) -> None:
    write_slices(tmp_path / "bare", np.full(SHAPE, 1100, np.uint16), StudyInstanceUID=GONE)
    entry = segment(pack, tmp_path / "out", image=tmp_path / "bare", format=["rtstruct"])["cases"][0]
    assert "slices without StudyInstanceUID" in entry["error"]
    assert not (tmp_path / "out" / "bare").exists()


def test_masks_are_saved_in_any_format_from_python(pack: Path, series: Path, tmp_path: Path) -> None:
    masks = load_segmenter(pack, precision="fp32", check="none").segment(series, LABELS)
    masks.save(tmp_path / "case", picture=False, formats=["seg-nrrd", "rtstruct"])
    for name in ("segmentation.seg.nrrd", "structures.dcm"):
        found = read_segments(tmp_path / "case" / name, read_volume(series))
        assert all(np.array_equal(found.mask(label), masks[label]) for label in LABELS)
    with pytest.raises(UnknownNameError, match="'rtstruct'"):
        masks.save(tmp_path / "other", formats=["rtstuct"])
