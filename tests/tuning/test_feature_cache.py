"""A linear probe looks at every image once: what it learns on features is what it would learn through the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from medlore.layers.tuning.interface import Request, Tuning
from medlore.layers.tuning.methods import install_method
from medlore.models.backbones.reading import load_backbone
from medlore.training.accelerator import make_accelerator
from medlore.training.watching import Watchers
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.finetune import finetune
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import EpochSchedule, Trainer
from tiny_backbone import striped, write_backbone

EPOCHS = 3


def test_the_head_is_the_one_that_training_through_the_network_gives(tmp_path: Path) -> None:
    folder, images = write_backbone(tmp_path / "model"), striped(4)
    settings = FinetuneSettings(
        model=str(folder), method="linear-probe", epochs=EPOCHS, device="cpu", precision="fp32", test_fraction=0, validation_fraction=0,
        start="random", features="own",
    )  # fmt: skip
    cached = finetune(settings, train=images)
    backbone = load_backbone(folder, classes=3, seed=settings.seed)
    train = image_examples(images, preprocessing_of(backbone))
    tuning = install_method(
        "linear-probe", backbone.model, Request(backbone.head_name, train.inputs(np.arange(1), step=None))
    )  # with no features in between
    schedule = EpochSchedule(epochs=EPOCHS, learning_rate=settings.schedule().learning_rate)
    trainer = Trainer(
        Tuning(tuning.model, tuning.form, tuning.save, tuning.merged), "single", schedule, make_accelerator("cpu", "fp32", None),
        judge=lambda _targets, _scores: 0.0, watcher=Watchers([]),
    )  # fmt: skip
    history = trainer.fit(train, None)
    losses = [[epoch["train_loss"] for epoch in found.epochs] for found in (cached.history, history)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    heads: list[Any] = [model.get_submodule(backbone.head_name) for model in (cached.model, backbone.model)]
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-4, atol=1e-6)
    assert losses[1][-1] < losses[1][0]


def test_each_image_goes_through_the_network_once(tmp_path: Path) -> None:
    seen: list[int] = []
    folder, images = write_backbone(tmp_path / "model"), striped(4)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _output: seen.append(len(inputs[0])) if type(module).__name__ == "ViTLayer" else None
    )
    try:
        finetune(
            FinetuneSettings(
                model=str(folder),
                method="linear-probe",
                epochs=EPOCHS,
                device="cpu",
                precision="fp32",
                test_fraction=0,
                validation_fraction=0,
            ),
            train=images,
        )
    finally:
        handle.remove()
    assert sum(seen) == 2 * len(images) * (
        1 + FinetuneSettings().views()
    )  # two layers, each image and each view of it; not once more for any epoch
