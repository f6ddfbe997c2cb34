"""What people see: a table after `segment`, an `info` that fits a screen, `--quiet` and `-v`, no colours where none are wanted."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medlore.cli import main
from medlore.commands.screens.info import fitted
from medlore.inspecting.files import describe
from small_segmenter import write_small_pack


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_small_pack(folder / "pack", roi_size=(16, 16, 8))
    (folder / "in").mkdir()
    for number in range(3):
        array = np.random.default_rng(number).normal(40, 60, (16, 16, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "in" / f"ct{number}.nii.gz")
    return folder


def segment(work: Path, out: str, *flags: str, labels: str = "liver,left kidney") -> int:
    line = ["segment", str(work / "in"), "--labels", labels, "--modality", "ct", "--model", str(work / "pack")]
    return main([*line, "--out", str(work / out), "--no-picture", "--no-image-copy", "--precision", "fp32", *flags])


def test_segment_prints_a_row_a_label_and_where_to_look(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(work, "out") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split() == ["case", "label", "ml", "check"]
    record = json.loads((work / "out" / "ct1" / "case.json").read_text())
    for entry in record["labels"]:
        (line,) = [line for line in lines if line.startswith("ct1") and entry["label"] in line]
        assert f" {entry['volume_ml']:,.1f}" in line
    assert any("statistics.csv" in line and "medlore view" in line for line in lines)
    assert lines[-1].startswith("3 done, 0 skipped, 0 failed")
    assert "windows" in said.err


def test_many_rows_become_a_row_a_case_and_v_prints_all(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ",".join(["rib", *(f"rib {n}" for n in range(1, 13)), "lung", "liver"])
    assert segment(work, "many", labels=labels) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "labels", "ml", "check"]
    assert [line.split()[:2] for line in lines[1:4]] == [[f"ct{n}", "15"] for n in range(3)]
    assert segment(work, "many", "-v", labels=labels) == 0
    assert sum(line.startswith("ct") for line in capsys.readouterr().out.splitlines()) == 45


def test_quiet_says_the_answer_alone_and_errors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert segment(work, "quiet", "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "3 done" in said.out
    assert segment(work, "quiet", "--quiet", labels="livr") == 2
    assert "'liver'" in capsys.readouterr().err
    assert segment(work, "none", "--quiet", "-v") == 2
    assert "opposite" in capsys.readouterr().err
    assert segment(work, "loud") == 0  # the next command of the same process speaks again
    assert capsys.readouterr().err


def test_info_of_a_pack_fits_a_screen_and_v_prints_all() -> None:
    facts = {name: value for name, value in describe("medlore:seg-mini").items() if name != "notes" and value}
    lines = fitted(facts, 80)
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    for wanted in ("parameters: 1,756,793", "lower limb", "prompts: 79", "-v prints everything"):
        assert any(wanted in line for line in lines), wanted


@pytest.mark.parametrize(("flags", "whole"), [((), False), (("-v",), True)])
def test_a_terminal_of_80_by_24_shows_it_whole_without_colours(flags: tuple[str, ...], whole: bool) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color", "NO_COLOR": "1"}
    line = [sys.executable, "-m", "medlore", "info", "medlore:seg-mini", *flags]
    with subprocess.Popen(line, stdout=theirs, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environment) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            shown += part
        assert running.wait(60) == 0
    os.close(ours)
    assert b"\x1b[3" not in shown  # no colour
    count = len(shown.decode().splitlines())
    assert (count > 100) if whole else (10 < count < 24)
    assert (b"mri/left hippocampus" in shown) == whole


def test_a_coloured_error_is_plain_with_no_color() -> None:
    ours, theirs = pty.openpty()
    for no_color, coloured in (("", True), ("1", False)):
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
        line = [sys.executable, "-m", "medlore", "segmnt"]
        done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=theirs, env=environment, timeout=60, check=False)
        assert done.returncode == 2
        shown = os.read(ours, 65536)
        assert b"'segment'" in shown
        assert (b"\x1b[31m" in shown) == coloured
    os.close(ours)
    os.close(theirs)
