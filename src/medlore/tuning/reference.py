"""What stands beside every result: a logistic regression on the frozen features, with all the same labels, on the same test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageSet
from medlore.files import atomic_path
from medlore.layers.surgery import load_trainable_state
from medlore.metrics.classification import classification_report, paired_difference
from medlore.models.backbones.reading import Backbone
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.facts import score_name
from medlore.tuning.preparing import Workshop, load_backbone_of
from medlore.tuning.probing import Reading, SolvedProbe, probe_of
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import predict_logits, probabilities
from medlore.weightfiles import read_tensors

REFERENCE_FILE = "reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """The regression of one run.

    Attributes:
        probe: fitted to every label that the run was given.
        ask: images -> its probabilities (b, c).
    """

    probe: SolvedProbe
    ask: Callable[[ImageSet], NDArray[np.float32]]

    def save(self, folder: Path) -> None:
        """Write its head for the frozen features, so that `medlore evaluate` can compare on other images."""
        from safetensors.torch import save_file

        weight, bias = (torch.from_numpy(np.ascontiguousarray(part)).float() for part in self.probe.probe.as_linear())
        with atomic_path(folder / REFERENCE_FILE) as temporary:
            save_file({"weight": weight, "bias": bias}, temporary)


def reference_of(
    settings: FinetuneSettings, reading: Reading, images: ImageSet, workshop: Workshop, solved: SolvedProbe | None
) -> Reference:
    """Fit it.

    Args:
        settings: of the run.
        reading: where the head of the run reads.
        images: all labelled images that the run was given, those that only chose something too.
        workshop: where features are kept.
        solved: a probe of just these images, where the run has one.
    """

    def frozen() -> Backbone:
        return load_backbone_of(settings, workshop, classes=len(images.classes))

    probe = solved or probe_of(settings, frozen(), reading.cut, images, workshop.features, workshop.accelerator)

    def ask(part: ImageSet) -> NDArray[np.float32]:
        features = workshop.features.read(frozen(), part, reading.cut, accelerator=workshop.accelerator)
        return probe_scores(probe.probe.logits(features), images)

    return Reference(probe, ask)


def stored_scores(folder: Path, frozen: Backbone, images: ImageSet, accelerator: Any) -> NDArray[np.float32] | None:
    """What the regression that was saved beside a tuned model says of other images; None where none was saved.

    Args:
        folder: of the tuned model.
        frozen: its backbone, cut as it was, not tuned.
        images: any.
        accelerator: device and precision.

    Raises:
        CheckpointError: a file that is damaged or does not fit.
    """
    if not (folder / REFERENCE_FILE).is_file():
        return None
    names = {part: f"{frozen.head_name}.{part}" for part in ("weight", "bias")}
    stored = read_tensors(folder / REFERENCE_FILE)
    load_trainable_state(frozen.model, {names.get(name, name): tensor for name, tensor in stored.items()}, expected=list(names.values()))
    examples = image_examples(images, preprocessing_of(frozen))
    logits = predict_logits(frozen.model.to(accelerator.device), examples.inputs, len(examples), accelerator=accelerator)
    scores: NDArray[np.float32] = probabilities(logits, images.task).numpy()
    return scores


def probe_scores(logits: NDArray[np.float64], images: ImageSet) -> NDArray[np.float32]:
    """Probabilities (b, c) of a probe's logits."""
    scores: NDArray[np.float32] = probabilities(torch.from_numpy(logits), images.task).numpy()
    return scores


def compared(
    test: ImageSet, scores: NDArray[np.floating], reference: NDArray[np.float32], *, seed: int, bootstrap: int, **facts: Any
) -> dict[str, Any]:
    """For the report: the regression's own measures, and how much better the network is, image by image.

    Args:
        test: labelled images that judge.
        scores: (b, c) of the network.
        reference: (b, c) of the regression.
        seed: of the resamples.
        bootstrap: how many.
        facts: what else the report says of the regression.
    """
    how: dict[str, Any] = {"classes": test.classes, "task": test.task, "seed": seed, "bootstrap": bootstrap, "groups": test.groups}
    targets, measure = test.targets(), score_name(test)
    report = classification_report(targets, reference, **how)
    difference = paired_difference(targets, (scores, reference), measure=measure, **how)
    kept = {name: report[name] for name in ("task", "items", "metrics", "majority")}
    return {"what": "logistic regression on the frozen features", **facts, "measure": measure, "difference": difference, "test": kept}
