"""A tuned classifier looks at the test images: once, after everything is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medlore.data.images.imageset import ImageSet
from medlore.metrics.classification import classification_report
from medlore.models.backbones.reading import Backbone
from medlore.training.accelerator import make_accelerator
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import predict_logits, probabilities


@dataclass(frozen=True)
class HeldOutScores:
    """What the test images say of a network.

    Attributes:
        metrics: name -> value; None where not defined.
        report: metrics with intervals, by class, of a constant answer.
        scores: (b, c) probabilities.
        targets: labels.
    """

    metrics: dict[str, float | None]
    report: dict[str, Any]
    scores: NDArray[np.float32]
    targets: NDArray[Any]


def judge(model: nn.Module, backbone: Backbone, test: ImageSet, *, settings: FinetuneSettings, accelerator: Any = None) -> HeldOutScores:
    """Judge a tuned network.

    Args:
        model: with adapters merged.
        backbone: what it was built on; says how images are prepared.
        test: labelled images that played no part in its training.
        settings: of the tuning run.
        accelerator: of the tuning run; None makes one as the settings say.
    """
    device = accelerator or make_accelerator(settings.run.device, settings.run.precision, None)
    examples = image_examples(test, preprocessing_of(backbone))
    scores = probabilities(predict_logits(model, examples.inputs, len(examples), accelerator=device), test.task).numpy()
    report = classification_report(
        examples.targets,
        scores,
        classes=test.classes,
        task=test.task,
        seed=settings.training.seed,
        bootstrap=settings.run.bootstrap,
        groups=test.groups,
    )
    return HeldOutScores({name: entry["value"] for name, entry in report["metrics"].items()}, report, scores, examples.targets)
