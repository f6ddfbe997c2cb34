"""Frozen features side by side: splits that share nothing, scores that mean something, a bar that can be missed."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maintenance import frozen_features as frozen
from maintenance import labelled_sets as labelled


def made_set(labels: Any, groups: list[str]) -> Any:
    labels = np.asarray(labels, dtype=np.int64)
    classes = tuple("abc"[: labels.shape[1]] if labels.ndim == 2 else "abc"[: labels.max() + 1])
    return frozen.LabelledSet("made", classes, np.zeros((len(labels), 4, 4, 3), np.uint8), labels, tuple(groups))


def test_no_group_is_on_both_sides_and_every_class_has_its_shots() -> None:
    labels = np.arange(90) % 3
    data = made_set(labels, [f"person {i // 6}" for i in range(90)])
    split = frozen.split_set(data, shots=4, draws=5, most=1000)
    held = {data.groups[i] for i in split.test}
    assert len(held) == 6  # 40 % of 15
    assert len(split.test) == 36
    assert len({tuple(rows) for rows in split.draws}) == 5
    for rows in split.draws:
        assert not held & {data.groups[i] for i in rows}
        assert np.bincount(labels[rows]).tolist() == [4, 4, 4]
        for k in range(3):
            assert len({data.groups[i] for i in rows if labels[i] == k}) == 4  # four persons, though each has two such images
    again = frozen.split_set(data, shots=4, draws=5, most=1000)
    assert all(np.array_equal(a, b) for a, b in zip(split.draws, again.draws, strict=True))
    assert len(frozen.split_set(data, shots=4, draws=1, most=10).test) == 10


def test_several_labels_an_image_each_get_their_shots_and_rare_ones_do_not_count() -> None:
    random = np.random.default_rng(0)
    labels = np.stack([random.random(200) < share for share in (0.5, 0.3, 0.01)], axis=1)
    data = made_set(labels, [str(i) for i in range(200)])
    split = frozen.split_set(data, shots=6, draws=3, most=1000)
    assert split.columns == (0, 1)
    for rows in split.draws:
        assert len(set(rows)) == len(rows)
        assert (data.labels[rows][:, :2].sum(0) >= 6).all()
        assert len(rows) <= 12


def test_scores_are_one_where_features_tell_and_chance_where_they_do_not() -> None:
    labels = np.arange(400) % 2
    data = made_set(labels, [str(i) for i in range(400)])
    split = frozen.split_set(data, shots=10, draws=1, most=1000)
    random = np.random.default_rng(1)
    noise = random.normal(size=(400, 5)).astype(np.float32)
    telling = noise + 30 * labels[:, None].astype(np.float32) * np.array([1, 0, 0, 0, 0], np.float32)
    assert frozen.judge(telling, data, split, split.draws[0], 1.0) == 1.0
    assert abs(frozen.judge(noise, data, split, split.draws[0], 1.0) - 0.5) < 0.12
    several = made_set(np.stack([labels, 1 - labels], axis=1), [str(i) for i in range(400)])
    split = frozen.split_set(several, shots=10, draws=1, most=1000)
    assert frozen.judge(telling, several, split, split.draws[0], 1.0) == 1.0
    assert abs(frozen.judge(noise, several, split, split.draws[0], 1.0) - 0.5) < 0.12


@pytest.mark.parametrize(
    ("gains", "shipped"),
    [
        ([0.10] * 6, True),
        ([0.07] * 6, False),  # too little in the mean
        ([0.15] * 5 + [-0.03], False),  # one set loses
        ([0.15] * 5 + [-0.01], True),
    ],
)
def test_the_bar(gains: list[float], *, shipped: bool) -> None:
    random = np.random.default_rng(0)
    old, new = frozen.Scores(), frozen.Scores()
    for name, gain in zip(frozen.REPORTING, gains, strict=True):
        before = random.normal(0.5, 0.05, 10)
        old.by_set[name] = {0.1: before.tolist()}
        new.by_set[name] = {0.1: (before + gain + random.normal(0, 0.001, 10)).tolist()}
    found = frozen.compare({"old": old, "new": new}, "old", "new", {"old": 0.1, "new": 0.1})
    assert found["mean"].mean == pytest.approx(np.mean(gains), abs=0.001)
    assert frozen.passes(found) is shipped


def test_a_mean_whose_interval_holds_zero_does_not_pass() -> None:
    old, new = frozen.Scores(), frozen.Scores()
    swings = np.array([0.9, -0.7] * 5)
    for name in frozen.REPORTING:
        old.by_set[name], new.by_set[name] = {0.1: [0.0] * 10}, {0.1: swings.tolist()}
    found = frozen.compare({"old": old, "new": new}, "old", "new", {"old": 0.1, "new": 0.1})
    assert found["mean"].mean == pytest.approx(0.1)
    assert not frozen.passes(found)


def test_the_penalty_is_chosen_on_development_sets_alone() -> None:
    scores = frozen.Scores(
        {"natural": {c: [0.4 + 0.1 * (c == 1e-2)] for c in frozen.PENALTIES}, "skin": {c: [float(c == 1.0)] for c in frozen.PENALTIES}}
    )
    assert scores.penalty(frozen.DEVELOPMENT) == 1e-2


def test_a_network_is_measured_once_and_the_table_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import ViTConfig, ViTModel

    data, folder = tmp_path / "data", tmp_path / "network"
    data.mkdir()
    random = np.random.default_rng(0)
    with zipfile.ZipFile(data / "made.zip", "w") as archive:
        rows = ["file,label"]
        for i in range(60):
            picture = np.clip(random.normal(60 + 100 * (i % 2), 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            archive.writestr(f"{i}.png", buffer.getvalue())
            rows.append(f"{i}.png,{'dark' if i % 2 == 0 else 'light'}")
        archive.writestr("labels.csv", "\n".join(rows))
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ViTModel(config, add_pooling_layer=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    made = labelled._Archive("made.zip")
    monkeypatch.setattr(labelled, "SETS", {"told": made, "dev": made})
    monkeypatch.setattr(frozen, "REPORTING", {"told": made})
    monkeypatch.setattr(frozen, "DEVELOPMENT", {"dev": made})
    out = tmp_path / "scores.json"
    arguments = [str(data), "--network", f"net={folder}@8", "--json", str(out), "--draws", "3"]
    assert frozen.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| told |" in table
    assert "| net (C = " in table
    held = json.loads(out.read_text())
    assert set(held["scores"]) == {"net", "net, mean", "net, both"}
    assert min(held["scores"]["net"]["told"]["1.0"]) > 0.9  # dark and light are easy for any network
    (folder / "config.json").unlink()  # whoever measures again fails
    assert frozen.main(arguments) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit, match="another file"):
        frozen.main([*arguments[:-1], "4"])
