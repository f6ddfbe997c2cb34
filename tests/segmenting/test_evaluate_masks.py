"""Masks against reference masks: rows, means, and files that do not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlore.cli import main
from medlore.data.volumes.nifti import Volume, header_for, write_nifti
from medlore.errors import InputError, StepError
from medlore.segmenting.evaluate import evaluate_masks

AFFINE = np.diag([1.0, 1, 3, 1])


def box(*extent: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((40, 40, 30), np.uint8)
    mask[tuple(slice(a, b) for a, b in extent)] = 1
    return mask


LIVER, SPLEEN = box((10, 30), (10, 30), (10, 20)), box((2, 6), (2, 6), (2, 6))


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two cases: one with a shifted liver, one whose spleen was missed; references as a label map and as a folder."""
    save(tmp_path / "truth" / "a.nii.gz", LIVER + 2 * SPLEEN)
    for label, mask in (("liver", LIVER), ("spleen", SPLEEN)):
        save(tmp_path / "truth" / "b" / f"{label}.nii.gz", mask)
    save(tmp_path / "pred" / "a" / "liver.nii.gz", np.roll(LIVER, 2, 0))
    save(tmp_path / "pred" / "a" / "spleen.nii.gz", SPLEEN)
    save(tmp_path / "pred" / "b" / "liver.nii.gz", LIVER)
    save(tmp_path / "pred" / "b" / "spleen.nii.gz", SPLEEN * 0)
    lines = [
        {"image": "a.nii.gz", "label": ["liver", "spleen"], "modality": "ct", "dataset": "One", "mask": "truth/a.nii.gz"},
        {"image": "b.nii.gz", "label": ["liver", "spleen"], "modality": "ct", "dataset": "Two", "mask": "truth/b"},
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def test_rows_and_means(cohort: Path) -> None:
    results = evaluate_masks(cohort / "pred", cohort / "cases.jsonl", out=cohort / "out")
    with (cohort / "out" / "cases.csv").open() as stream:
        rows = {(row["case"], row["label"]): row for row in csv.DictReader(stream)}
    assert float(rows["a", "liver"]["dice"]) == pytest.approx(0.9)
    assert float(rows["a", "liver"]["surface_dice"]) == pytest.approx(0.6534973, abs=1e-6)
    assert float(rows["b", "spleen"]["dice"]) == 0.0  # predicted empty, reference not
    assert rows["a", "spleen"]["region"] == "abdomen"
    by_label = {row["label"]: row["dice"] for row in results["by_label"]}
    assert by_label == pytest.approx({"liver": 0.95, "spleen": 0.5})
    by_dataset = {row["dataset"]: row["dice"] for row in results["by_dataset"]}
    assert by_dataset == pytest.approx({"One (ct)": 0.95, "Two (ct)": 0.5})
    assert results["mean"]["dice"] == pytest.approx(0.725)
    assert (cohort / "out" / "box_plots.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((cohort / "out" / "report.json").read_text())["results"]["empty_masks"].startswith("both masks empty: 1")


def test_values_of_a_label_map_by_its_own_table(cohort: Path) -> None:
    turned = (LIVER * 7 + SPLEEN * 3).astype(np.uint8)
    like = Volume(turned, AFFINE, header_for(AFFINE, turned.shape), turned.shape, cohort)
    write_nifti(cohort / "truth" / "a.nii.gz", turned, like, labels={7: "liver", 3: "spleen"})
    results = evaluate_masks(cohort / "pred", cohort / "cases.jsonl")
    assert {row["label"]: row["dice"] for row in results["by_label"]} == pytest.approx({"liver": 0.95, "spleen": 0.5})


def test_cases_that_cannot_be_measured_are_named_and_the_others_written(cohort: Path) -> None:
    save(cohort / "pred" / "b" / "liver.nii.gz", LIVER, np.diag([1.0, 1, 3.1, 1]))
    with pytest.raises(StepError, match=r"- line 2: [^l].*(?s:.)*whose affine differs by up to 0\.1 mm"):
        evaluate_masks(cohort / "pred", cohort / "cases.jsonl", out=cohort / "out")
    assert (cohort / "out" / "cases.csv").read_text().count("\n") == 3
    (cohort / "pred" / "a" / "liver.nii.gz").unlink()
    with pytest.raises(StepError, match="2 case"):
        evaluate_masks(cohort / "pred", cohort / "cases.jsonl", out=cohort / "out")


def test_wrong_use(cohort: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        evaluate_masks(cohort / "nothing", cohort / "cases.jsonl")
    (cohort / "bare.jsonl").write_text('{"image": "a.nii.gz", "label": ["liver"], "modality": "ct"}')
    with pytest.raises(InputError, match='no case has a "mask"'):
        evaluate_masks(cohort / "pred", cohort / "bare.jsonl")


def test_masks_by_label_and_the_tolerance(cohort: Path) -> None:
    files = {"liver": "truth/b/liver.nii.gz", "spleen": "truth/b/spleen.nii.gz"}
    line = {"image": "a.nii.gz", "label": ["liver", "spleen"], "modality": "ct", "mask": files}
    (cohort / "by_label.jsonl").write_text(json.dumps(line))
    rows = {}
    for tolerance in (1.0, 2.0):
        results = evaluate_masks(cohort / "pred", cohort / "by_label.jsonl", tolerance_mm=tolerance)
        rows[tolerance] = {row["label"]: row["surface_dice"] for row in results["by_label"]}
    assert rows[1.0]["liver"] == pytest.approx(0.6534973, abs=1e-6)
    assert rows[2.0] == {"liver": 1.0, "spleen": 1.0}
    (cohort / "short.jsonl").write_text(json.dumps({**line, "mask": {"liver": files["liver"]}}))
    with pytest.raises(StepError, match="no file for 'spleen'"):
        evaluate_masks(cohort / "pred", cohort / "short.jsonl")
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match="--tolerance"):
            evaluate_masks(cohort / "pred", cohort / "by_label.jsonl", tolerance_mm=wrong)


def test_one_reference_file_of_another_grid_is_refused(cohort: Path) -> None:
    save(cohort / "truth" / "b" / "spleen.nii.gz", SPLEEN[:-1])
    with pytest.raises(StepError, match=r"b/spleen\.nii\.gz: a mask of 39 x 40 x 30 voxels"):
        evaluate_masks(cohort / "pred", cohort / "cases.jsonl")


def test_every_layout_of_reference_masks_is_read(cohort: Path) -> None:
    """A label of two values, a stack of SAT-DS, and a file whose name cannot hold its label's slash."""
    halves = np.where(np.arange(40)[:, None, None] < 20, LIVER, 3 * LIVER) + 2 * SPLEEN
    save(cohort / "truth" / "a.nii.gz", halves.astype(np.uint8))
    np.save(cohort / "truth" / "b.npy", np.stack([LIVER, SPLEEN]))
    save(cohort / "truth" / "c" / "l1_l2 disc.nii.gz", SPLEEN)
    save(cohort / "pred" / "c" / "l1_l2 disc.nii.gz", SPLEEN)
    common = {"label": ["liver", "spleen"], "modality": "ct"}
    lines = [
        {"image": "a.nii.gz", **common, "mask": "truth/a.nii.gz", "mask_values": {"liver": [1, 3], "spleen": 2}},
        {"image": "b.nii.gz", **common, "mask": "truth/b.npy"},
        {"image": "c.nii.gz", "label": ["l1/l2 disc"], "modality": "mri", "mask": "truth/c"},
    ]
    (cohort / "layouts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    results = evaluate_masks(cohort / "pred", cohort / "layouts.jsonl")
    assert {row["label"]: row["dice"] for row in results["by_label"]} == pytest.approx({"liver": 0.95, "spleen": 0.5, "l1/l2 disc": 1.0})


def test_json_is_one_object(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--pred", str(cohort / "pred"), "--truth", str(cohort / "cases.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean"]["dice"] == pytest.approx(0.725)


def record_of(image: str, **more: object) -> str:
    labels = [{"label": label, "file": f"{label}.nii.gz"} for label in ("liver", "spleen")]
    return json.dumps({"labels": labels, "modality": "ct", "image": image, **more})


@pytest.mark.case("evaluate_other_patient")
def test_the_prediction_of_another_patient_is_refused_though_the_names_are_equal(cohort: Path) -> None:
    (cohort / "pred" / "a" / "case.json").write_text(record_of("/data/p1/a.nii.gz"))
    with pytest.raises(StepError, match=r"(?s)a prediction of /data/p1/a\.nii\.gz\. Accepted: one of .*/a\.nii\.gz"):
        evaluate_masks(cohort / "pred", cohort / "cases.jsonl")


def test_the_content_decides_where_it_is_known_and_the_path_where_it_is_not(cohort: Path) -> None:
    from medlore.files import sha256_of

    save(cohort / "a.nii.gz", LIVER.astype(np.int16))
    own, other = sha256_of(cohort / "a.nii.gz"), sha256_of(cohort / "truth" / "a.nii.gz")
    for content in (
        record_of("/moved/since/a.nii.gz", image_sha256=own), record_of(str(cohort / "a.nii.gz")), record_of("a.nii.gz"),
    ):  # fmt: skip
        (cohort / "pred" / "a" / "case.json").write_text(content)
        assert evaluate_masks(cohort / "pred", cohort / "cases.jsonl")["cases"] == 2
    for content in (
        record_of(str(cohort / "a.nii.gz"), image_sha256=other), record_of("other/a.nii.gz"), record_of("a.nii.gz", case={"frame": 3}),
    ):  # fmt: skip
        (cohort / "pred" / "a" / "case.json").write_text(content)
        with pytest.raises(StepError, match=r"1 case\(s\) could not be measured"):
            evaluate_masks(cohort / "pred", cohort / "cases.jsonl")


def test_a_prediction_on_another_grid_than_the_image_is_refused(cohort: Path) -> None:
    save(cohort / "a.nii.gz", LIVER.astype(np.int16), np.diag([1.0, 1, 2.9, 1]))
    with pytest.raises(StepError, match="an image of the same shape whose affine differs"):
        evaluate_masks(cohort / "pred", cohort / "cases.jsonl")


def test_a_record_does_not_lead_out_of_its_folder(cohort: Path) -> None:
    save(cohort / "pred" / "liver.nii.gz", LIVER * 0)
    record = json.loads(record_of("a.nii.gz"))
    record["labels"][0]["file"] = "../liver.nii.gz"
    (cohort / "pred" / "a" / "case.json").write_text(json.dumps(record))
    results = evaluate_masks(cohort / "pred", cohort / "cases.jsonl")
    assert {row["label"]: row["dice"] for row in results["by_label"]}["liver"] == pytest.approx(0.95)


def test_what_is_odd_about_the_reference_stands_in_the_table(cohort: Path) -> None:
    save(cohort / "truth" / "a.nii.gz", LIVER * 3)
    evaluate_masks(cohort / "pred", cohort / "cases.jsonl", out=cohort / "out")
    with (cohort / "out" / "cases.csv").open() as stream:
        notes = {row["case"]: row["notes"] for row in csv.DictReader(stream)}
    assert "order of the labels" in notes["a"]
    assert "belong to no label of the case: 3" in notes["a"]
    assert "without a voxel in the reference: liver, spleen" in notes["a"]
    assert notes["b"] == ""
