"""`medlore segment` as a user runs it: exit statuses, what goes where, and a plan that needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlore.cli import main
from small_segmenter import write_small_pack


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segment")
    write_small_pack(folder / "pack", roi_size=(32, 32, 16))
    array = np.full((30, 30, 14), -1000, np.int16)
    array[3:-3, 3:-3, 2:-2] = np.random.default_rng(0).normal(50, 60, (24, 24, 10))
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1, 3, 1])), folder / "ct.nii.gz")
    return folder


def call(work: Path, *arguments: str, out: str = "out") -> int:
    return main(["segment", *arguments, "--model", str(work / "pack"), "--out", str(work / out), "--no-amp", "--no-picture"])


def test_one_image_and_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--image", str(work / "ct.nii.gz"), "--labels", "liver,spleen", "--modality", "ct")
    assert call(work, *arguments, "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["counts"] == {"done": 1, "skipped": 0, "failed": 0}
    assert "about" in printed.err  # the plan was printed before the run
    assert call(work, *arguments) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert (work / "out" / "ct" / "prediction.nii.gz").is_file()


def test_a_failed_case_exits_1_and_wrong_use_exits_2(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "bad.jsonl").write_text('{"image": "none.nii.gz", "label": ["liver"], "modality": "ct"}\n')
    assert call(work, str(work / "bad.jsonl")) == 1
    assert "no such file" in capsys.readouterr().err
    (work / "broken.jsonl").write_text("{\n")
    assert call(work, str(work / "broken.jsonl")) == 2
    assert "line 1: not JSON" in capsys.readouterr().err
    assert call(work) == 2
    assert "neither a list of cases nor an image" in capsys.readouterr().err
    assert call(work, "--image", str(work / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", "--overlap", "1.5") == 2
    assert "overlap" in capsys.readouterr().err
    assert call(work, "--image", str(work / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", "--memory", "much") == 2
    assert "6GiB" in capsys.readouterr().err
    (work / "file").touch()
    assert call(work, "--image", str(work / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", out="file/out") == 1
    assert "cannot be written" in capsys.readouterr().err.replace("could not", "cannot")


def test_the_plan_imports_no_torch(work: Path) -> None:
    """So that `--dry-run` answers in well under three seconds."""
    code = (
        "import sys; from medlore.cli import main; "
        f"status = main(['segment', '--image', {str(work / 'ct.nii.gz')!r}, '--labels', 'all', '--modality', 'ct', "
        f"'--model', {str(work / 'pack')!r}, '--out', {str(work / 'plan')!r}, '--dry-run']); "
        "sys.exit(status or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "windows" in done.stdout
    assert not (work / "plan").exists()


def test_the_plan_exits_1_when_a_case_cannot_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "text.nii.gz").write_text("no image, just words " * 30)
    assert call(work, "--image", str(work / "text.nii.gz"), "--labels", "liver", "--modality", "ct", "--dry-run") == 1
    assert "a text file" in capsys.readouterr().out


@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--labels", "livr"), "'liver'"),
        (("--modality", "x-ray"), "unknown name 'x-ray'"),
        (("--orientation", "XYZ"), "unknown name 'XYZ'"),
        (("--region", "elbow"), "unknown name 'elbow'"),
        (("--roi-size", "33,32,16"), "give 32,32,16"),
        (("--roi-size", "33,32"), "roi_size"),
        (("--workers", "0", "--grid", "moon"), "2 faults"),
    ],
)
def test_a_fault_in_the_flags_is_wrong_use(
    work: Path, flags: tuple[str, ...], said: str, plan: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--labels": "liver", "--modality": "ct", **dict(zip(flags[::2], flags[1::2], strict=True))}
    arguments = [word for pair in given.items() for word in pair]
    assert call(work, "--image", str(work / "ct.nii.gz"), *arguments, *plan, out="wrong") == 2
    assert said in capsys.readouterr().err
    assert not (work / "wrong").exists()


def test_dicom_seg_of_another_file_fails_before_the_work(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--image", str(work / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", "--dicom-seg")
    assert call(work, *arguments, out="seg") == 1
    said = capsys.readouterr().err
    assert "not DICOM" in said
    assert "windows" not in said  # not even planned
