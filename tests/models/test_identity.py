"""What a tuned network keeps of its backbone: a hash that changes with the weights and not with the words of the model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medlore.assets import EARLIER_HASHES, asset_path
from medlore.files import sha256_of
from medlore.models.backbones.identity import backbone_hash
from medlore.models.backbones.reading import load_backbone

VIT = "medlore:vit-mini"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(asset_path(VIT), tmp_path / "vit"))


def test_another_card_is_the_same_backbone(folder: Path) -> None:
    before = load_backbone(folder, classes=2)
    whole = sha256_of(folder)
    assert before.sha256 is not None
    assert before.has_hash(whole), "cards of earlier versions keep the hash of the whole folder"
    (folder / "README.md").write_text("other words\n", encoding="utf-8")
    (folder / "LICENSE").write_text("terms\n", encoding="utf-8")
    after = load_backbone(folder, classes=2)
    assert after.sha256 == before.sha256
    assert after.has_hash(before.sha256)
    assert not after.has_hash(whole), "a stranger's folder whose files changed cannot be told from another one"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_another_file_that_decides_is_another_backbone(folder: Path, name: str) -> None:
    before = backbone_hash(folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert backbone_hash(folder) != before


def test_adapters_of_earlier_versions_know_the_shipped_backbone(folder: Path) -> None:
    shipped = load_backbone(VIT, classes=2)
    (folder / "README.md").write_text("other words\n", encoding="utf-8")
    for digest in EARLIER_HASHES[VIT]:
        assert shipped.has_hash(digest)
        assert not load_backbone(folder, classes=2).has_hash(digest)
    assert not shipped.has_hash("0" * 64)
