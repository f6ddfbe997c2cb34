"""One training of what was prepared; a probe is there already and is only judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.layers.tuning.interface import Tuning
from medlore.metrics.classification import classification_report
from medlore.training.watching import Watcher, Watchers
from medlore.tuning.examples import feature_examples
from medlore.tuning.facts import fingerprint_of, score_name
from medlore.tuning.preparing import Prepared
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import Examples, Judge, Trainer, TuningHistory, loss_of, predict_logits, probabilities


def fit(
    settings: FinetuneSettings, prepared: Prepared, checkpoint: Path | None, accelerator: Any, *, resume: bool, watcher: Watcher
) -> TuningHistory:
    """Train, and leave the weights of the best epoch in the network.

    Args:
        settings: how long and how fast.
        prepared: what is trained on what.
        checkpoint: file that is written after every epoch; None writes nothing.
        accelerator: device, precision, processes.
        resume: go on from `checkpoint`, where it is there.
        watcher: hears of every step and epoch.

    Raises:
        StepError: the loss is not finite, or a checkpoint cannot be written.
        CheckpointError: the checkpoint belongs to another run.
    """
    if prepared.is_solved:
        return _solved(prepared, accelerator, watcher)
    tuning, train, validation, head = prepared.tuning, prepared.train, prepared.validation, prepared.backbone.head_name
    schedule = settings.schedule(len(prepared.images))
    if tuning.head_only:
        train = feature_examples(train, tuning.model, head, accelerator=accelerator)
        validation = None if validation is None else feature_examples(validation, tuning.model, head, accelerator=accelerator)
        tuning = Tuning(tuning.model.get_submodule(head), tuning.form, tuning.save, tuning.merged)
        schedule = dataclasses.replace(schedule, learning_rate=schedule.head_learning_rate or schedule.learning_rate)
        head = ""
    everyone = Watchers([watcher, *([] if prepared.tracking is None else [prepared.tracking])])
    trainer = Trainer(
        tuning=tuning,
        task=prepared.images.task,
        schedule=schedule,
        accelerator=accelerator,
        judge=judge_of(prepared.images),
        watcher=everyone,
        checkpoint=checkpoint,
        fingerprint=fingerprint_of(settings, prepared, accelerator.num_processes),
        head=head,
    )
    everyone.start(prepared.steps, schedule.epochs)
    try:
        return trainer.fit(train, validation, resume=resume)
    finally:
        everyone.stop()


def judge_of(images: ImageSet) -> Judge:
    """The score that selects epochs."""
    name = score_name(images)

    def judge(targets: NDArray[Any], scores: NDArray[np.float32]) -> float:
        report = classification_report(targets, scores, classes=images.classes, task=images.task, bootstrap=0)
        value = report["metrics"][name]["value"]
        return float("nan") if value is None else float(value)

    return judge


def _solved(prepared: Prepared, accelerator: Any, watcher: Watcher) -> TuningHistory:
    """The probe as a history of one epoch: nothing is left to train."""
    model, task = prepared.tuning.model.to(accelerator.device).eval(), prepared.images.task

    def judged(examples: Examples) -> tuple[float, NDArray[np.float32]]:
        logits = predict_logits(model, examples.inputs, len(examples), accelerator=accelerator)
        return float(loss_of(logits, torch.from_numpy(examples.targets), task)), probabilities(logits, task).numpy()

    record: dict[str, Any] = {"epoch": 1.0, "train_loss": _training_loss(prepared), "learning_rate": 0.0}
    if prepared.validation is not None:
        record["validation_loss"], scores = judged(prepared.validation)
        record["validation_score"] = judge_of(prepared.images)(prepared.validation.targets, scores)
    if prepared.tracking is not None:
        prepared.tracking.epoch(record)
    watcher.epoch(record)
    return TuningHistory([record], 1, "solved")


def _training_loss(prepared: Prepared) -> float:
    """Mean loss of the images that the probe was fitted to."""
    assert prepared.probe is not None  # noqa: S101  # nosec B101 # `is_solved`
    return prepared.probe.training_loss
