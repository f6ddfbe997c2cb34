"""A new method, family or encoder is one object in one table: registered there and nowhere else, it works from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from medlore.cli import main
from medlore.layers.tuning.methods import METHODS
from medlore.models.backbones.families import FAMILIES, Family
from medlore.models.segmenter.encoders import ENCODERS, Encoder, LiveMaps, Sizes
from medlore.segmenting.mask_formats import MASK_FORMATS, MaskFormat
from small_segmenter import SIZES, write_small_pack
from tiny_backbone import write_backbone


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of six images: stripes along rows and along columns."""
    rng = np.random.default_rng(0)
    for name, wave in zip(("rows", "columns"), np.mgrid[:16, :16], strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            grey = (120 + 80 * np.sin(wave * 1.2 + rng.uniform(0, 6)) + rng.normal(0, 15, (16, 16))).clip(0, 255)
            Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def finetune(images: Path, out: Path, *flags: str) -> dict[str, Any]:
    common = ["finetune", "--data", str(images), "--shots", "3", "--out", str(out), "--epochs", "1", "--device", "cpu"]
    assert main([*common, *flags]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_a_method_is_one_object(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = []

    def install(*given: Any) -> Any:
        installed.append(given[0])
        return METHODS["bitfit"].install(*given)

    toy = replace(METHODS["bitfit"], install=install, learning_rate=0.02, caption="a toy")
    monkeypatch.setitem(METHODS, "toy", toy)
    report = finetune(images, tmp_path / "run", "--model", str(write_backbone(tmp_path / "vit")), "--method", "toy", "--start", "random")
    assert installed
    assert report["results"]["method"] == "toy"
    assert report["results"]["learning_rate"] == 0.02


def test_a_family_is_one_object(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16}
    t.ViTMSNModel(t.ViTMSNConfig(**sizes, patch_size=4)).save_pretrained(tmp_path / "toy")
    flags = ("--model", str(tmp_path / "toy"), "--method", "sr-lora", "--image-size", "24")
    with pytest.raises(AssertionError):
        finetune(images, tmp_path / "before", *flags)
    assert "vit_msn" in capsys.readouterr().err
    statistics = (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)
    monkeypatch.setitem(FAMILIES, "toy", Family("toy", "Toy", ("vit_msn",), statistics, lambda _: t.ViTMSNForImageClassification))
    backbone = finetune(images, tmp_path / "run", *flags)["results"]["backbone"]
    assert (backbone["family"], backbone["image_size"], tuple(backbone["mean"])) == ("toy", 24, statistics[0])
    assert main(["predict", str(tmp_path / "run"), str(images / "rows"), "--out", str(tmp_path / "predicted")]) == 0


class _Pyramid(nn.Module):
    """The least that an encoder can be: one convolution a stage, and their sum at full resolution."""

    class Down(nn.Module):
        def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
            super().__init__()
            pairs = zip(channels, channels[1:], strides, strict=False)
            self.convs = nn.ModuleList(nn.Conv3d(a, b, 3, stride=stride, padding=1) for a, b, stride in pairs)

        def forward(self, x: Tensor) -> list[Tensor]:
            maps = []
            for conv in self.convs:
                x = conv(x).tanh()
                maps.append(x)
            return maps

    class Up(nn.Module):
        def __init__(self, features: Sequence[int]) -> None:
            super().__init__()
            self.mix = nn.Conv3d(sum(features), features[0], 1)

        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            sides = maps[0].shape[2:]
            whole = [nn.functional.interpolate(m, size=sides) for m in maps]
            maps.clear()
            return [self.mix(torch.cat(whole, dim=1))]

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.encoder = self.Down((config.image_channels, *config.features), config.strides)
        self.decoder = self.Up(config.features)


def _targets(config: Sizes) -> dict[str, int]:
    return {f"encoder.convs.{i}": 1 for i in range(len(config.features))}


def test_an_encoder_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from medlore.errors import InputError

    with pytest.raises(InputError) as refused:
        replace(SIZES, encoder="toy")
    assert refused.value.faults == ("encoder 'toy' is none of unet",)
    monkeypatch.setitem(ENCODERS, "toy", Encoder("a toy", _Pyramid, _targets, LiveMaps(full=4, half=4, ready=4)))
    pack = write_small_pack(tmp_path / "pack", roi_size=(32, 32, 16), sizes=replace(SIZES, encoder="toy"))
    assert json.loads((pack / "manifest.json").read_text())["config"]["encoder"] == "toy"
    array = np.random.default_rng(0).normal(50, 60, (40, 36, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1])), tmp_path / "ct.nii.gz")
    asked = ["segment", "--image", str(tmp_path / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", "--device", "cpu"]
    assert main([*asked, "--model", str(pack), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert main([*asked, "--model", str(pack), "--out", str(tmp_path / "out")]) == 0
    assert nib.load(tmp_path / "out" / "ct" / "liver.nii.gz").shape == (40, 36, 20)
    assert main(["info", str(pack), "--json"]) == 0
    merged = ["export", str(pack), "--expert", "abdomen", "--out", str(tmp_path / "merged")]
    assert main(merged) == 0
    assert main([*asked, "--model", str(tmp_path / "merged"), "--out", str(tmp_path / "again")]) == 0
    one, other = (nib.load(tmp_path / out / "ct" / "liver.nii.gz").get_fdata() for out in ("out", "again"))
    assert np.mean(one != other) < 1e-3
    assert "encoder" not in write_small_pack(tmp_path / "unet", experts=False).joinpath("manifest.json").read_text()
    capsys.readouterr()


def test_a_mask_format_is_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write(folder: Path, case: Any) -> None:
        (folder / "sums.json").write_text(json.dumps({label: int(mask.sum()) for label, mask in case.on_image().items()}))

    monkeypatch.setitem(MASK_FORMATS, "toy", MaskFormat("toy", "a toy", "sums.json", write))
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(0, 60, (16, 16, 8)).astype(np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    pack = write_small_pack(tmp_path / "pack", roi_size=(16, 16, 8))
    line = ["segment", "--image", str(tmp_path / "ct.nii.gz"), "--labels", "liver", "--modality", "ct", "--model", str(pack), "--json"]
    for state in ("done", "skipped"):
        assert main([*line, "--out", str(tmp_path / "out"), "--format", "toy", "--no-picture", "--memory", "4GiB"]) == 0
        assert json.loads(capsys.readouterr().out)["counts"][state] == 1
    case = json.loads((tmp_path / "out" / "ct" / "case.json").read_text())
    assert json.loads((tmp_path / "out" / "ct" / "sums.json").read_text()) == {"liver": case["labels"][0]["voxels"]}
    assert main([*line, "--out", str(tmp_path / "none"), "--format", "tory"]) == 2
    assert "of 5 are toy" in capsys.readouterr().err
