"""What decides the weights of a pre-training."""

from __future__ import annotations

from pathlib import Path

import pydantic

from maintenance.vit_shape import VitShape
from medlore.training.schedule import CosineOfShares, Schedule


class PretrainSettings(VitShape):
    """Everything that decides the weights.

    `class_weights` maps the stem of an archive to the relative frequency of each of its classes (1 if absent);
    `kept_patches` of the patches are seen per image until the share `full_from` of the steps, then all. `start_from` is the
    `state.pt` of an earlier stage, whose weights (not its optimiser) are the start; `stop_at` ends a stage before its schedule.
    """

    archives: tuple[str, ...]
    skip_classes: tuple[str, ...] = ()
    class_weights: dict[str, float] = pydantic.Field(default_factory=dict)
    steps: int = 3600
    batch_size: int = 128
    kept_patches: int = 32
    full_from: float = 0.85
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: float = 0.05
    final_rate: float = 0.01
    label_smoothing: float = 0.1
    mix_share: float = 0.3
    smallest_area: float = 0.35
    colour: float = 0.3
    grey: float = 0.15
    ema_decay: float = 0.998
    seed: int = 0
    start_from: Path | None = None
    stop_at: int | None = None

    def in_steps(self, halt_at: int | None = None) -> Schedule:
        """The same for the engine.

        Args:
            halt_at: leave after this many steps, as if interrupted.
        """
        return Schedule(
            steps=self.steps,
            rate=CosineOfShares(self.learning_rate, self.final_rate, self.warm_up),
            weight_decay=self.weight_decay,
            clip=1.0,
            betas=(0.9, 0.98),
            ema=self.ema_decay,
            judge_every=None,  # whenever a state is written
            stop_at=min(self.stop_at or self.steps, halt_at or self.steps),
        )
