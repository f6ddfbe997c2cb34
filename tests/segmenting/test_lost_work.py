"""Nothing that is finished is replaced or lost, what can fail late is said first, and no case costs another one."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from medlore.cli import main
from medlore.data.volumes.cases import Case, folder_names
from medlore.data.volumes.dicom import write_dicom_seg
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.training_cache import build_cache
from medlore.errors import DataError, InputError, StepError
from medlore.runs.settings_file import read_settings
from medlore.segmenting.cohort import SegmentSettings, Silence, plan_cases, segment_cases
from medlore.segmenting.evaluate import evaluate_masks
from medlore.segmenting.plan import CasePlan
from small_dicom import GONE, write_slices
from small_segmenter import write_small_pack

SHAPE = (20, 22, 12)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(16, 16, 8))


def voxels(seed: int = 0) -> np.ndarray[Any, Any]:
    """A body of tissue in air."""
    array = np.full(SHAPE, -1000, np.int16)
    array[3:-3, 3:-3, 2:-2] = np.random.default_rng(seed).normal(50, 60, tuple(n - d for n, d in zip(SHAPE, (6, 6, 4), strict=True)))
    return array


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = nib.Nifti1Image(voxels(seed), np.diag([-1.0, -1, 3, 1])).to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def segment(pack: Path, out: Path, watcher: Silence | None = None, **values: Any) -> dict[str, Any]:
    given = {"precision": "fp32", "picture": False, "labels": ["liver"], "modality": "ct", **values}
    return segment_cases(read_settings(SegmentSettings, model=str(pack), out=out, **given), watcher=watcher)


def write_list(path: Path, *images: Any, **more: Any) -> Path:
    path.write_text("".join(json.dumps({"image": str(image), "label": ["liver"], "modality": "ct", **more}) + "\n" for image in images))
    return path


class Plans(Silence):
    """Counts the cases whose network ran, and does something before the first of them does."""

    def __init__(self, act: Any = lambda: None) -> None:
        self.count, self._act = 0, act

    def plan(self, name: str, plan: CasePlan) -> None:
        self.count += 1
        self._act()


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.case("same_name_overwritten")
def test_two_patients_of_one_name_keep_their_results_in_one_folder(pack: Path, tmp_path: Path) -> None:
    images = [save(tmp_path / patient / "t1.nii.gz", seed) for seed, patient in enumerate(("p1", "p2"))]
    out = tmp_path / "masks"
    first = segment(pack, out, image=images[0])["cases"][0]
    before = (out / "t1" / "case.json").read_bytes()
    second = segment(pack, out, image=images[1])["cases"][0]
    assert (first["state"], second["state"]) == ("done", "done")
    assert (out / "t1" / "case.json").read_bytes() == before
    found = {json.loads(file.read_text())["image"]: file.parent.name for file in out.glob("*/case.json")}
    assert found == {str(images[0]): "t1", str(images[1]): second["folder"]}
    assert f"t1 holds the results of another image ({images[0]})" in second["notes"][0]
    for image in images:  # whichever comes again finds its own
        assert segment(pack, out, image=image)["cases"][0]["state"] == "skipped"
    for patient, image in zip(("p1", "p2"), images, strict=True):
        mask = out / found[str(image)] / "liver.nii.gz"
        cases = write_list(tmp_path / patient / "c.jsonl", image, mask=str(mask), mask_values={"liver": [1]})
        assert evaluate_masks(out, cases, out=tmp_path / f"scores-{patient}")["cases"] == 1


def test_frames_of_one_file_in_two_runs_are_two_results(pack: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.stack([voxels(0), voxels(1)], axis=-1), np.diag([-1.0, -1, 3, 1])), tmp_path / "4d.nii.gz")
    folders = set()
    for frame in (0, 1):
        cases = write_list(tmp_path / f"{frame}.jsonl", tmp_path / "4d.nii.gz", frame=frame)
        folders |= {entry["folder"] for entry in segment(pack, tmp_path / "out", cases=cases)["cases"]}
    assert len(folders) == 2
    assert len(list((tmp_path / "out").glob("*/case.json"))) == 2


@pytest.mark.case("latin1_name")
def test_names_that_no_folder_can_have_and_those_behind_them(pack: Path, tmp_path: Path) -> None:
    long = "a" * 200
    images = [
        save(tmp_path / "report.json"),
        save(tmp_path / "evaluation.nii"),
        save(tmp_path / os.fsdecode(b"M\xfcller.nii.gz")),
        *(save(tmp_path / f"{n}{long}" / f"{long}.nii.gz", n) for n in range(2)),
        tmp_path / f"{'b' * 300}.nii.gz",
        tmp_path / "lone \ud800.nii.gz",
        tmp_path / "x" / ".." / "lone \ud800.nii.gz",
        save(tmp_path / "zz.nii.gz"),
    ]
    results = segment(pack, tmp_path / "out", cases=write_list(tmp_path / "c.jsonl", *images))
    assert [entry["state"] for entry in results["cases"]] == ["done"] * 5 + ["failed"] * 3 + ["done"]
    for entry in results["cases"]:
        if entry["state"] == "failed":
            assert "Accepted:" in entry["error"]
        else:
            assert (tmp_path / "out" / entry["folder"] / "case.json").is_file()
            assert len(os.fsencode(entry["folder"])) <= 240
    assert json.loads((tmp_path / "out" / "report.json").read_text())["state"] == "done"
    assert main(["segment", "--image", str(images[0]), "--labels", "liver", "--modality", "ct", "--model", str(pack), "--no-picture",
                 "--out", str(tmp_path / "one")]) == 0  # fmt: skip


def test_an_image_called_like_the_report_is_not_replaced_by_it(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "report.json")
    before = image.read_bytes()
    with pytest.raises(InputError, match=r"a report\.json that no run wrote"):
        segment(pack, tmp_path, cases=write_list(tmp_path / "c.jsonl", image))
    assert image.read_bytes() == before


def test_long_names_stay_apart() -> None:
    cases = [Case(Path(f"{'x' * 300}{n}.nii"), (), "ct") for n in (1, 2)] + [Case(Path("evaluation.nii"), (), "ct")]
    names = folder_names(cases)
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 240
    assert names[2] == "evaluation_2"


# -- what fails late ---------------------------------------------------------------------------------------------------

REMOVED = ("AccessionNumber", "StudyID", "PatientID", "PatientName", "PatientSex", "PatientBirthDate", "StudyDate", "StudyTime",
           "ReferringPhysicianName", "SliceThickness")  # fmt: skip


def test_dicom_seg_of_slices_without_what_anonymisers_remove(pack: Path, tmp_path: Path) -> None:
    stored = (voxels() + 1024).astype(np.uint16)
    for name in REMOVED:
        write_slices(tmp_path / name, stored, **{name: GONE})
    write_slices(tmp_path / "none of them", stored, **dict.fromkeys(REMOVED, GONE))
    cases = write_list(tmp_path / "c.jsonl", *(tmp_path / name for name in (*REMOVED, "none of them")))
    results = segment(pack, tmp_path / "out", cases=cases, dicom_seg=True)
    assert {entry["state"] for entry in results["cases"]} == {"done"}, results["cases"]
    written = pydicom.dcmread(tmp_path / "out" / "none of them" / "segmentation.dcm")
    source = pydicom.dcmread(next((tmp_path / "none of them").iterdir()))
    assert written.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert written.PatientID in ("", None)
    mask = nib.load(tmp_path / "out" / "none of them" / "liver.nii.gz").get_fdata() > 0
    read = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "out" / "none of them" / "segmentation.dcm")))
    assert (read > 0).sum() == mask.sum() > 0


@pytest.mark.case("dicom_seg_lost_work")
def test_a_dicom_seg_that_cannot_be_is_refused_before_the_network_runs(pack: Path, tmp_path: Path) -> None:
    write_slices(tmp_path / "series", (voxels() + 1024).astype(np.uint16), FrameOfReferenceUID=GONE)
    plans = Plans()
    entry = segment(pack, tmp_path / "out", plans, image=tmp_path / "series", dicom_seg=True)["cases"][0]
    assert entry["state"] == "failed"
    assert "no DICOM-SEG can refer to its slices" in entry["error"]
    assert plans.count == 0
    with pytest.raises(DataError, match="no DICOM-SEG can refer to its slices"):  # the same from Python
        write_dicom_seg(tmp_path / "seg.dcm", read_volume(tmp_path / "series"), {"liver": voxels() > 0})
    entry = segment(pack, tmp_path / "out", plans, image=tmp_path / "series", dicom_seg=True, grid="processed")["cases"][0]
    assert "--grid processed" in entry["error"]
    assert segment(pack, tmp_path / "out", image=tmp_path / "series")["cases"][0]["state"] == "done"


def test_a_result_without_a_voxel_has_masks_and_no_dicom_seg(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slices(tmp_path / "series", (voxels() + 1024).astype(np.uint16))
    manifest = json.loads((pack / "manifest.json").read_text())
    manifest["preprocessing"]["threshold"] = 0.999999  # nothing is above it
    own = tmp_path / "pack"
    subprocess.run(["cp", "-r", pack, own], check=True)
    (own / "manifest.json").write_text(json.dumps(manifest))
    entry = segment(own, tmp_path / "out", image=tmp_path / "series", dicom_seg=True)["cases"][0]
    assert entry["volume_ml"] == {"liver": 0.0}
    assert entry["state"] == "done"
    assert "no label has a voxel, so there is no segmentation.dcm" in entry["notes"]
    assert nib.load(tmp_path / "out" / "series" / "liver.nii.gz").shape == SHAPE


@pytest.mark.case("dicom_seg_lost_work")
def test_a_file_beside_the_masks_that_fails_costs_no_mask_and_is_said(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    plans = Plans(lambda: image.write_bytes(b"\x1f\x8b"))  # damaged when its copy is to be made
    results = segment(pack, tmp_path / "out", plans, image=image)
    assert results["counts"] == {"done": 0, "skipped": 0, "failed": 1}
    entry, folder = results["cases"][0], tmp_path / "out" / "ct"
    assert "the masks are written, but not image.nii.gz" in entry["error"]
    record = json.loads((folder / "case.json").read_text())
    assert (record["state"], list(record["not_written"])) == ("incomplete", ["image.nii.gz"])
    assert nib.load(folder / "liver.nii.gz").shape == SHAPE
    assert not (folder / "image.nii.gz").exists()
    save(image)
    assert segment(pack, tmp_path / "out", image=image)["counts"]["done"] == 1  # not taken for finished
    assert json.loads((folder / "case.json").read_text())["not_written"] == {}


@pytest.mark.parametrize(("name", "packed"), [("ct.nii", True), ("ct.nii.gz", False)])
def test_packed_under_a_plain_name_and_the_other_way(pack: Path, tmp_path: Path, name: str, packed: bool) -> None:
    content = save(tmp_path / "plain.nii").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert segment(pack, tmp_path / "out", image=tmp_path / name)["counts"]["done"] == 1
    for file in (tmp_path / "out" / "ct").glob("*.nii.gz"):
        assert gzip.decompress(file.read_bytes())
        assert SimpleITK.ReadImage(str(file)).GetSize() == SHAPE


def test_a_full_disk_and_a_strangers_folder_are_said_before_the_network_runs(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, plans = save(tmp_path / "ct.nii.gz"), Plans()
    (tmp_path / "out" / "ct").mkdir(parents=True)
    (tmp_path / "out" / "ct" / "thesis.tex").write_text("years of work")
    entry = segment(pack, tmp_path / "out", plans, image=image)["cases"][0]
    assert "holds other things (thesis.tex)" in entry["error"]
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("medlore.segmenting.outputs.shutil.disk_usage", lambda _path: free)
    entry = segment(pack, tmp_path / "full", plans, image=image)["cases"][0]
    assert "0 MiB are free, and the results of ct.nii.gz need about" in entry["error"]
    assert plans.count == 0


def test_a_report_of_another_verb_is_not_replaced(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    (tmp_path / "out").mkdir()
    report = tmp_path / "out" / "report.json"
    report.write_text('{"schema": "medlore/report/1", "verb": "finetune", "state": "done"}')
    with pytest.raises(InputError, match="holds a finished run of finetune"):
        segment(pack, tmp_path / "out", image=image)
    assert "finetune" in report.read_text()


# -- no error of a library leaves a case -------------------------------------------------------------------------------


def test_no_bare_error_ends_a_dry_run_an_evaluation_or_a_cache(pack: Path, tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii.gz")
    mask = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image((voxels() > 100).astype(np.uint8), np.diag([-1.0, -1, 3, 1])), mask)
    bad = [tmp_path / f"{'b' * 300}.nii.gz", tmp_path / "lone \ud800.nii.gz"]  # OSError and UnicodeEncodeError of Python itself
    cases = write_list(tmp_path / "c.jsonl", *bad, good, mask=str(mask), mask_values={"liver": [1]})
    given = {"precision": "fp32", "picture": False, "cases": cases}
    plans = plan_cases(read_settings(SegmentSettings, model=str(pack), out=tmp_path / "out", **given))["cases"]
    assert ["error" in plan for plan in plans] == [True, True, False]
    assert all("Accepted:" in plan["error"] for plan in plans[:2])
    segment(pack, tmp_path / "out", image=good)
    with pytest.raises(StepError, match="2 case") as caught:
        evaluate_masks(tmp_path / "out", cases, out=tmp_path / "scores")
    assert len(caught.value.faults) == 2
    line = {"labels": ("liver",), "modality": "ct", "mask": mask, "other": {"mask_values": {"liver": [1]}}}
    report = build_cache([Case(image, **line) for image in (*bad, good)], tmp_path / "cache", {"spacing_mm": [1, 1, 3]})
    assert len(report.faults) == 2
    assert len(report.cases) == 1


# -- the cost of a case ------------------------------------------------------------------------------------------------


def _written_bytes() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts by /proc")
def test_a_case_costs_the_same_in_any_cohort(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    run = subprocess.run
    monkeypatch.setattr("medlore.runs.report.subprocess.run", lambda words, **how: asked.append(words) or run(words, **how))
    cost = {}
    for count in (40, 400):
        cases = write_list(tmp_path / f"{count}.jsonl", *(tmp_path / f"none{number:04}.nii.gz" for number in range(count)))
        before, asked[:] = _written_bytes(), []
        assert segment(pack, tmp_path / f"out{count}", cases=cases)["counts"]["failed"] == count
        cost[count] = (_written_bytes() - before) / count
        assert len(asked) <= 2  # commit and status, once
    assert cost[400] < 1.2 * cost[40]
    assert not list((tmp_path / "out400").glob("*.jsonl"))


def test_entries_of_a_run_that_goes_on_can_be_read(pack: Path, tmp_path: Path) -> None:
    cases = write_list(tmp_path / "c.jsonl", tmp_path / "none.nii.gz", save(tmp_path / "ct.nii.gz"))
    seen: list[Any] = []

    def look() -> None:
        seen.append(json.loads((tmp_path / "out" / "report.cases.jsonl").read_text()))
        seen.append(json.loads((tmp_path / "out" / "report.json").read_text())["state"])

    segment(pack, tmp_path / "out", Plans(look), cases=cases)
    assert seen[0]["state"] == "failed"
    assert seen[1] == "running"
