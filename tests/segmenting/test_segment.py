"""`medlore segment` from list to masks: the published rules restated, the original grid, resume, bad cases, memory, workers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medlore.errors import DataError, InputError, UnknownNameError
from medlore.runs.settings_file import read_settings
from medlore.segmenting.cohort import SegmentSettings, load_model, plan_cases, segment_cases
from medlore.segmenting.labels import facts_of_bundle, facts_of_pack, route_labels
from medlore.segmenting.plan import CasePlan, NetworkSize, WindowRules, plan_case
from small_segmenter import write_small_pack


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(32, 32, 16))


def save(path: Path, *, shape=(44, 48, 30), affine: np.ndarray | None = None, seed: int = 0) -> Path:
    """A body of tissue in air."""
    rng = np.random.default_rng(seed)
    array = np.full(shape, -1000, np.int16)
    array[4:-4, 5:-5, 2:-2] = rng.normal(50, 60, tuple(n - d for n, d in zip(shape, (8, 10, 4), strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-0.9, -0.9, 2.5, 1]) if affine is None else affine), path)
    return path


def settings(pack: Path, out: Path, **values: Any) -> SegmentSettings:
    return read_settings(SegmentSettings, model=str(pack), out=out, **{"precision": "fp32", "picture": False, **values})


def write_list(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def published_masks(pack: Path, image: Path, labels: list[str], region: str) -> np.ndarray:
    """Sections 3.3 and 3.4 restated with MONAI and NumPy: two whole arrays, every window, sums in float32."""
    from monai.data import MetaTensor
    from monai.transforms import CropForeground, Orientation, Spacing

    from medlore.models.segmenter.bundle import load_segmenter

    bundle = load_segmenter(pack)
    network, queries = bundle.network(region), bundle.queries(labels, "ct")
    volume = MetaTensor(nib.load(image).get_fdata(dtype=np.float32)[None], affine=nib.load(image).affine)
    volume = Spacing((1, 1, 3), mode="bilinear")(Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(volume))
    grey = np.clip(CropForeground(allow_smaller=False)(volume).numpy()[0], -500, 1000)
    grey = (grey - grey.mean()) / grey.std()
    roi = bundle.preprocessing["roi_size"]
    padded = np.zeros([max(n, r) for n, r in zip(grey.shape, roi, strict=True)], np.float32)
    padded[tuple(slice(0, n) for n in grey.shape)] = grey
    at = np.meshgrid(*[(np.arange(r) - r // 2) / (r / 8) for r in roi], indexing="ij")
    weights = (10 * np.exp(-0.5 * sum(a**2 for a in at))).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    sums, totals = (np.zeros((len(labels), *padded.shape), np.float32) for _ in range(2))
    counts = [max(int(np.ceil(n / (r / 2))) - 1, 1) for n, r in zip(grey.shape, roi, strict=True)]
    for i, j, k in np.ndindex(*counts):
        start = [max(min(a * r // 2, n - r), 0) for a, n, r in zip((i, j, k), grey.shape, roi, strict=True)]
        box = tuple(slice(s, s + r) for s, r in zip(start, roi, strict=True))
        window = torch.from_numpy(padded[box].copy())[None, None].expand(-1, 3, -1, -1, -1)
        with torch.no_grad():
            sums[(slice(None), *box)] += torch.sigmoid(network(window, queries))[0].numpy() * weights.astype(np.float32)
        totals[(slice(None), *box)] += weights
    inside = (slice(None), *(slice(0, n) for n in grey.shape))
    return sums[inside] / totals[inside]


def test_published_rules_equal_their_plain_restatement(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    labels = ["liver", "spleen", "pancreas"]
    segment_cases(settings(pack, tmp_path / "out", image=image, labels=labels, modality="ct", published=True, grid="processed"))
    truth = published_masks(pack, image, labels, "abdomen")
    for index, label in enumerate(labels):
        mask = np.asanyarray(nib.load(tmp_path / "out" / "ct" / f"{label}.nii.gz").dataobj) > 0
        assert mask.shape == truth.shape[1:]
        differ = mask != (truth[index] > 0.5)
        assert np.abs(truth[index][differ] - 0.5).max(initial=0) < 1e-5  # ties in the last bits alone
        assert 0.02 < mask.mean() < 0.98


def test_the_fast_rules_differ_little_from_the_published_ones(pack: Path, tmp_path: Path) -> None:
    # on a grid that needs no resampling both rules crop alike, so that only half-precision sums are compared
    image = save(tmp_path / "ct.nii.gz", affine=np.diag([1.0, 1, 3, 1]))
    for name, published in (("fast", False), ("published", True)):
        segment_cases(settings(pack, tmp_path / name, image=image, labels=["liver", "spleen"], modality="ct", published=published))
    shares = []
    for label in ("liver", "spleen"):
        a, b = (np.asanyarray(nib.load(tmp_path / name / "ct" / f"{label}.nii.gz").dataobj) for name in ("fast", "published"))
        shares.append((a != b).mean())
    assert max(shares) < 0.005


@pytest.mark.parametrize(
    ("name", "labels", "modality"),
    [("totalseg/example_ct_sm", ["liver", "heart"], "ct"), ("sct/t2_t2", ["spinal cord", "left hippocampus"], "t2")],
)
def test_real_volumes_get_masks_on_their_own_grid(pack: Path, tmp_path: Path, shared_data: Path, name, labels, modality) -> None:
    image = shared_data / f"{name}.nii.gz"
    if name.startswith("totalseg"):  # every third column and row, so that the test is quick; still the real patient
        source = nib.load(image)
        nib.save(source.slicer[::3, ::3, ::2], tmp_path / "example_ct_sm.nii.gz")
        image = tmp_path / "example_ct_sm.nii.gz"
    roi = (128, 112, 16) if name.startswith("totalseg") else (56, 64, 24)
    out = tmp_path / "out"
    results = segment_cases(settings(pack, out, image=image, labels=labels, modality=modality, picture=True, roi_size=roi, overlap=0.0))
    assert results["counts"] == {"done": 1, "skipped": 0, "failed": 0}
    folder, source = out / image.name.split(".")[0], nib.load(image)
    for label in [*labels, "prediction", "image"]:
        written = nib.load(folder / f"{label}.nii.gz")
        assert written.shape == source.shape
        assert np.array_equal(written.affine, source.affine)
        for form in ("get_sform", "get_qform"):
            assert getattr(written, form)(coded=True)[1] == getattr(source, form)(coded=True)[1]
    masks = [np.asanyarray(nib.load(folder / f"{label}.nii.gz").dataobj) > 0 for label in labels]
    label_map = np.asanyarray(nib.load(folder / "prediction.nii.gz").dataobj)
    assert label_map.dtype == np.uint8
    assert np.array_equal(label_map > 0, masks[0] | masks[1])
    small, large = sorted((0, 1), key=lambda i: masks[i].sum())
    assert (label_map[masks[small]] == small + 1).all()  # small over large
    assert (label_map[masks[large] & ~masks[small]] == large + 1).all()
    record = json.loads((folder / "case.json").read_text())
    assert [entry["label"] for entry in record["labels"]] == labels
    voxel_ml = abs(np.linalg.det(source.affine[:3, :3])) / 1000
    assert record["labels"][0]["volume_ml"] == pytest.approx(masks[0].sum() * voxel_ml, abs=1e-3)
    assert json.loads((folder / "labels.json").read_text())["labels"] == {"1": labels[0], "2": labels[1]}
    assert f'"{labels[1]}"' in (folder / "labels_itksnap.txt").read_text()
    assert (folder / "quality_control.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_of_several_regions_use_several_experts(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    segment_cases(settings(pack, tmp_path / "both", image=image, labels=["liver", "heart"], modality="ct"))
    record = json.loads((tmp_path / "both" / "ct" / "case.json").read_text())
    assert record["experts"] == {"abdomen": ["liver"], "thorax": ["heart"]}
    for label in ("liver", "heart"):
        segment_cases(settings(pack, tmp_path / label, image=image, labels=[label], modality="ct"))
        one, two = (nib.load(tmp_path / out / "ct" / f"{label}.nii.gz").get_fdata() for out in (label, "both"))
        assert np.array_equal(one, two)
    segment_cases(settings(pack, tmp_path / "forced", image=image, labels=["heart"], modality="ct", region="abdomen"))
    forced = nib.load(tmp_path / "forced" / "ct" / "heart.nii.gz").get_fdata()
    assert not np.array_equal(forced, nib.load(tmp_path / "heart" / "ct" / "heart.nii.gz").get_fdata())


def test_groups_that_fit_the_memory_change_nothing(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = save(tmp_path / "ct.nii.gz")
    labels = ["liver", "spleen", "pancreas"]
    segment_cases(settings(pack, tmp_path / "one", image=image, labels=labels, modality="ct"))
    plan = json.loads((tmp_path / "one" / "ct" / "case.json").read_text())["plan"]
    room = plan["fixed_bytes"] + int(1.5 * plan["bytes_per_label"])
    segment_cases(settings(pack, tmp_path / "three", image=image, labels=labels, modality="ct", memory=str(room)))
    assert json.loads((tmp_path / "three" / "ct" / "case.json").read_text())["plan"]["passes"] == 3
    for name in [*labels, "prediction"]:
        one, three = (np.asanyarray(nib.load(tmp_path / out / "ct" / f"{name}.nii.gz").dataobj) for out in ("one", "three"))
        assert np.array_equal(one, three)
    results = segment_cases(settings(pack, tmp_path / "none", image=image, labels=labels, modality="ct", memory="100MB"))
    assert "for one label at a time" in results["cases"][0]["error"]


def test_a_cohort_goes_on_after_bad_cases_and_resumes(pack: Path, tmp_path: Path) -> None:
    save(tmp_path / "a" / "ct.nii.gz")
    save(tmp_path / "b" / "ct.nii.gz", seed=1)
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "a" / "ct.nii.gz").read_bytes()[:500])
    (tmp_path / "text.nii.gz").write_text("no image, just words " * 30)
    (tmp_path / "nothing.nii.gz").touch()
    os.mkfifo(tmp_path / "pipe.nii.gz")  # would be waited for without end
    common = {"label": ["liver"], "modality": "ct"}
    cases = write_list(
        tmp_path / "cases.jsonl",
        {"image": "a/ct.nii.gz", **common},
        {"image": "missing.nii.gz", **common},
        {"image": "cut.nii.gz", **common},
        {"image": "text.nii.gz", **common},
        {"image": "a/ct.nii.gz", "label": ["livr"], "modality": "ct"},
        {"image": "a/ct.nii.gz", "label": ["liver"], "modality": "x-ray"},
        {"image": "a/ct.nii.gz", "label": ["prostate"], "modality": "ct"},
        {"image": "nothing.nii.gz", **common},
        {"image": "pipe.nii.gz", **common},
        {"image": "b/ct.nii.gz", **common},
    )
    out = tmp_path / "out"
    first = segment_cases(settings(pack, out, cases=cases))
    assert [entry["state"] for entry in first["cases"]] == ["done", *["failed"] * 8, "done"]
    for index, message in (
        (1, "no such file"),
        (2, "cut-off"),
        (3, "a text file"),
        (4, "'liver'"),
        (5, "unknown name 'x-ray'"),
        (6, "expert for pelvis"),
        (7, "an empty file"),
        (8, "a pipe"),
    ):
        assert message in first["cases"][index]["error"]
    report = json.loads((out / "report.json").read_text())
    assert [entry["state"] for entry in report["results"]["cases"]] == [entry["state"] for entry in first["cases"]]
    written = (out / first["cases"][0]["folder"] / "case.json").stat().st_mtime_ns
    again = segment_cases(settings(pack, out, cases=cases))
    assert again["counts"] == {"done": 0, "skipped": 2, "failed": 8}
    assert (out / first["cases"][0]["folder"] / "case.json").stat().st_mtime_ns == written
    save(tmp_path / "b" / "ct.nii.gz", seed=2)  # another image under the same name
    assert segment_cases(settings(pack, out, cases=cases))["counts"] == {"done": 1, "skipped": 1, "failed": 8}
    other = segment_cases(settings(pack, out, cases=cases, resample="nearest"))
    assert other["counts"]["done"] == 2
    assert not list(out.glob(".part-*"))


def finished_cases(out: Path) -> list[Path]:
    """Folders that stand under their own name: a `*` also matches the hidden ones that are being made."""
    return [file.parent for file in out.glob("[!.]*/case.json")]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_whole_files_only(pack: Path, tmp_path: Path, kind: signal.Signals) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.nii.gz", shape=(60, 60, 20), seed=ord(name))
    cases = write_list(tmp_path / "c.jsonl", *({"image": f"{n}.nii.gz", "label": ["liver"], "modality": "ct"} for n in "abc"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medlore", "segment", str(cases), "--model", str(pack), "--out", str(out), "--no-amp", "--no-picture"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while run.poll() is None and not finished_cases(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(kind)
    status = run.wait(60)
    if kind is signal.SIGINT:
        assert status in (0, 130)  # 0 if it was done by then
        assert json.loads((out / "report.json").read_text())["state"] == ("interrupted" if status else "done")
        assert not list(out.glob(".*"))
    for folder in (p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")):
        assert {"case.json", "liver.nii.gz", "prediction.nii.gz", "image.nii.gz"} <= {p.name for p in folder.iterdir()}
        nib.load(folder / "liver.nii.gz").get_fdata()
    results = segment_cases(settings(pack, out, cases=cases))
    assert results["counts"]["failed"] == 0
    assert results["counts"]["skipped"] >= 1
    assert not list(out.glob(".part-*"))


def test_two_runs_do_not_share_a_folder(pack: Path, tmp_path: Path) -> None:
    from medlore.runs.output_lock import OutputLock

    with OutputLock(tmp_path / "out"), pytest.raises(InputError, match="another run is writing there"):
        segment_cases(settings(pack, tmp_path / "out", image=save(tmp_path / "ct.nii.gz"), labels=["liver"], modality="ct"))


def test_a_lock_that_was_just_given_back_is_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the run before may end and remove it: that lock would guard nothing."""
    import fcntl

    from medlore.runs import output_lock

    calls: list[int] = []

    def ends_meanwhile(stream: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        fcntl.flock(stream, operation)

    class Locks:
        LOCK_EX, LOCK_NB, flock = fcntl.LOCK_EX, fcntl.LOCK_NB, staticmethod(ends_meanwhile)

    monkeypatch.setattr(output_lock, "fcntl", Locks)
    with output_lock.OutputLock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(InputError, match="another run is writing there"), output_lock.OutputLock(tmp_path):
            pass
    assert not (tmp_path / ".lock").exists()


def test_a_second_run_makes_the_files_that_the_first_was_asked_to_leave_out(pack: Path, tmp_path: Path) -> None:
    common = {"image": save(tmp_path / "ct.nii.gz"), "labels": ["liver"], "modality": "ct"}
    folder = tmp_path / "o" / "ct"
    states = []
    for image_copy, picture in ((False, False), (True, False), (True, True), (False, False)):
        results = segment_cases(settings(pack, tmp_path / "o", image_copy=image_copy, picture=picture, **common))
        states.append(results["cases"][0]["state"])
        assert (folder / "image.nii.gz").is_file() or not image_copy
        assert (folder / "quality_control.png").is_file() or not picture
    assert states == ["done", "done", "done", "skipped"]
    (folder / "liver.nii.gz").unlink()
    assert segment_cases(settings(pack, tmp_path / "o", picture=True, **common))["counts"]["done"] == 1
    assert (folder / "liver.nii.gz").is_file()


def test_masks_corrected_by_hand_outlive_another_run(pack: Path, tmp_path: Path) -> None:
    common = {"image": save(tmp_path / "ct.nii.gz"), "modality": "ct"}
    folder = tmp_path / "o" / "ct"
    segment_cases(settings(pack, tmp_path / "o", labels=["liver", "spleen"], **common))
    (folder / "liver.nii.gz").write_bytes(b"corrected")
    (folder / "page.html").write_text("mine")
    results = segment_cases(settings(pack, tmp_path / "o", labels=["liver"], **common))
    assert (folder / "kept" / "liver.nii.gz").read_bytes() == b"corrected"
    assert (folder / "page.html").read_text() == "mine"
    assert nib.load(folder / "liver.nii.gz").shape == (44, 48, 30)
    assert not (folder / "spleen.nii.gz").exists()  # written by the run before, and no longer asked for
    assert "kept/liver.nii.gz, page.html" in results["cases"][0]["notes"][-1]


def test_overlap_rule_given_lets_later_labels_win(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    segment_cases(settings(pack, tmp_path / "o", image=image, labels=["liver", "spleen"], modality="ct", overlap_rule="given"))
    folder = tmp_path / "o" / "ct"
    spleen = np.asanyarray(nib.load(folder / "spleen.nii.gz").dataobj) > 0
    assert (np.asanyarray(nib.load(folder / "prediction.nii.gz").dataobj)[spleen] == 2).all()


def test_windows_without_body_are_skipped(pack: Path, tmp_path: Path) -> None:
    array = np.full((120, 30, 12), -1000, np.int16)
    array[:20, 5:25, 2:10] = array[-20:, 5:25, 2:10] = np.arange(8) * 10
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1])), tmp_path / "ct.nii.gz")
    segment_cases(settings(pack, tmp_path / "o", image=tmp_path / "ct.nii.gz", labels=["liver"], modality="ct"))
    windows = json.loads((tmp_path / "o" / "ct" / "case.json").read_text())["windows"]
    assert 0 < windows["skipped_without_body"] < windows["all"]


def test_region_all_synonyms_and_wrong_labels(pack: Path) -> None:
    facts = facts_of_pack(pack)
    assert facts is not None
    everything = route_labels(facts, ["all"], "ct")
    assert set(everything.by_region) <= {"abdomen", "thorax", "brain", "spine", "whole body"}
    assert "liver" in everything.by_region["abdomen"]
    assert set(route_labels(facts, ["abdomen"], "ct").by_region) == {"abdomen"}
    assert route_labels(facts, ["Kidney_left", "left kidney"], "ct").labels == ("left kidney",)
    assert route_labels(facts, ["liver"], "ct", dataset="AMOS22_CT_abdomen").by_region == {"abdomen": ["liver"]}
    with pytest.raises(InputError, match="'liver'"):
        route_labels(facts, ["livr", "spleeen"], "ct")
    with pytest.raises(InputError, match="expert for pelvis"):
        route_labels(facts, ["prostate"], "ct")
    with pytest.raises(UnknownNameError, match="modality"):
        route_labels(facts, ["liver"], "xray")


def test_facts_of_the_manifest_are_those_of_the_model(pack: Path, tmp_path: Path) -> None:
    model = load_model(settings(pack, tmp_path, image=pack, labels=["liver"], modality="ct"))
    light, full = facts_of_pack(pack), facts_of_bundle(model.bundle)
    assert light is not None
    assert (light.experts, light.region, light.prompts, light.preprocessing) == (
        full.experts,
        full.region,
        full.prompts,
        full.preprocessing,
    )
    assert light.size.channels == full.size.channels
    assert light.size.parameters >= full.size.parameters


def test_wrong_use(pack: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "ct.nii.gz")
    with pytest.raises(InputError, match="--labels"):
        segment_cases(settings(pack, tmp_path / "o", image=image))
    with pytest.raises(InputError, match="--modality"):
        segment_cases(settings(pack, tmp_path / "o", image=image, labels=["liver"]))
    with pytest.raises(InputError, match="neither a list of cases nor an image"):
        segment_cases(settings(pack, tmp_path / "o"))
    (tmp_path / "broken.jsonl").write_text("{\n[]\n")
    with pytest.raises(DataError, match="line 2"):
        segment_cases(settings(pack, tmp_path / "o", cases=tmp_path / "broken.jsonl"))
    assert not (tmp_path / "o").exists()


def test_a_folder_of_volumes_and_the_plan(pack: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.nii.gz")
    save(tmp_path / "in" / "b.nii", seed=1)
    chosen = settings(pack, tmp_path / "o", cases=tmp_path / "in", labels=["liver", "heart"], modality="ct")
    plan = plan_cases(chosen)
    assert [case["name"] for case in plan["cases"]] == ["a", "b"]
    assert plan["cases"][0]["plan"]["passes"] == 2
    assert not (tmp_path / "o").exists()
    assert segment_cases(chosen)["counts"]["done"] == 2


def test_dicom_in_and_dicom_seg_out(pack: Path, tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[1] / "data" / "test_dicom.py"
    spec = importlib.util.spec_from_file_location("dicom_files", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.write_series(tmp_path / "series")
    results = segment_cases(settings(pack, tmp_path / "o", cases=tmp_path / "series", labels=["liver", "spleen"], dicom_seg=True))
    assert results["counts"]["done"] == 1, results
    folder = tmp_path / "o" / "series"
    assert (folder / "segmentation.dcm").is_file()
    assert nib.load(folder / "liver.nii.gz").shape == made.SHAPE


def test_results_of_older_rules_are_made_anew(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(pack, tmp_path / "o", image=save(tmp_path / "ct.nii.gz"), labels=["liver"], modality="ct")
    assert segment_cases(chosen)["counts"]["done"] == 1
    assert segment_cases(chosen)["counts"]["skipped"] == 1
    monkeypatch.setattr("medlore.segmenting.cohort.RULES_VERSION", 10**6)
    assert segment_cases(chosen)["counts"]["done"] == 1


def test_workers_share_the_memory(pack: Path, tmp_path: Path) -> None:
    common = {"image": save(tmp_path / "ct.nii.gz"), "labels": ["liver"], "modality": "ct", "memory": "8GiB"}
    for workers in (1, 4):
        chosen = settings(pack, tmp_path / "o", workers=workers, **common)
        assert plan_cases(chosen)["cases"][0]["plan"]["memory_bytes"] == (8 << 30) // workers
        assert load_model(chosen).memory_bytes == (8 << 30) // workers


def test_the_plan_counts_a_gpu_by_its_own_memory() -> None:
    routes = {"abdomen": [f"label {i}" for i in range(40)]}
    size, rules = NetworkSize(32, 57_000_000, 40_000_000), WindowRules((288, 288, 96), 0.5, (1.0, 1.0, 3.0), bytes_per_number=2)

    def plan(host: int, device: int | None) -> CasePlan:
        shape, affine = (512, 512, 300), np.diag([0.8, 0.8, 1.5, 1])
        return plan_case(shape, affine, routes, size, rules, memory_bytes=host << 30, where="ct", device_memory_bytes=device)

    on_host, both = plan(64, None), plan(64, 16 << 30)
    assert on_host.device is None
    assert both.device is not None
    assert both.passes == 1
    assert both.fixed_bytes < on_host.fixed_bytes  # the maps lie on the device
    assert "on the device" in both.in_words()
    narrow = plan(64, both.device.fixed_bytes + 10 * both.device.bytes_per_label)
    assert narrow.passes == 4
    with pytest.raises(InputError, match="memory of the device"):
        plan(64, 1 << 30)
    with pytest.raises(InputError, match="--memory"):
        plan(1, 16 << 30)


@pytest.mark.full
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_give_the_same_masks(pack: Path, tmp_path: Path, engine: str) -> None:
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", seed=ord(name))
    cases = write_list(
        tmp_path / "c.jsonl", *({"image": str(tmp_path / f"{n}.nii.gz"), "label": ["liver"], "modality": "ct"} for n in "ab")
    )
    segment_cases(settings(pack, tmp_path / "one", cases=cases))
    results = segment_cases(settings(pack, tmp_path / "two", cases=cases, engine=engine, workers=2))
    assert results["counts"]["done"] == 2, results
    for name in "ab":
        one, two = (nib.load(tmp_path / out / name / "liver.nii.gz").get_fdata() for out in ("one", "two"))
        assert np.array_equal(one, two)


@pytest.mark.full
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_run(pack: Path, tmp_path: Path, kind: signal.Signals) -> None:
    names = [f"{n}.nii.gz" for n in range(8)]
    for number, name in enumerate(names):
        save(tmp_path / name, shape=(60, 60, 20), seed=number)
    cases = write_list(tmp_path / "c.jsonl", *({"image": name, "label": ["liver"], "modality": "ct"} for name in names))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medlore", "segment", str(cases), "--model", str(pack), "--out", str(out), "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while run.poll() is None and not finished_cases(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert run.poll() is None, "it was done before it could be stopped"
    run.send_signal(kind)
    assert run.wait(30) != 0
    deadline = time.monotonic() + 10
    while _alive(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(run.pid)  # no worker outlives its run
    for folder in (p for p in out.iterdir() if p.is_dir() and not p.name.startswith(".")):
        assert {"case.json", "liver.nii.gz", "prediction.nii.gz", "image.nii.gz"} <= {p.name for p in folder.iterdir()}
    if kind is signal.SIGINT:
        assert not list(out.glob(".*"))


def _alive(session: int) -> bool:
    """Whether a process of a session is left; the resource tracker of Python ends by itself."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z" and "resource_tracker" not in command:
            return True
    return False
