"""One body, one linear head per task, and mixed batches in which every row knows its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from medlore.errors import InputError, UnknownNameError
from medlore.layers.experts.routing import route


@dataclass(frozen=True)
class MixedOutput:
    """What a mixed batch gives.

    Attributes:
        features: (b, d) pooled features of all rows.
        logits: task -> (rows of that task, classes of that task).
    """

    features: Tensor
    logits: dict[str, Tensor]


class MultiTaskNetwork(nn.Module):
    """A body with one linear head per task; rows are routed to the expert of their task when the body has experts.

    Args:
        body: called as `body(pixel_values=x).logits`, gives pooled features (b, d).
        classes: task -> number of its classes.
        width: d.
        experts: whether low-rank experts named like the tasks are installed in the body.
    """

    def __init__(self, body: nn.Module, classes: Mapping[str, int], *, width: int, experts: bool = False) -> None:
        super().__init__()
        bad = [name for name in classes if "." in name]
        if bad:
            raise InputError("task names", ", ".join(bad), "names without a dot", "rename them")
        self.body = body
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in classes.items()})
        self.routed = experts

    def forward(self, pixel_values: Tensor, parts: Sequence[tuple[str, int]]) -> MixedOutput:
        """Features and logits of a mixed batch.

        Args:
            pixel_values: (b, 3, h, w), rows grouped by task.
            parts: (task, rows) in the order of the rows; the rows add up to b.
        """
        check_parts(parts, rows=len(pixel_values), known=list(self.heads))
        if self.routed:
            with route(self.body, [task for task, rows in parts for _ in range(rows)]):
                features = self.body(pixel_values=pixel_values).logits
        else:
            features = self.body(pixel_values=pixel_values).logits
        features = features.flatten(1)
        stops = list(accumulate(rows for _, rows in parts))
        logits = {task: self.heads[task](features[stop - rows : stop]) for (task, rows), stop in zip(parts, stops, strict=True)}
        return MixedOutput(features, logits)


def check_parts(parts: Sequence[tuple[str, int]], *, rows: int, known: Sequence[str]) -> None:
    """Refuse a description of a batch that does not fit it.

    Raises:
        UnknownNameError: a task that the network does not have.
        InputError: a task twice, or another number of rows than the batch has.
    """
    for task, _ in parts:
        if task not in known:
            raise UnknownNameError("batch", task, known)
    if len({task for task, _ in parts}) != len(parts) or sum(count for _, count in parts) != rows:
        raise InputError(
            "batch", f"parts {list(parts)} for {rows} rows", "every task once, rows adding up to the batch", "group the rows by task"
        )


def count_parameters(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Parameters of a module, buffers not counted."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def count_flops(body: nn.Module, image_size: int) -> int:
    """Floating-point operations (2 x multiply-accumulate) of one image through a body, counted by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = body.training
    body.eval()
    parameter = next(body.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        body(pixel_values=parameter.new_zeros(1, 3, image_size, image_size))
    body.train(was_training)
    return int(counter.get_total_flops())
