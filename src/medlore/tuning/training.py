"""The training loop of few-shot tuning: plain, seeded, resumable to the bit, the same under `accelerate launch`.

Nothing is drawn from a hidden random state: the order of an epoch and every random draw in it depend on the seed and the
epoch (the augmentation on the seed and the step), so a run that was killed and resumed sees what an unbroken one sees.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medlore.errors import CheckpointError, StepError
from medlore.files import atomic_path
from medlore.layers.surgery import load_trainable_state, set_training, trainable_state
from medlore.layers.tuning.methods import Tuning
from medlore.training.watching import Watcher
from medlore.weightfiles import load_torch_file

Task = Literal["single", "multi"]
_WARMUP_START = 1e-3  # share of the rate at which the warm-up begins


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, when to stop.

    Attributes:
        epochs: passes over the training images, at most.
        batch_size: images a step, over all processes together.
        learning_rate: peak rate of AdamW.
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
    min_learning_rate: float = 0.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.05
    clip: float | None = 1.0
    patience: int | None = None
    seed: int = 0


class Batches(Protocol):
    """Model inputs of some images: augmented when a step is given, as they are when not."""

    def __call__(self, indices: NDArray[np.int64], *, step: int | None) -> Tensor:
        """(b, c, h, w) normalised images, or (b, d) cached features."""


@dataclass(frozen=True)
class Examples:
    """Images to learn from or to be judged by: their inputs and labels."""

    inputs: Batches
    targets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class History:
    """What happened, epoch by epoch, and which epoch was kept.

    Attributes:
        epochs: one mapping an epoch: `epoch`, `train_loss`, `learning_rate`, and with validation images `validation_loss` and
            `validation_score`.
        best_epoch: number of the epoch whose weights the model has at the end, from 1.
        stopped: why training ended.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    stopped: Literal["all epochs", "patience"] = "all epochs"


Judge = Callable[[NDArray[Any], NDArray[np.float32]], float]


def learning_rate_at(step: int, total: int, schedule: Schedule) -> float:
    """Cosine from the peak to the minimum over `total` steps, with a linear warm-up laid over its beginning.

    Example:
        >>> round(learning_rate_at(10, 100, Schedule(learning_rate=1e-3, warmup_fraction=0.2)), 9)
        0.000488252
    """
    low, peak = schedule.min_learning_rate, schedule.learning_rate
    rate = low + 0.5 * (peak - low) * (1 + math.cos(math.pi * step / total))
    warmup = round(schedule.warmup_fraction * total)
    return rate * (1 - (1 - step / warmup) * (1 - _WARMUP_START)) if step < warmup else rate


def loss_of(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Cross-entropy, or the mean binary cross-entropy over labels."""
    if task == "single":
        return nn.functional.cross_entropy(logits.float(), targets)
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets)


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
    """

    tuning: Tuning
    task: Task
    schedule: Schedule
    accelerator: Any
    judge: Judge
    watcher: Watcher
    checkpoint: Path | None = None
    fingerprint: str = ""

    def fit(self, train: Examples, validation: Examples | None, *, resume: bool = False) -> History:
        """Train, and leave the weights of the best epoch in the model (of the last one without validation images).

        Raises:
            StepError: the loss is not finite, or a checkpoint cannot be written.
            CheckpointError: the checkpoint belongs to another run.
        """
        plain = self.tuning.model
        fused = self.accelerator.device.type == "cpu"  # one pass over the weights; on CUDA torch chooses well by itself
        optimizer = torch.optim.AdamW(_groups(plain, self.schedule.weight_decay), lr=self.schedule.learning_rate, fused=fused or None)
        model, optimizer = self.accelerator.prepare(plain, optimizer)
        history, best_key, stale = History(), (-math.inf, -math.inf), 0
        best: dict[str, Tensor] = {}
        if resume and self.checkpoint is not None and self.checkpoint.is_file():
            history, best, best_key, stale = self._restore(self.checkpoint, optimizer)
            self.watcher.skip(len(history.epochs) * math.ceil(len(train) / self.schedule.batch_size))
        for epoch in range(len(history.epochs) + 1, self.schedule.epochs + 1):
            if self.schedule.patience is not None and stale >= self.schedule.patience:
                history.stopped = "patience"
                break
            record = self._train_epoch(model, optimizer, train, epoch)
            if validation is not None:
                record |= self._validate(model, validation)
            history.epochs.append(record)
            key = _key(record)
            stale += 1
            if validation is None or key > best_key:
                best, best_key, stale = _copy(trainable_state(plain)), key, 0
                history.best_epoch = epoch
            self.watcher.epoch(record)
            self._save(optimizer, history, best, best_key, stale)
        load_trainable_state(plain, best)
        return history

    def _train_epoch(self, model: nn.Module, optimizer: Any, train: Examples, epoch: int) -> dict[str, Any]:
        """One pass in a seeded order; every process takes its share of each batch."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(_seed_of(self.schedule.seed, epoch, rank))
        order = np.random.default_rng([self.schedule.seed, epoch]).permutation(len(train))
        steps = math.ceil(len(train) / self.schedule.batch_size)
        total = steps * self.schedule.epochs
        set_training(self.tuning.model)
        trained = [p for p in model.parameters() if p.requires_grad]
        losses, seen, rate = 0.0, 0, 0.0
        for i in range(steps):
            step = (epoch - 1) * steps + i
            chosen = _share(order[i * self.schedule.batch_size : (i + 1) * self.schedule.batch_size], rank, world)
            rate = learning_rate_at(step, total, self.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.tuning.before_step()
            inputs = train.inputs(chosen, step=step).to(self.accelerator.device)
            targets = torch.from_numpy(train.targets[chosen]).to(self.accelerator.device)
            loss = loss_of(_logits(model, inputs), targets, self.task)
            if self.tuning.penalty is not None:
                loss = loss + self.tuning.penalty()
            self.accelerator.backward(loss)
            if self.schedule.clip is not None:
                self.accelerator.clip_grad_norm_(trained, self.schedule.clip)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise StepError(
                    f"epoch {epoch}, step {step}",
                    f"the loss is {value}",
                    "a finite loss",
                    "lower --learning-rate or --clip, or take --precision fp32",
                )
            optimizer.step()
            self.tuning.after_backward(step)
            optimizer.zero_grad(set_to_none=True)
            losses, seen = losses + value * len(chosen), seen + len(chosen)
            self.watcher.step(value)
        return {"epoch": float(epoch), "train_loss": self._mean(losses, seen), "learning_rate": rate}

    def _mean(self, total: float, count: int) -> float:
        """Total by count, over all processes."""
        if self.accelerator.num_processes > 1:
            shares = self.accelerator.gather(torch.tensor([[total, count]], dtype=torch.float32, device=self.accelerator.device))
            total, count = shares[:, 0].sum().item(), shares[:, 1].sum().item()
        return total / max(1, count)

    def _validate(self, model: nn.Module, validation: Examples) -> dict[str, Any]:
        logits = predict_logits(model, validation.inputs, len(validation), accelerator=self.accelerator)
        loss = float(loss_of(logits, torch.from_numpy(validation.targets), self.task))
        score = self.judge(validation.targets, probabilities(logits, self.task).numpy())
        return {"validation_loss": loss, "validation_score": score}

    def _save(self, optimizer: Any, history: History, best: dict[str, Tensor], best_key: tuple[float, float], stale: int) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        content = {
            "fingerprint": self.fingerprint,
            "weights": trainable_state(self.tuning.model),
            "optimizer": optimizer.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "method": self.tuning.state(),
            "best": best,
            "best_key": best_key,
            "stale": stale,
            "epochs": history.epochs,
            "best_epoch": history.best_epoch,
        }
        packed = io.BytesIO()  # a full disk then shows as the system's own error, not as one of torch's writer
        torch.save(content, packed)
        with atomic_path(self.checkpoint) as temporary:
            temporary.write_bytes(packed.getbuffer())

    def _restore(self, checkpoint: Path, optimizer: Any) -> tuple[History, dict[str, Tensor], tuple[float, float], int]:
        saved = read_checkpoint(checkpoint)
        if saved["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                str(checkpoint),
                "a checkpoint of a run with other settings, data or weights",
                "the settings that the run was started with",
                "repeat them, or start anew without --resume",
            )
        load_trainable_state(self.tuning.model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:  # None: that run was not in float16
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.tuning.restore(saved["method"])
        history = History(epochs=saved["epochs"], best_epoch=saved["best_epoch"])
        return history, saved["best"], tuple(saved["best_key"]), saved["stale"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: the file is broken.
    """
    content = load_torch_file(path, mapped=False)  # the run replaces the file
    if not isinstance(content, dict) or "fingerprint" not in content:
        raise CheckpointError(str(path), "another kind of file", "a checkpoint of this run", "start anew without --resume")
    return content


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


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _share(chosen: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The part of a batch that one process takes; short batches are filled up from their own start."""
    if world == 1:
        return chosen
    return np.resize(chosen, math.ceil(len(chosen) / world) * world)[rank::world]


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def _key(record: Mapping[str, Any]) -> tuple[float, float]:
    """Higher is better: the score first, then the lower loss; a score that is not defined comes last."""
    score = record.get("validation_score", 0.0)
    return (score if math.isfinite(score) else -math.inf, -record.get("validation_loss", 0.0))


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
