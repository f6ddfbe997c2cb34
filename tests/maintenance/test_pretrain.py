"""Pre-training: archives are read whole, a resumed run equals an unbroken one, the exported folder is an ordinary ViT."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maintenance.pretrain import main, pretrain
from maintenance.pretrain_images import augment, balanced_order, mix, read_labelled_zips
from maintenance.pretrain_network import build_vit, forward_kept
from maintenance.pretrain_settings import PretrainSettings
from PIL import Image
from safetensors.torch import load_file

from medlore.errors import CheckpointError, DataError, InputError
from medlore.training.schedule import CosineOfShares


def write_archive(path: Path, classes: list[str], count: int, *, split: bool) -> None:
    """Bright, dark and coloured noise: one colour a class."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    with zipfile.ZipFile(path, "w") as archive:
        for k, name in enumerate(classes):
            for i in range(count):
                image = draw.integers(0, 60, (20, 20, 3), dtype=np.uint8)
                image[..., k % 3] += 150
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                archive.writestr(f"{name}/{i}.png", buffer.getvalue())
                rows.append({"file": f"{name}/{i}.png", "label": name} | ({"split": "val" if i == 0 else "train"} if split else {}))
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        archive.writestr("labels.csv", text.getvalue())


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    write_archive(tmp_path / "colours.zip", ["red", "green", "blue"], 12, split=True)
    write_archive(tmp_path / "more.zip", ["x", "y"], 10, split=False)
    return tmp_path


def small(**changes: Any) -> PretrainSettings:
    values: dict[str, Any] = {
        "archives": ("colours.zip", "more.zip"), "image_size": 16, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48,
        "steps": 8, "batch_size": 8, "kept_patches": 3, "full_from": 0.5, "mix_share": 0.5,
    }  # fmt: skip
    return PretrainSettings(**(values | changes))


def test_archives_join_their_classes(archives: Path) -> None:
    parts = read_labelled_zips([archives / "colours.zip", archives / "more.zip"], image_size=16, skip_classes=["green"])
    assert parts["train"].classes == ("colours:blue", "colours:red", "more:x", "more:y")
    assert parts["train"].images.shape == (2 * 11 + 2 * 9, 3, 16, 16)
    assert parts["val"].labels.tolist() == [1, 0, 2, 3]  # the order of the archives; the tenth image where no split is given
    red = parts["train"].images[parts["train"].labels == 1].float().mean((0, 2, 3))
    assert red[0] > 140 > red[1]


def test_broken_archives_are_named(archives: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.zip: no such file"):
        read_labelled_zips([archives / "gone.zip"], image_size=16)
    (archives / "text.zip").write_text("no zip")
    with pytest.raises(DataError, match=r"text\.zip: not a labelled archive"):
        read_labelled_zips([archives / "text.zip"], image_size=16)
    with zipfile.ZipFile(archives / "bad.zip", "w") as archive:
        archive.writestr("labels.csv", "file,label\na.png,a\n")
        archive.writestr("a.png", "not a picture")
    with pytest.raises(DataError, match=r"bad\.zip: a\.png: unreadable"):
        read_labelled_zips([archives / "bad.zip"], image_size=16)


def test_order_follows_the_weights_and_repeats_late() -> None:
    labels = torch.tensor([0] * 10 + [1] * 40)
    order = balanced_order(labels, torch.tensor([3.0, 1.0]), 400, torch.Generator().manual_seed(0))
    of_first = order[labels[order] == 0]
    assert 270 <= len(of_first) <= 330
    assert sorted(of_first[:10].tolist()) == list(range(10))


def test_augmentation_keeps_range_and_mixing_keeps_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    changed = augment(images, generator, smallest_area=0.4, colour=0.3, grey=1.0)
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.allclose(changed[:, 0], changed[:, 1], atol=1e-5)  # all grey
    still = augment(images, torch.Generator(), smallest_area=1.0, colour=0.0, grey=0.0)
    assert still.shape == images.shape
    for _ in range(6):
        mixed, targets = mix(images, torch.eye(6), generator, share=1.0)
        assert torch.allclose(targets.sum(1), torch.ones(6))
        assert not torch.equal(mixed, images)
    assert mix(images, torch.eye(6), generator, share=0.0)[0] is images


def test_all_patches_in_any_order_are_the_plain_forward_pass() -> None:
    model = build_vit(small(), 5).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(pixel_values=pixels).logits
        kept = forward_kept(model, pixels, torch.tensor([[3, 0, 2, 1], [1, 2, 3, 0]]))
        fewer = forward_kept(model, pixels, torch.tensor([[3, 0], [1, 2]]))
    torch.testing.assert_close(kept, plain, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fewer, plain, atol=1e-3)


def test_schedule_warms_up_and_decays() -> None:
    rate = CosineOfShares(1.0, 0.01, 0.1)
    values = [rate(s, 100) for s in range(101)]
    assert values.index(max(values)) == 10
    assert values[-1] == pytest.approx(0.01)


def test_resumed_run_ends_with_the_same_bits(archives: Path, tmp_path: Path) -> None:
    whole = pretrain(small(), archives, tmp_path / "whole")
    pretrain(small(), archives, tmp_path / "parts", halt_at=3)
    resumed = pretrain(small(), archives, tmp_path / "parts", resume=True)
    assert resumed == whole
    first, second = (load_file(tmp_path / run / "backbone" / "model.safetensors") for run in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match="other settings"):
        pretrain(small(seed=1), archives, tmp_path / "parts", resume=True)


def test_second_stage_starts_from_the_weights_of_the_first(archives: Path, tmp_path: Path) -> None:
    pretrain(small(stop_at=2), archives, tmp_path / "first")
    state = tmp_path / "first" / "state.pt"
    still = small(start_from=state, learning_rate=0.0, weight_decay=0.0, steps=1)
    assert pretrain(still, archives, tmp_path / "second")["steps"] == 1
    first, second = (torch.load(tmp_path / run / "state.pt", weights_only=True)["weights"] for run in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match=r"gone\.pt: no such file"):
        pretrain(small(start_from=tmp_path / "gone.pt"), archives, tmp_path / "third")


def test_exported_folder_is_an_ordinary_vit(archives: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTModel

    easy = small(archives=("colours.zip",), steps=40, learning_rate=3e-3, mix_share=0.0, colour=0.0, grey=0.0, ema_decay=0.5)
    results = pretrain(easy, archives, tmp_path / "run")
    assert results["validation_accuracy"] == {"colours": 1.0}  # colours are easy: the loop does learn
    folder = tmp_path / "run" / "backbone"
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    assert model(pixel_values=torch.zeros(1, 3, 16, 16)).last_hidden_state.shape == (1, 5, 32)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(Image.new("RGB", (30, 30), (255, 0, 0)), return_tensors="pt")["pixel_values"]
    assert pixels[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["state"] == "done"
    assert report["results"]["training_images"] == 3 * 11


def test_command_line_reports_faults_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("archives: [gone.zip]\nwidht: 3\n")
    assert main([str(settings), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "widht: unknown setting; the nearest are width" in capsys.readouterr().err
    settings.write_text("archives: [gone.zip]\n")
    assert main([str(settings), "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "gone.zip: no such file" in capsys.readouterr().err
