"""The table of a cohort against SimpleITK and NumPy, its memory, and the layouts of what is written: names, union, crop."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medlore.runs.settings_file import read_settings
from medlore.segmenting.cohort import segment_cases
from medlore.segmenting.evaluate import evaluate_masks
from medlore.segmenting.settings import SegmentSettings
from medlore.segmenting.statistics import COLUMNS, write_cohort_table
from small_segmenter import write_small_pack

SHAPE = (18, 20, 10)
LABELS = ["liver", "left kidney", "lumbar vertebrae 1 (l1)"]
TURN = np.array([[0.96, -0.28, 0, 12], [0.28, 0.96, 0, -30.5], [0, 0, 2.5, 7], [0, 0, 0, 1]]) @ np.diag([-0.8, 1.2, 1.0, 1.0])


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(16, 16, 8))


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full(SHAPE, -1000, np.float32)
    array[3:-3, 3:-3, 2:-2] = np.random.default_rng(seed).normal(50, 60, (12, 14, 6))
    nib.save(nib.Nifti1Image(array, TURN), path)
    return path


def segment(pack: Path, out: Path, **values: Any) -> dict[str, Any]:
    given = {"precision": "fp32", "picture": False, "labels": LABELS, "modality": "ct", **values}
    return segment_cases(read_settings(SegmentSettings, model=str(pack), out=out, **given))


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "statistics.csv").open() as stream:
        return list(csv.DictReader(stream))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_simpleitk_and_numpy(pack: Path, tmp_path: Path) -> None:
    image(tmp_path / "in" / "a.nii.gz")
    assert segment(pack, tmp_path / "out", cases=tmp_path / "in")["counts"]["done"] == 1
    grey = SimpleITK.ReadImage(str(tmp_path / "out" / "a" / "image.nii.gz"))
    rows = {row["label"]: row for row in rows_of(tmp_path / "out")}
    assert list(rows) == LABELS
    for label, row in rows.items():
        mask = SimpleITK.ReadImage(str(tmp_path / "out" / "a" / f"{label}.nii.gz"))
        values = SimpleITK.LabelStatisticsImageFilter()
        values.Execute(grey, mask)
        shape = SimpleITK.LabelShapeStatisticsImageFilter()
        shape.Execute(mask)
        assert int(row["voxels"]) == values.GetCount(1) > 0
        assert float(row["volume_ml"]) == pytest.approx(shape.GetPhysicalSize(1) / 1000, abs=1e-4)
        assert float(row["mean"]) == pytest.approx(values.GetMean(1), abs=1e-3)
        n = values.GetCount(1)
        assert float(row["sd"]) == pytest.approx(values.GetSigma(1) * np.sqrt((n - 1) / n), abs=1e-3)
        assert (float(row["min"]), float(row["max"])) == pytest.approx((values.GetMinimum(1), values.GetMaximum(1)), abs=1e-3)
        centre = np.array(shape.GetCentroid(1)) * (-1, -1, 1)
        assert [float(row[f"centre_{axis}_mm"]) for axis in "xyz"] == pytest.approx(centre.tolist(), abs=1e-3)
        assert [int(row[f"{end}_{axis}"]) for axis in "xyz" for end in ("first", "last")] == list(values.GetBoundingBox(1))
        inside = SimpleITK.GetArrayFromImage(grey)[SimpleITK.GetArrayFromImage(mask) > 0]
        for name, share in (("p5", 5), ("p25", 25), ("median", 50), ("p75", 75), ("p95", 95)):
            assert float(row[name]) == pytest.approx(float(np.percentile(inside, share)), abs=1e-3)
    table = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert table["schema"] == "medlore/statistics/1"
    assert [list(row) for row in table["rows"]] == [list(COLUMNS)] * 3
    assert table["rows"][0]["mean"] == float(rows["liver"]["mean"])


def test_finished_cases_are_in_the_table_failed_ones_are_not_and_verdicts_stand_in_it(pack: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        image(tmp_path / "in" / f"{name}.nii.gz", seed)
    assert segment(pack, tmp_path / "out", cases=tmp_path / "in")["counts"]["done"] == 2
    image(tmp_path / "in" / "c.nii.gz", 2)
    (tmp_path / "in" / "d.nii").write_bytes(b"\x5c\x01\x00\x00broken")
    counts = segment(pack, tmp_path / "out", cases=tmp_path / "in")["counts"]
    assert counts == {"done": 1, "skipped": 2, "failed": 1}
    rows = rows_of(tmp_path / "out")
    assert [row["case"] for row in rows] == [name for name in "abc" for _ in LABELS]
    record = json.loads((tmp_path / "out" / "c" / "case.json").read_text())
    flagged = {flag["label"]: flag["says"] for flag in record["check"]["flags"]}
    for row in rows[6:]:
        assert row["check"] == flagged.get(row["label"], "ok") or flagged[row["label"]] in row["check"]
    assert segment(pack, tmp_path / "none", image=tmp_path / "in" / "a.nii.gz", check="none")["counts"]["done"] == 1
    assert {row["check"] for row in rows_of(tmp_path / "none")} == {""}


def test_a_case_of_an_earlier_version_and_an_empty_label_have_rows(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    entry = {"label": "liver", "value": 1, "voxels": 0, "volume_ml": 0.0}
    (tmp_path / "old" / "case.json").write_text(json.dumps({"modality": "ct", "labels": [entry]}))
    write_cohort_table(tmp_path, ["old", "not there"])
    (row,) = rows_of(tmp_path)
    assert (row["case"], row["voxels"], row["mean"], row["first_x"], row["check"]) == ("old", "0", "", "", "")


def test_the_table_of_many_cases_needs_the_memory_of_one(tmp_path: Path) -> None:
    labels = [{"label": f"label {i}", "value": i, "voxels": 1, "volume_ml": 1.0, "statistics": {"mean": float(i)}} for i in range(30)]
    text = json.dumps({"modality": "ct", "image": "a.nii.gz", "labels": labels})
    names = [f"case {number}" for number in range(100)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text(text)
    peaks = {}
    for count in (10, 10, 100):  # the first time fills caches
        tracemalloc.start()
        write_cohort_table(tmp_path, iter(names[:count]))
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(rows_of(tmp_path)) == 100 * 30
    assert len(json.loads((tmp_path / "statistics.json").read_text())["rows"]) == 100 * 30
    assert peaks[100] < peaks[10] + 100_000  # bytes; the rows of 100 cases take megabytes


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_the_box_around_all_labels_is_written_in_place(pack: Path, tmp_path: Path) -> None:
    source = image(tmp_path / "a.nii.gz")
    formats = ["nifti", "seg-nrrd"]
    segment(pack, tmp_path / "whole", image=source, format=formats, binary=True, uncertainty=True)
    segment(pack, tmp_path / "part", image=source, format=formats, binary=True, uncertainty=True, crop_output=2.0)
    whole, part = tmp_path / "whole" / "a", tmp_path / "part" / "a"
    union = np.any([nib.load(whole / f"{label}.nii.gz").get_fdata() > 0 for label in LABELS], axis=0)
    assert np.array_equal(nib.load(whole / "union.nii.gz").get_fdata() > 0, union)
    margin = np.ceil(2.0 / np.array([0.8, 1.2, 2.5])).astype(int)
    places = np.argwhere(union)
    start = np.maximum(places.min(0) - margin, 0)
    stop = np.minimum(places.max(0) + 1 + margin, SHAPE)
    box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert tuple(stop - start) != SHAPE
    for name in (*(f"{label}.nii.gz" for label in LABELS), "prediction.nii.gz", "union.nii.gz", "image.nii.gz", "uncertainty.nii.gz"):
        one, other = nib.load(whole / name), nib.load(part / name)
        assert np.array_equal(other.get_fdata(), one.get_fdata()[box]), name
        np.testing.assert_allclose(other.affine @ [0, 0, 0, 1], TURN @ [*start, 1], atol=1e-4)
    slicer = SimpleITK.ReadImage(str(part / "segmentation.seg.nrrd"))
    assert slicer.GetSize() == tuple((stop - start).tolist())
    line = {"image": str(source), "label": LABELS, "modality": "ct", "mask": str(whole)}
    (tmp_path / "cases.jsonl").write_text(json.dumps(line))
    assert evaluate_masks(tmp_path / "part", tmp_path / "cases.jsonl", out=tmp_path / "measured")["mean"]["dice"] == 1.0


def test_safe_names_are_taken_apart_by_no_shell_and_another_layout_is_made_anew(pack: Path, tmp_path: Path) -> None:
    source = image(tmp_path / "a.nii.gz")
    assert segment(pack, tmp_path / "out", image=source)["counts"]["done"] == 1
    assert segment(pack, tmp_path / "out", image=source, names="safe")["counts"]["done"] == 1
    assert segment(pack, tmp_path / "out", image=source, names="safe")["counts"]["skipped"] == 1
    assert segment(pack, tmp_path / "out", image=source, names="safe", crop_output=0)["counts"]["done"] == 1
    folder = tmp_path / "out" / "a"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert {"left_kidney.nii.gz", "lumbar_vertebrae_1_l1.nii.gz"} <= names
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)
    with (folder / "labels.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [(row["value"], row["label"]) for row in table] == [("1", LABELS[0]), ("2", LABELS[1]), ("3", LABELS[2])]
    assert all((folder / row["file"]).is_file() for row in table)
    assert (table[1]["code"], table[1]["side"]) == ("64033007", "Left")
