"""Measuring the networks of a decomposition on the test parts, and the table that sets them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medlore.data.images.transforms import Preprocessing
from medlore.decomposing.classifiers.tasks import LabelledImages, TaskData
from medlore.decomposing.classifiers.training import predict_scores
from medlore.layers.experts.surgery import merge
from medlore.metrics.classification import classification_report
from medlore.models.multitask import MultiTaskNetwork, count_flops, count_parameters

_ORDER = ("teacher", "shared", "shared-distilled", "experts", "experts-uniform", "experts-task-size", "experts-stable-rank", "single")


def measure(variant: str, network: MultiTaskNetwork, tasks: Mapping[str, TaskData], preprocessing: Preprocessing) -> list[dict[str, Any]]:
    """One row per task: metrics with 95 % intervals on the test part, and what it costs to deploy the network for that task.

    The deployed network of a task is body + that task's head; of an expert, the merged body + head. `stored_parameters`
    are those of all tasks together.
    """
    rows = []
    stored = count_parameters(network)
    for name, task in tasks.items():
        body = merge(network.body, name) if network.routed else network.body
        rows.append(
            {
                "network": variant.split("-", 1)[0] if variant.startswith("single-") else variant,
                "task": name,
                "images": len(task.test),
                "report": measure_part(network, task, task.test, preprocessing),
                "deployed_parameters": count_parameters(body) + count_parameters(network.heads[name]),
                "stored_parameters": stored,
                "mega_flops": round(count_flops(body, preprocessing.image_size) / 1e6, 2),
            }
        )
    return rows


def measure_part(network: MultiTaskNetwork, task: TaskData, part: LabelledImages, preprocessing: Preprocessing) -> dict[str, Any]:
    """The classification report of one part of a task."""
    scores = predict_scores(network, part, task, preprocessing)
    return classification_report(part.targets.numpy(), scores, classes=task.classes, task=task.kind, groups=part.groups)


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in reading order, the single-task networks' stored parameters added up, with a majority row per task in front."""
    together = sum(row["stored_parameters"] for row in rows if row["network"] == "single")
    for row in rows:
        if row["network"] == "single":
            row["stored_parameters"] = together
    ordered = sorted(rows, key=lambda row: _ORDER.index(row["network"]))
    tasks = {row["task"]: row for row in ordered}
    majority = [
        {"network": "majority", "task": name, "images": row["images"], "report": row["report"]["majority"]} for name, row in tasks.items()
    ]
    return [*majority, *ordered]


def headline(row: Mapping[str, Any]) -> tuple[str, dict[str, float | None]]:
    """Name and value of the metric that leads a row: balanced accuracy, or macro AUC of a multi-label task."""
    metrics = row["report"]["metrics"] if "metrics" in row["report"] else row["report"]
    name = "balanced_accuracy" if "balanced_accuracy" in metrics else "macro_auc"
    value = metrics.get(name)
    return name, value if isinstance(value, dict) else {"value": value, "low": None, "high": None}
