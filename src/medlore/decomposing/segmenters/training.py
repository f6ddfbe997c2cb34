"""The training of every segmenter: teacher, plain student, one region's student, student with experts, an added expert, few shots.

Patches, augmentation and dropout are drawn from (seed, step), so a run that goes on from a checkpoint ends where an unbroken one
ends (bit-equal on a CPU with one setting of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medlore.decomposing.segmenters.batches import Batch, PatchSampler, batches_ahead
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.settings import Precision, ScheduleSettings, SegmenterLossSettings
from medlore.losses import deep_mask_loss, mask_distillation
from medlore.training import task as engine
from medlore.training.checkpoint import Checkpoint
from medlore.training.history import History
from medlore.training.loop import train
from medlore.training.schedule import CosineAfterWarmup, Schedule
from medlore.training.watching import Narration, NetworkTracking, Progress, Watchers

Scores = dict[str, Any]
Validate = Callable[[PromptedSegmenter], Scores]


@dataclass(frozen=True)
class SegmenterTrainingPlan:
    """How one network is trained.

    Attributes:
        schedule: steps and rates.
        loss: weights of the terms.
        seed: of dropout.
        precision: of the network; the loss is always computed in 32 bits.
        validate_every: steps; 0 for the end alone.
        checkpoint_minutes: between two checkpoints.
        workers: processes that load data.
        log_every: steps between two lines of the history.
    """

    schedule: ScheduleSettings
    loss: SegmenterLossSettings
    seed: int
    precision: Precision
    validate_every: int = 0
    checkpoint_minutes: float = 5.0
    workers: int = 0
    log_every: int = 50

    def in_steps(self) -> Schedule:
        """The same for the engine."""
        s = self.schedule
        return Schedule(
            steps=s.steps,
            rate=CosineAfterWarmup(s.learning_rate, s.final_share, s.warmup_fraction),
            weight_decay=s.weight_decay,
            clip=s.clip,
            accumulate=s.accumulate,
            ema=s.ema,
            judge_every=self.validate_every,
            log_every=self.log_every,
        )


def train_segmenter(  # noqa: PLR0913 - one door for one run
    network: PromptedSegmenter,
    sampler: PatchSampler,
    plan: SegmenterTrainingPlan,
    *,
    accelerator: Any,
    checkpoint: Checkpoint | Path,
    teacher: PromptedSegmenter | None = None,
    validate: Validate | None = None,
    progress: Progress = lambda _step, _steps, _text: None,
    name: str = "segmenter",
) -> History:
    """Train in place; a checkpoint of an earlier run is gone on with.

    Args:
        network: its trainable parameters are trained.
        sampler: of the batches.
        plan: schedule and loss.
        accelerator: device, precision and processes.
        checkpoint: or its file; removed by the caller when the network is safe.
        teacher: frozen; its voxel logits are distilled where the loss has a weight for it.
        validate: called on the network whose weights would be kept.
        progress: step, steps, text.
        name: of the network, for the trackers.

    Raises:
        StepError: loss or gradient are no longer finite; the state before that step is kept, and the cases are named.
        CheckpointError: a checkpoint that is damaged or of another network.
    """
    task, history, schedule = SegmenterTask(network, sampler, plan, accelerator, teacher, validate, name=name), History(), plan.in_steps()
    looking_on = [Narration(progress, schedule.steps, history), NetworkTracking(accelerator, name, measure="dice")]
    where = Checkpoint(checkpoint, minutes=plan.checkpoint_minutes) if isinstance(checkpoint, Path) else checkpoint
    return train(task, schedule, checkpoint=where, watcher=Watchers(looking_on), history=history)


class SegmenterTask(engine.Task):
    """What the engine is given for one segmenter; the average of the weights is kept where there is one, else the last ones.

    Args:
        network: its trainable parameters are trained.
        sampler: of the batches.
        plan: schedule and loss.
        accelerator: device, precision and processes.
        teacher: frozen by this.
        validate: answers with scores; None for no validation.
        name: of the network.
    """

    def __init__(
        self,
        network: PromptedSegmenter,
        sampler: PatchSampler,
        plan: SegmenterTrainingPlan,
        accelerator: Any,
        teacher: PromptedSegmenter | None = None,
        validate: Validate | None = None,
        *,
        name: str = "segmenter",
    ) -> None:
        super().__init__(name, network, accelerator, seed=plan.seed)
        self.network, self.sampler, self.plan, self.validate = network, sampler, plan, validate
        self.teacher = teacher if teacher is not None and plan.loss.distillation > 0 else None
        if self.teacher is not None:
            self.teacher.to(accelerator.device).eval().requires_grad_(requires_grad=False)
        if plan.precision == "bf16":  # convolutions with bf16 matrix instructions want channels last: 10 to 25 percent of a step on a CPU
            network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def seed_of(self, step: int) -> int:
        """Every step has its own."""
        return (self.seed << 32) + (step << 8) + int(self.accelerator.process_index)

    def spares(self, name: str, parameter: nn.Parameter) -> bool:
        """The table of prompts has no decay: its rows are vectors."""
        return super().spares(name, parameter) or name.endswith("prompts")

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Every process takes one of each group of batches; they are made ahead."""
        with closing(batches_ahead(self.sampler, self._numbers(start, stop), workers=self.plan.workers)) as made:
            for batch in made:
                yield batch.to(self.accelerator.device)

    def _numbers(self, start: int, stop: int) -> list[int]:
        parts, processes = self.plan.schedule.accumulate, self.accelerator.num_processes
        index = self.accelerator.process_index
        return [(step * parts + part) * processes + index for step in range(start, stop) for part in range(parts)]

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Masks, and the teacher's answer where one is distilled."""
        del step
        levels = self.forward(batch.images, batch.rows, batch.regions, deep=True)
        taught = None
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(batch.images, batch.rows, batch.regions)[0]
        return loss_terms(levels, batch, self.plan.loss, taught)

    def cases(self, batch: Batch) -> tuple[str, ...]:
        """Whose patches they are."""
        return batch.names

    def judge(self, stretch: engine.Stretch) -> engine.Judgement:
        """Dice of the validation cases."""
        return engine.Judgement() if self.validate is None else engine.Judgement({"step": stretch.step, **self.validate(self.network)})


def loss_terms(levels: Sequence[Tensor], batch: Batch, loss: SegmenterLossSettings, taught: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of the loss, each already weighted.

    Args:
        levels: student logits from full resolution down.
        batch: with targets and valid pairs.
        loss: weights.
        taught: teacher logits at full resolution; None: no distillation.
    """
    terms = {"masks": deep_mask_loss(list(levels), batch.targets, batch.valid, bce=loss.bce, dice=loss.dice)}
    if taught is not None:
        terms["distillation"] = loss.distillation * mask_distillation(levels[0], taught, batch.valid, temperature=loss.temperature)
    return terms
