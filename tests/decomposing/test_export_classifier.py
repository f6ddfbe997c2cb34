"""An exported expert answers like the pack's, in the hands of readers that know nothing of MedLoRE."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medlore.decomposing.classifiers import export as exporting
from medlore.decomposing.classifiers.export import export_classifier
from medlore.errors import InputError, StepError, UnknownNameError
from medlore.files import read_json
from medlore.models.classifier_pack import load_classifier_pack
from small_classifier import SIZE, make_pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("pack") / "pack", "shufflenet")


@pytest.fixture(scope="module")
def wanted(pack: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images and the logits of the expert `two`, routed."""
    opened = load_classifier_pack(pack)
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        return images, opened.network(images, [("two", 3)]).logits["two"]


def test_onnx_answers_without_medlore_or_torch(pack: Path, wanted: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    images, logits = wanted
    summary = export_classifier(pack, "two", "onnx", tmp_path / "out")
    assert summary["largest_difference"] <= 1e-4
    np.savez(tmp_path / "io.npz", images=images.numpy())
    code = (
        "import sys, numpy, onnxruntime; d = sys.argv[1]\n"
        "s = onnxruntime.InferenceSession(d + '/out/model.onnx')\n"
        "y = s.run(['logits'], {'pixel_values': numpy.load(d + '/io.npz')['images']})[0]\n"
        "numpy.save(d + '/y.npy', y); assert 'torch' not in sys.modules and 'medlore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert np.abs(np.load(tmp_path / "y.npy") - logits.numpy()).max() <= 1e-4
    labels = read_json(tmp_path / "out" / "labels.json")
    assert labels["classes"] == ["a", "b", "c", "d"]
    assert summary["files"].keys() == {"model.onnx", "labels.json"}


def test_torch_export_answers_for_another_batch_size(pack: Path, wanted: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    export_classifier(pack, "two", "torch-export", tmp_path / "out")
    images, logits = wanted
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "out" / "model.pt2").module()(images), logits, atol=1e-4)


def test_safetensors_folder_of_a_transformers_student_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    pack = make_pack(tmp_path / "pack", "vit-small")
    export_classifier(pack, "one", "safetensors", tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = load_classifier_pack(pack).network(images, [("one", 2)]).logits["one"]
        assert torch.allclose(model(pixel_values=images).logits, expected, atol=1e-5)
    assert model.config.id2label == {0: "no", 1: "yes"}


def test_an_exported_expert_is_a_backbone_for_finetuning(pack: Path, wanted: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    from medlore.models.backbones.reading import load_backbone

    export_classifier(pack, "two", "safetensors", tmp_path / "out")
    images, logits = wanted
    kept = load_backbone(tmp_path / "out", classes=4, keep_head=True)
    with torch.no_grad():
        assert torch.allclose(kept.model(pixel_values=images).logits, logits, atol=1e-5)
    assert kept.interpolation == "bilinear"  # not what transformers and MedLoRE take where nothing is said
    fresh = load_backbone(tmp_path / "out", classes=7)
    assert (fresh.image_size, fresh.mean, fresh.model(pixel_values=images).logits.shape) == (SIZE, (0.5, 0.5, 0.5), (3, 7))


def test_a_resnet_with_group_norm_comes_back_with_group_norm(tmp_path: Path) -> None:
    from medlore.models.backbones.reading import load_backbone

    pack = make_pack(tmp_path / "pack", "resnet-18")
    export_classifier(pack, "one", "safetensors", tmp_path / "out")
    again = load_backbone(tmp_path / "out", classes=2, keep_head=True)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = load_classifier_pack(pack).network(images, [("one", 2)]).logits["one"]
        assert torch.allclose(again.model(pixel_values=images).logits, expected, atol=1e-5)
    assert not [m for m in again.model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_peft_loads_base_and_adapter(pack: Path, wanted: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    from peft import PeftModel

    from medlore.models.backbones.shufflenet import ShuffleNetV2

    export_classifier(pack, "two", "peft", tmp_path / "out")
    images, logits = wanted
    base = ShuffleNetV2.from_pretrained(tmp_path / "out" / "base").eval()
    with torch.no_grad():
        before = base(pixel_values=images).logits
        model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
        assert torch.allclose(model(pixel_values=images).logits, logits, atol=1e-4)
    assert not torch.allclose(before, logits, atol=1e-4)


def test_wrong_names_and_wrong_outputs_leave_nothing(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"'onxx'.*'onnx'"):
        export_classifier(pack, "two", "onxx", tmp_path / "out")
    with pytest.raises(UnknownNameError, match=r"'tow'.*'two'"):
        export_classifier(pack, "tow", "onnx", tmp_path / "out")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        export_classifier(tmp_path, "two", "onnx", tmp_path / "out")
    real = exporting._write_torch_export
    monkeypatch.setattr(exporting, "_write_torch_export", lambda *a: real(*a) + 1)
    with pytest.raises(StepError, match="outputs differ by 1"):
        export_classifier(pack, "two", "torch-export", tmp_path / "out")
    assert not (tmp_path / "out").exists()
