"""Every verb imports what it uses and nothing else that is heavy: one fresh process each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

_LOADED = "import sys; loaded = {name for name in {heavy} if name in sys.modules}; assert not loaded, loaded"
_OF_NO_SEGMENTER = ["matplotlib", "transformers", "peft", "pydicom", "kornia", "sklearn", "scipy.optimize", "monai"]


def run_python(code: str, heavy: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code + "\n" + _LOADED.replace("{heavy}", repr(heavy))],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("start")
    image = np.zeros((24, 24, 24), np.int16)
    image[4:20, 4:20, 4:20] = np.random.default_rng(0).normal(100, 20, (16, 16, 16))
    nib.save(nib.Nifti1Image(image, np.diag([2.0, 2.0, 2.0, 1.0])), folder / "t1.nii.gz")
    return ["segment", "--image", str(folder / "t1.nii.gz"), "--labels", "hippocampus", "--modality", "t1", "--model", "medlore:seg-mini"]


def test_a_plan_is_made_from_headers_alone(words: list[str], tmp_path: Path) -> None:
    code = f"from medlore.cli import main; assert main({[*words, '--out', str(tmp_path / 'o'), '--dry-run']!r}) == 0"
    run_python(code, ["torch", "scipy.ndimage", "scipy.linalg", *_OF_NO_SEGMENTER])


def test_segmenting_a_nifti_file_needs_torch_and_little_else(words: list[str], tmp_path: Path) -> None:
    code = f"from medlore.cli import main; assert main({[*words, '--out', str(tmp_path / 'o')]!r}) == 0"
    run_python(code, _OF_NO_SEGMENTER)
    assert (tmp_path / "o" / "t1" / "quality_control.png").is_file()


def test_methods_without_factors_need_no_peft() -> None:
    code = """
import types
import torch
import medlore.tuning.finetune
from medlore.layers.tuning.interface import Request
from medlore.layers.tuning.methods import install_method
class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    def forward(self, pixel_values):
        return types.SimpleNamespace(logits=self.head(self.body(pixel_values)))
for name in ("linear-probe", "bitfit", "full"):
    tuning = install_method(name, Network(), Request(head="head", sample=torch.zeros(1, 4)))
    assert any(parameter.requires_grad for parameter in tuning.model.parameters())
"""
    run_python(code, ["peft", "matplotlib", "kornia", "pydicom", "sklearn", "scipy.optimize"])
