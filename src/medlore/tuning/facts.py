"""What a report says of a run beside its numbers, and what makes two runs the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits
from medlore.tuning.settings import FinetuneSettings

if TYPE_CHECKING:
    from medlore.tuning.preparing import Prepared


def facts_of(settings: FinetuneSettings, prepared: Prepared, splits: ImageSplits) -> dict[str, Any]:
    """Method, backbone, images, sizes, rates and notes of a run."""
    model, added = prepared.tuning.model, prepared.added_parameters
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    rate, head_rate = settings.rates()
    return {
        "method": settings.method,
        "backbone": prepared.description,
        "features": prepared.features(),
        "start": settings.probing.start,
        "classes": splits.train.classes,
        "task": splits.train.task,
        "selection": score_name(splits.train) if splits.validation is not None else None,
        "data": {name: _about(part) for name, part in parts.items()},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head_parameters": prepared.head_parameters,
        "total_parameters": prepared.description["parameters"] + added,
        "factor_parameters": None if prepared.plan is None else added,
        "ranks": None if prepared.plan is None else {layer.name: layer.rank for layer in prepared.plan.layers},
        "steps": prepared.steps,
        "learning_rate": rate,
        "head_learning_rate": head_rate,
        "notes": prepared.notes,
    }


def _about(part: ImageSet | None) -> dict[str, Any] | None:
    if part is None:
        return None
    return {"name": part.name, "source": part.source, "images": len(part), "counts": part.counts(), "sha256": content_hash(part)}


def content_hash(part: ImageSet) -> str:
    """Hash of names and labels: two runs with the same one saw the same images."""
    lines = [f"{item.key}\t{','.join(map(str, item.labels))}" for item in part.items]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint_of(settings: FinetuneSettings, prepared: Prepared, processes: int) -> str:
    """What must be the same for a checkpoint to be continued."""
    facts = settings.decisive()
    facts["weights"] = prepared.backbone.sha256
    facts["train"] = content_hash(prepared.images)
    facts["validation"] = None if prepared.validation_images is None else content_hash(prepared.validation_images)
    facts["processes"] = processes  # each takes its own draws
    facts["steps"] = prepared.steps
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def score_name(images: ImageSet) -> str:
    """What selects the epoch on validation images, and what methods are compared by."""
    return "balanced_accuracy" if images.task == "single" else "macro_auc"
