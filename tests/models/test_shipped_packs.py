"""A classifier pack under `medlore:NAME`: shipping one is copying its folder, with a card, into the assets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from medlore import assets
from medlore.cli import app
from medlore.decomposing.classifiers.export import is_classifier_pack
from medlore.decomposing.classifiers.ranks import adapted_layers
from medlore.layers.experts.surgery import install_experts
from medlore.models.backbones.students import build_student, feature_width
from medlore.models.classifier_pack import ExpertEntry, load_classifier_pack, save_classifier_pack
from medlore.models.multitask import MultiTaskNetwork

LARGEST_BYTES = 8 * 2**20


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small pack that lies where shipped files lie."""
    torch.manual_seed(0)
    body = build_student("shufflenet", image_size=32)
    layers = adapted_layers(body)
    install_experts(body, experts=["one"], ranks=2, targets=lambda name, _module: name in layers, scaling=2.0)
    ranks = dict.fromkeys(layers, 2)
    network = MultiTaskNetwork(body, {"one": 2}, width=feature_width(body, 32), experts=True)
    root = tmp_path / "assets"
    save_classifier_pack(
        root / "little",
        network,
        student={"kind": "shufflenet", "norm": "group", "stem_stride": 2},
        experts={"one": ExpertEntry("one", ("no", "yes"), "single", ranks)},
        preprocessing={"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
        layout="channel",
    )
    monkeypatch.setattr(assets.resources, "files", lambda _name: root)
    return "medlore:little"


def test_info_and_export_take_a_shipped_pack_by_name(shipped: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["info", shipped, "--json"])
    assert shown.exit_code == 0, shown.output
    assert [expert["expert"] for expert in json.loads(shown.stdout)["experts"]] == ["one"]
    done = CliRunner().invoke(app, ["export", shipped, "--expert", "one", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(assets.UnknownNameError, match="little"):
        load_classifier_pack("medlore:littel")


def test_every_pack_that_is_shipped_is_whole_small_and_has_a_card(tmp_path: Path) -> None:
    for name in [n for n in assets.shipped_names() if is_classifier_pack(f"medlore:{n}")]:
        folder = assets.asset_path(name)
        pack = load_classifier_pack(f"medlore:{name}")
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= LARGEST_BYTES
        card = (folder / "README.md").read_text(encoding="utf-8")
        for expert, entry in pack.experts.items():
            assert expert in card
            assert entry.metrics
            assert entry.licence != "not stated"
            logits = pack.merged(expert)(pixel_values=torch.zeros(1, 3, pack.image_size, pack.image_size)).logits
            assert logits.shape == (1, len(entry.classes))
        shutil.copytree(folder, tmp_path / name)
        weights = nn.Module.state_dict(load_classifier_pack(tmp_path / name).network)
        assert all(torch.equal(value, weights[key]) for key, value in pack.network.state_dict().items())
