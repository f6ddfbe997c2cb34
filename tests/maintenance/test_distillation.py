"""The distillation that makes vit-mini: it learns, it can be gone on with to the bit, and it sees nothing that is reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maintenance.labelled_sets import is_development_class

from maintenance import distil_vit_mini as distil
from medlore.errors import CheckpointError, InputError
from medlore.training.accelerator import make_accelerator
from medlore.training.loop import train
from medlore.training.task import Stretch
from medlore.training.watching import Watcher

TINY = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48, "teacher_size": 56,
    "batch_size": 16, "kept_patches": 8, "learning_rate": 3e-3, "ema_decay": 0.9,
}  # fmt: skip


def tiny_teacher() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14, layerscale_value=1.0
        )
    )


def task_of(folder: Path, steps: int, **changes: Any) -> distil.DistilTask:
    """A run over 48 noisy images of one colour each, six classes by colour."""
    random = np.random.default_rng(0)
    labels = np.arange(48) % 6
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40], [40, 200, 200], [200, 40, 200]])
    images = np.clip(colours[labels][:, None, None] + random.normal(0, 30, (48, 32, 32, 3)), 0, 255).astype(np.uint8)
    pool = distil.Pool(images, np.where(labels == 5, -1, labels), ("a", "b", "c", "d", "e"), {"made": 48})
    settings = distil.DistilSettings(counts={"made": 48}, steps=steps, **(TINY | changes))
    store = distil.TeacherStore.open(tiny_teacher(), pool.images, settings.teacher_size, folder / "teacher")
    return distil.DistilTask(settings, pool, store, make_accelerator("cpu", "fp32"), out=folder)


class Terms(Watcher):
    """The terms of the loss, line by line."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def losses(self, stretch: Stretch) -> None:
        self.found.append(dict(stretch.terms))


def test_the_student_comes_near_the_teacher_in_all_its_losses(tmp_path: Path) -> None:
    task, terms = task_of(tmp_path, 60), Terms()
    train(task, dataclasses.replace(task.settings.in_steps(), log_every=12), watcher=terms)
    # relations within a batch of few images differ much from batch to batch: a line is the mean of a dozen of them
    first, last = terms.found[0], terms.found[-1]
    for name, share in (("class", 0.6), ("patch", 0.95), ("relation", 0.75), ("label", 0.7)):
        assert last[name] < share * first[name], name


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = task_of(tmp_path / "whole", 8)
    distil.distil(whole)
    assert not torch.equal(whole.student.vit.layernorm.weight, torch.ones(32))
    distil.distil(task_of(tmp_path / "parted", 8), halt_at=3)
    resumed = task_of(tmp_path / "parted", 8)
    assert distil.distil(resumed).losses[-1]["step"] == 8
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    distil.distil(task_of(tmp_path, 2))
    with pytest.raises(CheckpointError, match="other settings"):
        distil.distil(task_of(tmp_path, 2, patch_loss=0.25))


def test_fewer_images_are_the_first_of_the_first_round(tmp_path: Path) -> None:
    whole, fewer = task_of(tmp_path, 8), task_of(tmp_path, 8, distinct=32)
    rows = [fewer.rows_of(step) for step in range(4)]
    first, second = np.concatenate(rows[:2]), np.concatenate(rows[2:])
    assert np.array_equal(first, np.concatenate([whole.rows_of(step) for step in range(2)]))
    assert set(first) == set(second)
    assert len(set(first)) == 32
    assert not np.array_equal(first, second)
    with pytest.raises(InputError, match="at most the 48 images"):
        task_of(tmp_path, 8, distinct=49)


def test_the_export_is_an_ordinary_transformers_folder_of_the_moving_average(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, ViTModel

    task = task_of(tmp_path, 4)
    distil.distil(task, halt_at=2)  # leaves the average in the network
    model, report = ViTModel.from_pretrained(tmp_path / "backbone", add_pooling_layer=False, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, task.student.state_dict()[f"vit.{name}"].half().float()), name
    assert AutoImageProcessor.from_pretrained(tmp_path / "backbone", backend="pil").size == {"height": 32, "width": 32}
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["model_type"] == "vit"


def test_every_image_comes_once_in_a_round_and_rounds_differ(tmp_path: Path) -> None:
    task = task_of(tmp_path, 6)
    rows = [task.rows_of(step) for step in range(6)]
    first, second = np.concatenate(rows[:3]), np.concatenate(rows[3:])
    assert sorted(first) == sorted(second) == list(range(48))
    assert not np.array_equal(first, second)


def test_mirrored_tokens_are_the_tokens_of_the_mirrored_image() -> None:
    """With the mean grey of each patch as the token, mirroring is exact."""
    images = torch.rand(4, 1, 12, 12)

    def tokens(pictures: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.avg_pool2d(pictures, 4).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    chosen = torch.tensor([True, False, True, False])
    expected = tokens(torch.where(chosen[:, None, None, None], images.flip(3), images))
    assert torch.allclose(distil.mirrored(tokens(images), chosen), expected, atol=1e-6)


def test_the_store_asks_the_teacher_once_and_knows_its_pool(tmp_path: Path) -> None:
    task = task_of(tmp_path, 8)
    store = task.store
    chosen = np.array([5, 1, 5])
    first = store.rows(chosen)
    assert torch.equal(first[0], first[2])
    object.__setattr__(store, "model", None)  # whoever asks again fails
    assert torch.equal(store.rows(chosen), first)
    with pytest.raises(SystemExit, match="another folder"):
        distil.TeacherStore.open(tiny_teacher(), task.pool.images[:7], 56, tmp_path / "teacher")


@pytest.mark.shared
def test_the_pool_leaves_out_what_is_reported_or_chooses(shared_data: Path) -> None:
    counts = {"natural": 166, "mednist": 10, "tissue": 3, "hippocampus": 3, "torso": 2}
    pool = distil.read_pool(shared_data, counts, size=64)
    assert pool.counts == counts
    assert pool.images.shape == (184, 64, 64, 3)
    assert min(image.std() for image in pool.images) > 1
    natural = {name.split(":")[1] for name in pool.classes if name.startswith("tiny_imagenet_180")}
    assert len(natural) == 166
    assert not any(is_development_class(wnid) for wnid in natural)
    assert {name for name in pool.classes if name.startswith("mednist")} == {
        f"mednist:{name}" for name in ("AbdomenCT", "BreastMRI", "ChestCT", "Hand", "HeadCT")
    }
    assert (pool.labels[-8:] == -1).all()
    again = distil.read_pool(shared_data, counts, size=64)
    assert np.array_equal(pool.images, again.images)
