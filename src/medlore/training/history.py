"""What a training leaves beside the weights: means of the loss, judgements, the step that was kept, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch


@dataclass
class History:
    """What happened.

    Attributes:
        losses: one line every `log_every` steps: `step`, and the mean of each term over them.
        scores: one record a judgement, as the task gave it.
        best_step: steps that were done when the kept weights were judged; 0 where the end is kept.
        best_key: of that judgement; None as long as no key was defined.
        stale: judgements since.
        stopped: why the training ended.
        seconds: of all steps, over all parts of a training that was resumed.
        waited: of them, spent waiting for data.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_key: tuple[float, ...] | None = None
    stale: int = 0
    stopped: Literal["end", "patience"] = "end"
    seconds: float = 0.0
    waited: float = 0.0

    def is_better(self, key: tuple[float, ...] | None) -> bool:
        """Whether weights of such a key take the place of those that are kept."""
        return self.best_key is None or (key is not None and key > self.best_key)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put the values of a checkpoint back."""
        vars(self).update(saved)
        self.best_key = None if self.best_key is None else tuple(self.best_key)


class Means:
    """Running means of the loss and its terms, weighed by the size of the batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.loss = 0.0
        self.weight = 0

    def add(self, loss: float, terms: Mapping[str, float], weight: int) -> None:
        """One step."""
        self.loss += loss * weight
        self.weight += weight
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight

    def own(self) -> tuple[float, dict[str, float]]:
        """Mean of the loss and of each term, of this process."""
        return self._means([self.loss, *self.sums.values()], self.weight)

    def over_processes(self, accelerator: Any) -> tuple[float, dict[str, float]]:
        """The same over all processes; all of them ask at once."""
        if accelerator.num_processes == 1:
            return self.own()
        row = [self.loss, *self.sums.values(), self.weight]
        *sums, weight = accelerator.gather(torch.tensor([row], dtype=torch.float32, device=accelerator.device)).sum(0).tolist()
        return self._means(sums, weight)

    def _means(self, sums: list[float], weight: float) -> tuple[float, dict[str, float]]:
        loss, *terms = (total / max(1, weight) for total in sums)
        return loss, dict(zip(self.sums, terms, strict=True))

    def clear(self) -> None:
        """Begin again."""
        self.sums, self.loss, self.weight = {}, 0.0, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Put `state` back."""
        vars(self).update(saved)
