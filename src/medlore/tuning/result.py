"""What one tuning run found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medlore.models.backbones.reading import Backbone
from medlore.ranks.plan import RankPlan
from medlore.tuning.reference import Reference
from medlore.tuning.training import TuningHistory


@dataclass
class FinetuneResult:
    """What a run found.

    Attributes:
        metrics: test metrics, name -> value (None where not defined); empty without a test set.
        report: everything that `report.json` holds under `results`.
        history: losses and scores by epoch.
        scores: (b, c) test probabilities; None without a test set.
        targets: test labels.
        model: the tuned network with adapters merged, in evaluation mode.
        backbone: what it was built on.
        plan: ranks, for methods with factors.
        folder: where the tuned model was written; None without an output folder.
        reference: the logistic regression with the same labels, to be asked about other images.
    """

    metrics: dict[str, float | None]
    report: dict[str, Any]
    history: TuningHistory
    scores: NDArray[np.float32] | None
    targets: NDArray[Any] | None
    model: nn.Module
    backbone: Backbone
    plan: RankPlan | None = None
    folder: Path | None = None
    reference: Reference | None = None
