"""Whatever a user names may be a pipe or a device: it is refused by name, and never waited for or read without end."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.cli import main
from tiny_backbone import write_backbone

SECONDS = 60  # a pipe is waited for without end

# what is in the place of the braces is a pipe: {x.suffix}
LINES = [
    "segment {ct.nii.gz} --labels hippocampus --modality t1 --model medlore:seg-mini --out out",
    "segment {cases.jsonl} --model medlore:seg-mini --out out",
    "segment ct.nii.gz --labels hippocampus --modality t1 --model {pack.safetensors} --out out",
    "segment ct.nii.gz --labels hippocampus --modality t1 --model medlore:seg-mini --brain-mask {mask.nii.gz} --out out",
    "segment --config {settings.yaml} --out out",
    "finetune --data {set.csv} --out out",
    "finetune --data {set.npz} --out out",
    "finetune --data {set.zip} --out out",
    "finetune --data {set.txt} --out out",
    "finetune --data {set} --out out",
    "finetune --data images --test-data {test.csv} --out out",
    "finetune --data images --model {model.safetensors} --out out",
    "finetune --data images --ranks {ranks.json} --out out",
    "finetune --data images --ranks {ranks.txt} --out out",
    "finetune --data images/{a/5.png} --out out",
    "ranks {model.safetensors}",
    "ranks {model.pt}",
    "info {plan.json}",
    "info {ct.nii.gz}",
    "info {cases.jsonl}",
    "info {prompts.npz}",
    "info {set.csv}",
    "info images/{a/5.png}",
    "view {page.json}",
    "evaluate {run} --data images",
    "predict {run} images",
    "decompose {study.yaml} --out out",
    "study {study.yaml} --out out",
    "export {pack} --out out",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a small set of images and a model; what waits ends the tests."""
    import nibabel as nib

    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((8, 8), 60 * number, np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    write_backbone(tmp_path / "folder")

    faulthandler.dump_traceback_later(SECONDS, exit=True)  # an exception would be caught, and the next pipe waited for
    yield tmp_path
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("line", LINES)
def test_a_pipe_is_refused_by_name(place: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, _, rest = line.partition("{")
    inside, _, after = rest.partition("}")
    folder = before.split()[-1] if before and not before.endswith(" ") else ""
    pipe = place / folder / inside
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    named = before + (inside if not folder else "") + after
    assert main(named.split()) in (1, 2)
    said = capsys.readouterr()
    assert f"{pipe.relative_to(place)}" in said.err + said.out
    assert "device or a pipe" in said.err + said.out, said.err + said.out


def test_a_device_is_no_set_of_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--data", "/dev/zero", "--out", "out"]) == 2
    assert "/dev/zero: is a device or a pipe" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["finetune --data images --model folder --out out", "ranks folder"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_folder_with_a_pipe_is_refused(place: Path, line: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "folder" / file).unlink()
    os.mkfifo(place / "folder" / file)
    assert main(line.split()) == 2
    assert f"folder/{file}: is a device or a pipe" in capsys.readouterr().err
