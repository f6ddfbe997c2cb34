"""`medlore view` on what the other commands leave: reports of every kind, case folders with and without a record, wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from chromium import browser, browser_path
from medlore.cli import main
from medlore.errors import DataError, InputError
from medlore.pages import Interval, Notes, Page, Picture, Slices, Table, page_html
from medlore.pages.report import pieces_of, result_sections
from medlore.pages.view import page_of, view
from medlore.ranks.allocate import plan_ranks

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def write_report(folder: Path, results: dict[str, Any], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    report = {"schema": "medlore/report/1", "verb": "finetune", "command": ["medlore", "finetune"], "settings": {"a": {"b": 1}}}
    (folder / "report.json").write_text(json.dumps({**report, "state": "done", "seconds": 3.0, "results": results, **more}))
    return folder


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def case_folder(folder: Path, *, record: bool = True) -> Path:
    """Two overlapping masks and their label map, as `medlore segment` writes them."""
    image = np.random.default_rng(0).integers(-1000, 400, (12, 10, 8)).astype(np.int16)
    liver, spleen = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
    liver[2:8, 2:8, 2:6] = 1
    spleen[6:9, 6:9, 3:5] = 1
    save(folder / "image.nii.gz", image)
    save(folder / "liver.nii.gz", liver)
    save(folder / "spleen.nii.gz", spleen)
    save(folder / "prediction.nii.gz", np.where(spleen > 0, 2, liver).astype(np.uint8))
    (folder / "labels.json").write_text(json.dumps({"schema": "medlore/labels/1", "labels": {"1": "liver", "2": "spleen"}}))
    if record:
        labels = [
            {
                "value": v,
                "label": n,
                "expert": "abdomen",
                "file": f"{n}.nii.gz",
                "voxels": int(m.sum()),
                "volume_ml": float(m.sum()) * 12 / 1000,
            }
            for v, (n, m) in enumerate({"liver": liver, "spleen": spleen}.items(), 1)
        ]
        (folder / "case.json").write_text(json.dumps({"modality": "ct", "labels": labels, "notes": ["odd header"], "model": {"name": "m"}}))
    return folder


def only(page: Page, kind: type) -> Any:
    found = [piece for section in page.sections for piece in section.pieces if isinstance(piece, kind)]
    assert len(found) == 1
    return found[0]


# -- reports -----------------------------------------------------------------------------------------------------------


def test_results_become_pieces_by_their_shape() -> None:
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    (facts,) = pieces_of({"a": 1, "b": None, "note": "", "list": ["x", "y"]})
    assert facts.rows == {"a": 1, "b": None, "list": "x, y"}
    (table,) = pieces_of([{"network": "teacher", "report": {"metrics": {"auc": interval}, "per_class": []}}, {"network": "student"}])
    assert list(table.columns) == ["network", "auc"]
    assert table.rows == [["teacher", Interval(0.5, 0.4, 0.6)], ["student", None]]
    (table,) = pieces_of({"macro_auc": interval, "accuracy": {"mean": 1.0, "low": None, "high": None}})
    assert table.rows == [("macro auc", Interval(0.5, 0.4, 0.6)), ("accuracy", Interval(1.0, None, None))]
    (table,) = pieces_of({"train": {"images": 3, "counts": dict.fromkeys("abcdefghij", 1)}, "test": {"images": 4}})
    assert list(table.columns) == ["name", "images", "counts"]
    assert table.rows[0] == ["train", 3, "a 1, b 1, c 1, d 1, e 1, f 1, g 1, h 1, i 1, j 1"]
    sections = result_sections({"history": [{"epoch": 1}], "test": {"x": {"y": {"z": 1}}}, "steps": 5, "small": {"a": 1}})
    assert [section.title for section in sections] == ["In short", "Test", "History"] or sections[0].title == "In short"


def test_a_run_with_plan_and_pictures(tmp_path: Path) -> None:
    metrics = {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}}
    per_class = [{"class": "<b>", "positives": 3, "auc": {"value": None, "low": None, "high": None}}]
    test = {"metrics": metrics, "majority": {"accuracy": 0.5}, "per_class": per_class, "undefined": {"auc": ["<b>"]}}
    folder = write_report(tmp_path / "run", {"test": test, "ranks": {"q": 3}}, outputs={"curves": "curves.png", "x": "../../secret.png"})
    Image.new("RGB", (4, 4)).save(folder / "curves.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    plan_ranks("medlore:vit-mini").save(folder / "plan.json")
    html = view(folder).read_text()
    assert "0.900 (0.800 to 0.950)" in html
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("data:image/png") == 2  # the curves and the ranks; nothing from outside the folder
    assert "layers.0.attention.q_proj" in html
    page = view(folder / "plan.json")
    assert page.name == "plan.html"
    assert "layers.0.attention.q_proj" in page.read_text()


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    folder = write_report(tmp_path, {"error": "StepError: loss is not finite"}, state="failed")
    page = page_of(folder)
    assert page.sections[0].pieces[0] == Notes(["StepError: loss is not finite"], warning=True)
    assert page.facts["state"] == "failed"


def test_a_cohort_is_a_table_with_pictures_and_one_case_is_a_viewer(tmp_path: Path) -> None:
    cases = [{"name": n, "state": "done", "folder": n, "seconds": 2.5, "volume_ml": {"liver": 1.7, "spleen": 0.0}} for n in ("a", "b")]
    for case in cases:
        case_folder(tmp_path / case["name"])
        Image.new("RGB", (4, 4)).save(tmp_path / case["name"] / "quality_control.png")
    failed = {"name": "c", "state": "failed", "error": "c: no body", "seconds": 1.0}
    write_report(tmp_path, {"cases": [*cases, failed], "counts": {"done": 2}}, verb="segment")
    page = page_of(tmp_path)
    table = next(p for s in page.sections for p in s.pieces if isinstance(p, Table))
    assert [row[:3] for row in table.rows] == [["a", "done", 1], ["b", "done", 1], ["c", "failed", None]]
    assert Notes(["c: c: no body"], warning=True) in [p for s in page.sections for p in s.pieces]
    assert sum(isinstance(p, Picture) for s in page.sections for p in s.pieces) == 2
    write_report(tmp_path, {"cases": cases[:1]}, verb="segment")
    assert only(page_of(tmp_path), Slices).labels[0].name == "liver"


# -- case folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [True, False])
def test_a_case_folder_with_and_without_its_record(tmp_path: Path, record: bool) -> None:
    page = page_of(case_folder(tmp_path / "case", record=record))
    slices = only(page, Slices)
    assert slices.unit == "HU"
    assert [label.name for label in slices.labels] == ["liver", "spleen"]
    assert [label.volume_ml for label in slices.labels] == pytest.approx([144 * 12 / 1000, 18 * 12 / 1000])
    assert sorted(slices.sets) == [(), (0,), (1,), (1, 0)]  # the overlap is kept
    table = next(p for s in page.sections for p in s.pieces if isinstance(p, Table))
    assert [row[-1] for row in table.rows] == pytest.approx([1.728, 0.216])


def test_a_label_map_alone_and_masks_alone(tmp_path: Path) -> None:
    folder = case_folder(tmp_path / "map", record=False)
    for name in ("liver.nii.gz", "spleen.nii.gz", "labels.json", "image.nii.gz"):
        (folder / name).unlink()
    page = page_of(folder)
    assert [label.name for label in only(page, Slices).labels] == ["label 1", "label 2"]
    assert "on black" in page_html(page)
    folder = case_folder(tmp_path / "masks", record=False)
    for name in ("prediction.nii.gz", "labels.json"):
        (folder / name).unlink()
    assert [label.name for label in only(page_of(folder), Slices).labels] == ["liver", "spleen"]


def test_a_record_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret.nii.gz", np.ones((12, 10, 8), np.uint8))
    folder = case_folder(tmp_path / "case")
    record = json.loads((folder / "case.json").read_text())
    record["labels"][0]["file"] = "../secret.nii.gz"
    (folder / "case.json").write_text(json.dumps(record))
    assert only(page_of(folder), Slices).labels[0].voxels == 144 - 8  # from the label map, in which the spleen keeps what it shares


def test_masks_on_another_grid_end_in_one_sentence(tmp_path: Path) -> None:
    folder = case_folder(tmp_path / "case")
    save(folder / "spleen.nii.gz", np.ones((12, 10, 9), np.uint8))
    with pytest.raises(DataError, match=r"spleen.nii.gz: a grid of \(12, 10, 9\), the image has \(12, 10, 8\)"):
        page_of(folder)
    save(folder / "spleen.nii.gz", np.ones((12, 10, 8), np.uint8), np.diag([2.0, 2, 3, 1]))
    with pytest.raises(DataError, match="another affine than the image"):
        page_of(folder)
    (folder / "spleen.nii.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(DataError, match="damaged or cut-off"):
        page_of(folder)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case_folder(tmp_path / "case")
    assert main(["view", str(folder), "--out", str(tmp_path / "x" / "p.html"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"page": str(tmp_path / "x" / "p.html"), "bytes": (tmp_path / "x" / "p.html").stat().st_size}
    assert main(["view", str(folder)]) == 0
    assert (folder / "page.html").is_file()
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "nothing to show"),
        ({"report.json": "{"}, "not JSON"),
        ({"report.json": "[]"}, "not the report of a run"),
        ({"report.json": '{"verb": "finetune"}'}, "not the report of a run"),
        ({"plan.json": "{}"}, "plan"),
        ({"case.json": "[]"}, "a list"),
        ({"case.json": "{}"}, "neither an image nor a mask"),
        ({"prediction.nii.gz": "text", "labels.json": '{"labels": {"one": "liver"}}'}, "not a table of labels"),
        ({"prediction.nii.gz": "text"}, "not NIfTI|prediction.nii.gz"),
    ],
)
def test_wrong_folders_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, str], message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert main(["view", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert any(part in printed for part in message.split("|")), printed
    assert "fault of MedLoRE" not in printed
    assert not (tmp_path / "page.html").exists()


def test_wrong_paths_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path / "none")]) == 2
    (tmp_path / "a.txt").write_text("x")
    assert main(["view", str(tmp_path / "a.txt")]) == 2
    assert "Accepted: a folder with report.json" in capsys.readouterr().err
    with pytest.raises(InputError):
        view(tmp_path)


@pytest.mark.skipif(browser_path() is None, reason="no Chromium on this machine: the page was not opened")
def test_the_page_of_a_case_opens_in_a_browser(tmp_path: Path) -> None:
    page = view(case_folder(tmp_path / "a folder with spaces & signs"))
    with browser() as tab:
        tab.open(page, width=420, dark=True)
        tab.until("document.querySelector('.slices').dataset.ready === 'yes'")
        assert tab.run("document.querySelectorAll('.labels li').length") == 2
        assert tab.run("document.querySelector('tbody').innerText").split()[:2] == ["liver", "1"]
        assert tab.run("document.documentElement.scrollWidth") <= 420
        assert tab.console == []
        assert all(url.startswith(("file:", "data:")) for url in tab.requests)


def test_a_report_cannot_name_the_folder_above(tmp_path: Path) -> None:
    case_folder(tmp_path)
    folder = write_report(tmp_path / "run", {"cases": [{"name": "x", "state": "done", "folder": ".."}]}, verb="segment")
    assert 'class="slices"' not in view(folder).read_text()
