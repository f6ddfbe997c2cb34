"""A MONAI bundle gives the masks of its pack without MedLoRE: run by `python -m monai.bundle run` in a process that cannot import it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medlore.cli import main
from medlore.data.volumes.windows import sliding_windows
from medlore.segmenting.segmenter import load_segmenter
from small_segmenter import write_small_pack

TURN = np.array([[0.96, -0.28, 0, 12], [0.28, 0.96, 0, -30.5], [0, 0, 2.5, 7], [0, 0, 0, 1]]) @ np.diag([-1.4, 1.2, 1.0, 1.0])
# MONAI imports every reader that it finds; medlore is hidden from it
PROGRAM = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "medlore":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import runpy
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def body(modality: str, shape: tuple[int, int, int] = (40, 44, 22)) -> np.ndarray[Any, Any]:
    """Smooth tissue in air."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(1)
    tissue = gaussian_filter(rng.normal(0, 1, shape), 2)
    array = 40 + 90 * tissue / tissue.std() if modality == "ct" else 300 + 80 * tissue / tissue.std()
    inside = np.zeros(shape, bool)
    inside[5:-4, 6:-5, 3:-2] = True
    return np.where(inside, array, -1000 if modality == "ct" else 0).astype(np.float32)


def run_bundle(folder: Path, image: Path, out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Label -> mask, of a run in a process of its own."""
    line = [
        sys.executable,
        "-c",
        PROGRAM,
        "run",
        "--config_file",
        "configs/inference.json",
        "--image",
        str(image),
        "--output_dir",
        str(out),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = json.loads((folder / "configs" / "metadata.json").read_text())["files"]
    stem = image.name.removesuffix(".nii.gz")
    found = {}
    for label, name in files.items():
        mask = nib.load(out / stem / f"{stem}_{name}.nii.gz")
        np.testing.assert_allclose(mask.affine, nib.load(image).affine, atol=1e-4)
        found[label] = np.asarray(mask.dataobj) > 0
    return found


@pytest.mark.parametrize(("modality", "expert"), [("ct", "abdomen"), pytest.param("mri", "abdomen", marks=pytest.mark.full)])
def test_a_bundle_runs_without_medlore_to_the_masks_of_its_pack(
    modality: str, expert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = write_small_pack(tmp_path / "pack", roi_size=(24, 24, 16), spacing_mm=(1.2, 1.0, 3.0))
    line = ["export", str(pack), "--out", str(tmp_path / "bundle"), "--format", "monai-bundle", "--expert", expert, "--modality", modality]
    assert main([*line, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["notes"] == []
    assert summary["largest_difference"] < 1e-5
    nib.save(nib.Nifti1Image(body(modality), TURN), tmp_path / "image.nii.gz")
    theirs = run_bundle(tmp_path / "bundle", tmp_path / "image.nii.gz", tmp_path / "masks")
    # the arithmetic of the pack itself: what a CPU does faster (another form of the convolutions, sums in half precision) differs by more
    monkeypatch.setattr("medlore.segmenting.model.ready_for_cpu", lambda network, _: network)
    exact = functools.partial(sliding_windows, accumulate=torch.float32)
    monkeypatch.setattr("medlore.segmenting.model.sliding_windows", exact)
    segmenter = load_segmenter(pack, precision="fp32", check="none")
    ours = segmenter.segment(tmp_path / "image.nii.gz", summary["labels"], modality=modality, region=expert)
    assert sum(ours[label].any() for label in ours.labels) > 5
    assert set(theirs) == set(ours.labels)
    for label in ours.labels:
        assert np.mean(theirs[label] != ours[label]) <= 1e-4, label


def test_what_is_not_in_a_bundle_is_said_and_what_cannot_be_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", "medlore:seg-mini", "--out", str(tmp_path / "b"), "--format", "monai-bundle"]
    assert main([*line, "--expert", "brain", "--modality", "t1"]) == 0
    said = capsys.readouterr()
    for text in ("first pass", "tissues redrawn", "stray parts"):
        assert text in said.err
        assert text in (tmp_path / "b" / "docs" / "README.md").read_text()
    assert "python -m monai.bundle run" in said.out
    for flags, words in (
        ([], "--expert: none was given"),
        (["--expert", "abdomen"], "--modality: none was given"),
        (["--expert", "abdomn", "--modality", "ct"], "'abdomen'"),
        (["--expert", "brain", "--modality", "ct"], "no label of brain in ct"),
        (["--expert", "abdomen", "--modality", "ct", "--lora-alpha", "2"], "given for a MONAI bundle"),
    ):
        assert main([*line, *flags]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.full
def test_a_real_ct_is_segmented_alike(shared_data: Path, tmp_path: Path) -> None:
    image = shared_data / "totalseg" / "example_ct_sm.nii.gz"
    line = [
        "export",
        "medlore:seg-mini",
        "--out",
        str(tmp_path / "b"),
        "--format",
        "monai-bundle",
        "--expert",
        "abdomen",
        "--modality",
        "ct",
    ]
    assert main([*line, "--quiet"]) == 0
    theirs = run_bundle(tmp_path / "b", image, tmp_path / "masks")
    ours = load_segmenter("medlore:seg-mini", precision="fp32", check="none").segment(image, list(theirs), modality="ct")
    assert ours.volumes_ml["liver"] > 500
    for label, mask in theirs.items():
        assert np.mean(mask != ours[label]) < 5e-4, label  # as it runs on a CPU, measured 2e-4
