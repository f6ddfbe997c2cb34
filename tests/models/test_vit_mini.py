"""The shipped backbone: an ordinary transformers folder, small enough, and worth more than its random start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from maintenance.pretrain_network import build_vit
from maintenance.pretrain_settings import PretrainSettings
from maintenance.transfer import measure_transfer

from medlore.assets import asset_path
from medlore.data.images.reading import read_images
from medlore.models.backbones.reading import load_backbone

FOLDER = asset_path("medlore:vit-mini")
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_is_an_ordinary_transformers_folder() -> None:
    from transformers import AutoImageProcessor, ViTModel

    model, report = ViTModel.from_pretrained(FOLDER, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        tokens = model(pixel_values=torch.zeros(1, 3, 64, 64)).last_hidden_state
    assert tokens.shape == (1, 65, 256)
    processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    backbone = load_backbone("medlore:vit-mini", classes=3)
    assert (backbone.image_size, backbone.mean, backbone.std) == (64, tuple(processor.image_mean), tuple(processor.image_std))
    assert backbone.statistics_from == "checkpoint"


def test_it_is_small_and_its_weights_are_healthy() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 11.5e6
    parameters = sum(p.numel() for p in load_backbone("medlore:vit-mini", classes=2).model.vit.parameters())
    assert 2e6 < parameters < 6e6
    assert f"{parameters:,} parameters" in CARD


@pytest.mark.parametrize("name", ["flowers5.zip", "pneumoniamnist_modified.npz"])
def test_frozen_features_beat_the_untrained_network(shared_data: Path, name: str) -> None:
    found = measure_transfer("medlore:vit-mini", read_images(shared_data / name), shots=20, draws=5)
    assert found.gain.mean >= 0.10
    assert found.gain.excludes_zero
    row = next(line for line in CARD.splitlines() if line.startswith(f"| {Path(name).stem} |"))
    on_card = [float(value) for value in re.findall(r"\| (0\.\d{3}) \(", row)]
    assert [found.trained.mean, found.untrained.mean, found.gain.mean] == pytest.approx(on_card, abs=0.01)


def test_the_untrained_network_has_the_shape_of_the_shipped_one() -> None:
    random = build_vit(PretrainSettings(archives=()), 2).vit.state_dict()
    shipped = load_backbone("medlore:vit-mini", classes=2).model.vit.state_dict()
    assert {k: v.shape for k, v in random.items()} == {k: v.shape for k, v in shipped.items()}
    assert not any(torch.equal(random[k], shipped[k]) for k in random if random[k].ndim == 2)


def test_the_card_names_data_and_licences() -> None:
    manifest = json.loads((FOLDER / "config.json").read_text())
    assert manifest["model_type"] == "vit"
    for word in ("Tiny-ImageNet", "MedNIST", "CC BY-SA 4.0", "non-commercial", "pretrain-vit-mini-3.yaml", "CXR"):
        assert word in CARD, word
