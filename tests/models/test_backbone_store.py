"""A backbone is read once a process; nobody's training reaches anybody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from medlore.errors import InputError
from medlore.models.backbones.reading import load_backbone
from medlore.models.backbones.reading import store as backbone_store
from medlore.models.backbones.store import BackboneStore
from tiny_backbone import write_backbone


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources as they are read."""
    seen: list[str] = []
    real = backbone_store.read_backbone

    def read(source: Any, **how: Any) -> Any:
        seen.append(Path(source).name)
        return real(source, **how)

    monkeypatch.setattr(backbone_store, "read_backbone", read)
    return seen


def test_what_comes_out_is_what_load_backbone_gives_after_any_training(tmp_path: Path, reads: list[str]) -> None:
    folder, store = write_backbone(tmp_path / "model"), BackboneStore()
    for classes, seed in ((3, 1), (5, 2), (2, 1)):
        ours, alone = (
            store.load(folder, classes=classes, seed=seed, image_size=24),
            load_backbone(folder, classes=classes, seed=seed, image_size=24),
        )
        states = ours.model.state_dict(), alone.model.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert ours.describe() == alone.describe()
        assert ours.model.config.to_dict() == alone.model.config.to_dict()
        assert ours.model.num_labels == classes
        with torch.no_grad():
            for parameter in ours.model.parameters():
                parameter.fill_(7)
        ours.model.classifier = torch.nn.Identity()
    assert reads == ["model"]


def test_a_changed_file_other_settings_and_a_second_backbone_are_read_anew(tmp_path: Path, reads: list[str]) -> None:
    folder, other, store = write_backbone(tmp_path / "model"), write_backbone(tmp_path / "other", seed=1), BackboneStore()
    store.load(folder, classes=2)
    store.load(folder, classes=2, image_size=24)
    write_backbone(folder, seed=2)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    changed = store.load(folder, classes=2)
    assert reads == ["model"] * 3
    weight = changed.model.state_dict()["vit.embeddings.cls_token"]
    assert torch.equal(weight, load_backbone(folder, classes=2).model.state_dict()["vit.embeddings.cls_token"])
    store.load(other, classes=2)
    store.load(folder, classes=2)  # one is kept
    assert reads == ["model"] * 3 + ["other", "model"]


def test_answers_are_kept_for_the_backbone_that_was_asked_about(tmp_path: Path) -> None:
    folder, store, asked = write_backbone(tmp_path / "model"), BackboneStore(), []

    def ask(key: str) -> int:
        asked.append(key)
        return len(asked)

    first = store.load(folder, classes=2)
    assert store.once(first, "a", lambda: ask("a")) == 1
    assert store.once(first, "a", lambda: ask("changed by now")) == 2
    second = store.load(folder, classes=4)
    assert store.once(second, "a", lambda: ask("never")) == 1
    assert store.once(store.load(folder, classes=2), "b", lambda: ask("b")) == 3
    assert asked == ["a", "changed by now", "b"]


def test_faults_are_those_of_load_backbone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="classes"):
        BackboneStore().load(tmp_path, classes=0)
    with pytest.raises(InputError, match=r"config\.json"):
        BackboneStore().load(tmp_path, classes=2)
