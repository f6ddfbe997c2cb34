"""Parts of a cohort, by processes that know nothing of each other, give the cohort; what is missing or foreign is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medlore.cli import main
from medlore.errors import InputError
from medlore.segmenting.shards import collect
from small_segmenter import write_small_pack


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_small_pack(folder / "pack", roi_size=(16, 16, 8))
    lines = []
    for number in range(5):
        path = folder / "in" / str(number % 2) / f"ct{number // 2}.nii.gz"  # two folders with files of one name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(number).normal(40, 60, (16, 16, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
        lines.append(json.dumps({"image": str(path), "label": ["liver", "left kidney"], "modality": "ct"}))
    (folder / "cases.jsonl").write_text("\n".join(lines))
    return folder


def line(work: Path, out: Path, *flags: str) -> list[str]:
    given = ["segment", str(work / "cases.jsonl"), "--model", str(work / "pack"), "--out", str(out), "--no-picture", "--precision", "fp32"]
    return [*given, "--memory", "4GiB", *flags]


def test_shards_at_the_same_time_give_the_cohort(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    started = [
        subprocess.Popen([sys.executable, "-m", "medlore", *line(work, out, "--shard", f"{number}/3", "--quiet")]) for number in (1, 2)
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    with pytest.raises(InputError, match="3-of-3: not there"):
        collect(out)
    assert main(line(work, out, "--shard", "3/3")) == 0
    assert "medlore collect" in capsys.readouterr().out
    assert main(["collect", str(out), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["counts"] == {"done": 5, "skipped": 0, "failed": 0}
    assert [entry["index"] for entry in results["cases"]] == list(range(5))
    assert main(line(work, tmp_path / "whole")) == 0
    assert (out / "statistics.csv").read_text() == (tmp_path / "whole" / "statistics.csv").read_text()
    whole: dict[str, Any] = json.loads((tmp_path / "whole" / "report.json").read_text())["results"]
    assert [entry["folder"] for entry in whole["cases"]] == [entry["folder"] for entry in results["cases"]]
    for entry in whole["cases"]:
        one, other = (nib.load(place / entry["folder"] / "liver.nii.gz").get_fdata() for place in (out, tmp_path / "whole"))
        assert np.array_equal(one, other)
    capsys.readouterr()
    assert main(line(work, out, "--json")) == 0  # the whole list in the same place: nothing is left to do
    assert json.loads(capsys.readouterr().out)["counts"]["skipped"] == 5


def test_more_shards_than_cases_and_a_failed_case_are_no_fault_of_the_shards(work: Path, tmp_path: Path) -> None:
    lines = (work / "cases.jsonl").read_text().splitlines()[:1]
    broken = json.dumps({"image": str(tmp_path / "none.nii.gz"), "label": ["liver"], "modality": "ct"})
    (tmp_path / "few.jsonl").write_text("\n".join([*lines, broken]))
    for number in (1, 2, 3):
        arguments = line(work, tmp_path / "out", "--shard", f"{number}/3")
        arguments[1] = str(tmp_path / "few.jsonl")
        assert main(arguments) == (1 if number == 2 else 0)
    assert collect(tmp_path / "out")["counts"] == {"done": 1, "skipped": 0, "failed": 1}
    assert main(["collect", str(tmp_path / "out")]) == 1


def test_shards_of_other_settings_lists_or_counts_are_not_mixed(work: Path, tmp_path: Path) -> None:
    assert main(line(work, tmp_path / "out", "--shard", "1/2")) == 0
    assert main(line(work, tmp_path / "out", "--shard", "2/2", "--overlap", "0")) == 0
    with pytest.raises(InputError) as caught:
        collect(tmp_path / "out")
    assert caught.value.faults == ("2-of-2: another list, model or settings than 1-of-2",)
    report = tmp_path / "out" / "shards" / "2-of-2" / "report.json"
    report.write_text(report.read_text().replace('"state": "done"', '"state": "running"', 1))
    with pytest.raises(InputError, match="2-of-2: its run is running"):
        collect(tmp_path / "out")
    report.write_text("{}")
    with pytest.raises(InputError, match="2-of-2: no report of a shard"):
        collect(tmp_path / "out")
    (tmp_path / "out" / "shards" / "1-of-4").mkdir()
    with pytest.raises(InputError, match="shards of 2 and of 4"):
        collect(tmp_path / "out")
    with pytest.raises(InputError, match="holds no shards"):
        collect(work / "pack")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_what_is_no_part_is_refused(work: Path, tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line(work, tmp_path / "out", "--shard", shard)) == 2
    assert "such as 2/8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
