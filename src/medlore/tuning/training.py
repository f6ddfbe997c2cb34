"""The training of few-shot tuning: epochs in a seeded order, selection on validation images, early stopping.

Nothing is drawn from a hidden random state: the order of an epoch and every random draw in it depend on the seed and the
epoch (the augmentation on the seed and the step), so a run that was killed and resumed sees what an unbroken one sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medlore.layers.surgery import load_trainable_state, set_training, trainable_state
from medlore.layers.tuning.interface import Tuning
from medlore.losses import task_loss
from medlore.training import schedule as schedules
from medlore.training import task as tasks
from medlore.training.checkpoint import Checkpoint
from medlore.training.loop import train
from medlore.training.watching import Watcher

Task = Literal["single", "multi"]


@dataclass(frozen=True)
class EpochSchedule:
    """How long, how fast, when to stop.

    Attributes:
        epochs: passes over the training images, at most.
        batch_size: images a step, over all processes together.
        learning_rate: peak rate of AdamW.
        head_learning_rate: that of the head; None for the same.
        min_learning_rate: rate at which the cosine ends.
        warmup_fraction: share of all steps with a linear warm-up.
        weight_decay: on matrices; vectors (norms, biases) have none.
        clip: largest gradient norm; None for no clipping.
        patience: epochs without a better validation score before stopping; None never stops early.
        seed: of order, dropout and augmentation.
    """

    epochs: int = 20
    batch_size: int = 4
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    min_learning_rate: float = 0.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.05
    clip: float | None = 1.0
    patience: int | None = None
    seed: int = 0

    def in_steps(self, steps_per_epoch: int) -> schedules.Schedule:
        """The same for the engine, which counts steps."""
        return schedules.Schedule(
            steps=self.epochs * steps_per_epoch,
            rate=schedules.CosineUnderWarmup(self.learning_rate, self.min_learning_rate, self.warmup_fraction),
            weight_decay=self.weight_decay,
            clip=self.clip,
            judge_every=steps_per_epoch,
            log_every=steps_per_epoch,
            patience=self.patience,
        )


class Batches(Protocol):
    """Model inputs of some images: augmented when a step is given, as they are when not."""

    def __call__(self, indices: NDArray[np.int64], *, step: int | None) -> Tensor:
        """(b, c, h, w) normalised images, or (b, d) cached features."""


@dataclass(frozen=True)
class Examples:
    """Images to learn from or to be judged by: their inputs, labels and names."""

    inputs: Batches
    targets: NDArray[Any]
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class TuningHistory:
    """What happened, epoch by epoch, and which epoch was kept.

    Attributes:
        epochs: one mapping an epoch: `epoch`, `train_loss`, `learning_rate`, and with validation images `validation_loss` and
            `validation_score`.
        best_epoch: number of the epoch whose weights the model has at the end, from 1.
        stopped: why training ended; a probe is solved.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    stopped: Literal["all epochs", "patience", "solved"] = "all epochs"


Judge = Callable[[NDArray[Any], NDArray[np.float32]], float]


def loss_of(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """`task_loss` in 32 bits: cross-entropy, or the mean binary cross-entropy over the labels that are known."""
    return task_loss(logits.float(), targets, task)


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Scores from 0 to 1: softmax over classes, or a sigmoid for each label."""
    return logits.float().softmax(dim=-1) if task == "single" else logits.float().sigmoid()


@dataclass
class Trainer:
    """A tuning, its data and everything that one epoch needs.

    Attributes:
        tuning: model and method.
        task: `single` or `multi`.
        schedule: how long and how fast.
        accelerator: device, precision, processes.
        judge: score of validation predictions; the epoch with the best one is kept, ties go to the lower loss, then the earlier.
        checkpoint: file that is written after every epoch; None writes nothing.
        fingerprint: what must be equal for a checkpoint to be continued.
        head: module name of the head in the network, for its own rate.
    """

    tuning: Tuning
    task: Task
    schedule: EpochSchedule
    accelerator: Any
    judge: Judge
    watcher: Watcher
    checkpoint: Path | None = None
    fingerprint: str = ""
    head: str = ""

    def fit(self, train_on: Examples, validation: Examples | None, *, resume: bool = False) -> TuningHistory:
        """Train, and leave the weights of the best epoch in the model (of the last one without validation images).

        Raises:
            StepError: the loss is not finite, or a checkpoint cannot be written.
            CheckpointError: the checkpoint belongs to another run.
        """
        task = TuningTask(self, train_on, validation)
        checkpoint = None
        if self.checkpoint is not None:
            checkpoint = Checkpoint(self.checkpoint, self.fingerprint, restart="start again without --resume")
        schedule = self.schedule.in_steps(task.steps_per_epoch)
        found = train(task, schedule, checkpoint=checkpoint, resume=resume, watcher=self.watcher)
        stopped: Literal["all epochs", "patience"] = "patience" if found.stopped == "patience" else "all epochs"
        return TuningHistory(found.scores, found.best_step // task.steps_per_epoch, stopped)


class TuningTask(tasks.Task):
    """What the engine is given for one tuning; the best epoch is kept, ties go to the lower loss, then the earlier.

    Args:
        trainer: model, method and schedule.
        train_on: images to learn from.
        validation: images to be judged by; None keeps the last epoch.
    """

    keeps_best: ClassVar[bool] = True

    def __init__(self, trainer: Trainer, train_on: Examples, validation: Examples | None) -> None:
        super().__init__("tuning", trainer.tuning.model, trainer.accelerator, seed=trainer.schedule.seed)
        self.trainer, self.tuning, self.examples, self.validation = trainer, trainer.tuning, train_on, validation
        self.steps_per_epoch = math.ceil(len(train_on) / trainer.schedule.batch_size)

    def seed_of(self, step: int) -> int | None:
        """Draws go on through an epoch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return tasks.seed_of(self.seed, epoch + 1, self.accelerator.process_index) if within == 0 else None

    def share_of_rate(self, name: str) -> float:
        """The head has a rate of its own, under whatever names a method hides it."""
        schedule, head = self.trainer.schedule, self.trainer.head
        is_head = bool(head) and f".{head}." in f".{name}."
        return 1.0 if schedule.head_learning_rate is None or not is_head else schedule.head_learning_rate / schedule.learning_rate

    def place(self, step: int) -> str:
        """Epoch and step."""
        return f"epoch {step // self.steps_per_epoch + 1}, step {step}"

    def batches(self, start: int, stop: int) -> Generator[_Batch]:
        """Every epoch has a seeded order; every process takes its share of each batch."""
        size, accelerator = self.trainer.schedule.batch_size, self.accelerator
        orders: dict[int, NDArray[np.int64]] = {}
        for step in range(start, stop):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch not in orders:
                orders = {epoch: np.random.default_rng([self.seed, epoch + 1]).permutation(len(self.examples))}
            mine = _share(orders[epoch][within * size : (within + 1) * size], accelerator.process_index, accelerator.num_processes)
            inputs = self.examples.inputs(mine, step=step).to(accelerator.device)
            yield _Batch(inputs, torch.from_numpy(self.examples.targets[mine]).to(accelerator.device), mine)

    def training_mode(self) -> None:
        """Frozen statistics stay as they are."""
        set_training(self.module)

    def begin(self, step: int) -> None:
        """The method draws."""
        del step
        self.tuning.before_step()

    def loss(self, batch: _Batch, step: int) -> dict[str, Tensor]:
        """That of the answers, and the method's own."""
        del step
        terms = {"loss": loss_of(_logits(self.forward, batch.inputs), batch.targets, self.trainer.task)}
        return terms if self.tuning.penalty is None else terms | {"penalty": self.tuning.penalty()}

    def updated(self, step: int) -> None:
        """The method looks at the gradients."""
        self.tuning.after_backward(step)

    def cases(self, batch: _Batch) -> list[str]:
        """Names of the images, where they have some."""
        return [self.examples.names[int(i)] for i in batch.indices] if len(self.examples.names) else []

    def size(self, batch: _Batch) -> int:
        """Images."""
        return len(batch.indices)

    def judge(self, stretch: tasks.Stretch) -> tasks.Judgement:
        """The record of an epoch, and of its validation images where there are some."""
        epoch = stretch.step // self.steps_per_epoch
        record: dict[str, Any] = {"epoch": float(epoch), "train_loss": stretch.loss, "learning_rate": stretch.rate}
        if self.validation is None:
            return tasks.Judgement(record)
        targets, kind = self.validation.targets, self.trainer.task
        logits = predict_logits(self.forward, self.validation.inputs, len(self.validation), accelerator=self.accelerator)
        record["validation_loss"] = float(loss_of(logits, torch.from_numpy(targets), kind))
        record["validation_score"] = self.trainer.judge(targets, probabilities(logits, kind).numpy())
        return tasks.Judgement(record, _key(record))

    def state(self) -> dict[str, Tensor]:
        """What trains, without the backbone."""
        return trainable_state(self.module)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""
        load_trainable_state(self.module, dict(state))

    def memory(self) -> dict[str, Any]:
        """The method's own."""
        return self.tuning.state()

    def load_memory(self, memory: Mapping[str, Any]) -> None:
        """Put it back."""
        self.tuning.restore(dict(memory))


@dataclass(frozen=True)
class _Batch:
    inputs: Tensor
    targets: Tensor
    indices: NDArray[np.int64]


@torch.inference_mode()
def predict_logits(model: nn.Module, inputs: Batches, count: int, *, accelerator: Any, batch_size: int = 64) -> Tensor:
    """Logits of all images in their order, (count, classes) float32 on the CPU; each process computes its share."""
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    own = np.arange(count)[rank::world] if world == 1 else np.arange(rank, math.ceil(count / world) * world, world) % count
    rows = []
    for start in range(0, len(own), batch_size):
        part = inputs(own[start : start + batch_size], step=None).to(accelerator.device)
        with accelerator.autocast():
            rows.append(_logits(model, part).float())
    logits = torch.cat(rows)
    if world > 1:  # processes hold every world-th row
        gathered = accelerator.gather(logits).reshape(world, -1, logits.shape[-1])
        logits = gathered.transpose(0, 1).reshape(-1, logits.shape[-1])[:count]
    return logits.cpu()


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Images go through the network, cached features (b, d) through the head alone."""
    if inputs.ndim == 2:
        return model(inputs)  # type: ignore[no-any-return]
    return model(pixel_values=inputs).logits  # type: ignore[no-any-return]


def _share(chosen: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The part of a batch that one process takes; short batches are filled up from their own start."""
    if world == 1:
        return chosen
    return np.resize(chosen, math.ceil(len(chosen) / world) * world)[rank::world]


def _key(record: Mapping[str, Any]) -> tuple[float, float]:
    """Higher is better: the score first, then the lower loss; a score that is not defined comes last."""
    score, loss = record["validation_score"], record["validation_loss"]
    return (score if math.isfinite(score) else -math.inf, -math.inf if math.isnan(loss) else -loss)
