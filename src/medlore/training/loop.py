"""The loop of every training in this project: tuning, pre-training, decomposition of classifiers and segmenters, few-shot segmentation.

The state after step s is a function of the seed and s, so a training that goes on from a checkpoint ends where an unbroken one
ends (bit-equal on a CPU with one setting of threads).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from medlore.errors import TargetError
from medlore.training.average import Average
from medlore.training.checkpoint import Checkpoint
from medlore.training.history import History, Means
from medlore.training.optimizer import make_optimizer
from medlore.training.schedule import Schedule
from medlore.training.task import Stretch, Task, all_finite, not_finite
from medlore.training.watching import Watcher


def train(
    task: Task,
    schedule: Schedule,
    *,
    checkpoint: Checkpoint | None = None,
    resume: bool = True,
    watcher: Watcher | None = None,
    history: History | None = None,
) -> History:
    """Train in place; where the checkpoint's file is there, go on from it.

    Afterwards the network has the weights of the best judgement, or the average, or those of the last step: what the task keeps.

    Args:
        task: network, data, loss and judgement.
        schedule: how long and how fast.
        checkpoint: where to go on from; None writes nothing. The caller removes the file when the network is safe.
        resume: False begins anew whatever is there; the file is replaced by the first state that is written.
        watcher: looks on at every step, line and judgement.
        history: filled in place, for who wants to look at it meanwhile.

    Raises:
        StepError: loss or gradient are no longer finite; the last good state is kept and the cases are named.
        CheckpointError: a checkpoint that is damaged or belongs to another training.
    """
    loop = _Loop(task, schedule, checkpoint, watcher or Watcher(), history or History())
    try:
        loop.run(loop.resume() if resume else 0)
    finally:
        task.release()
        loop.let_go()
    return loop.history


class _Loop:
    """The state of one training."""

    def __init__(self, task: Task, schedule: Schedule, checkpoint: Checkpoint | None, watcher: Watcher, history: History) -> None:
        self.task, self.schedule, self.checkpoint, self.watcher, self.history = task, schedule, checkpoint, watcher, history
        self.accelerator = task.accelerator
        task.prepare()
        self.parameters = dict(task.parameters())
        fused = self.accelerator.device.type == "cpu" or (self.accelerator.device.type == "cuda" and self.accelerator.scaler is None)
        optimizer = make_optimizer(self.parameters, schedule, spares=task.spares, fused=fused, share_of_rate=task.share_of_rate)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.average = None if schedule.ema is None else Average(self.parameters, schedule.ema)
        self.best: dict[str, Tensor] = {}
        self.means = Means()
        self.is_kept = False  # whether the file holds a state of this training

    def let_go(self) -> None:
        """The accelerator holds on to every network and optimiser that it has seen (its own `free_memory` runs the collector, too)."""
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()

    def run(self, start: int) -> None:
        """All steps that are left."""
        end = self.schedule.end
        self.task.training_mode()
        with closing(self.task.batches(start, end)) as batches:
            for step in range(start, end):
                if self.schedule.patience is not None and self.history.stale >= self.schedule.patience:
                    self.history.stopped = "patience"
                    break
                self._step(step, batches)
                self._after(step)
        self._keep()

    def _step(self, step: int, batches: Generator[Any]) -> None:
        """One step of the optimiser."""
        began = time.perf_counter()
        task, schedule = self.task, self.schedule
        if (seed := task.seed_of(step)) is not None:
            torch.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(step, schedule.steps) * group.get("share", 1.0)  # checkpoints of earlier versions have no shares
        task.begin(step)
        loss, terms, size, cases = self._gradients(step, batches)
        task.gather_gradients()
        limit = math.inf if schedule.clip is None else schedule.clip
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))
        half = self.accelerator.scaler is not None  # it leaves out steps whose gradients overflow, and takes a smaller scale
        if not (math.isfinite(loss) and (half or math.isfinite(norm))):
            self._stop(step, loss, terms, norm, cases)
        self.optimizer.step()
        task.updated(step)
        if self.average is not None:
            self.average.update(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.means.add(loss, terms, size)
        self.history.seconds += time.perf_counter() - began
        self.watcher.step(loss)

    def _gradients(self, step: int, batches: Generator[Any]) -> tuple[float, dict[str, float], int, list[str]]:
        """Summed gradients of the step's batches; mean loss and terms, number of samples and their names."""
        parts = self.schedule.accumulate
        total, terms, size = 0.0, dict[str, float](), 0
        cases: list[str] = []
        for part in range(parts):
            asked = time.perf_counter()
            batch = next(batches)
            self.history.waited += time.perf_counter() - asked
            cases += self.task.cases(batch)
            size += self.task.size(batch)
            with nullcontext() if part + 1 == parts else self.accelerator.no_sync(self.task.forward):
                found = self.task.loss(batch, step)
                loss = torch.stack(list(found.values())).sum()
                self.accelerator.backward(loss / parts)
            total += float(loss.detach()) / parts
            for name, term in found.items():
                terms[name] = terms.get(name, 0.0) + float(term.detach()) / parts
        return total, terms, size, cases

    def _stop(self, step: int, loss: float, terms: dict[str, float], norm: float, cases: list[str]) -> NoReturn:
        """The weights are those before the bad batch: keep them."""
        if all_finite(self.task.state()):
            self._save(step)
        fix = f"lower the learning rate (its peak is {self.schedule.rate.peak:g}) or the clipping, or take full precision"
        kept = (
            f"; the last good state is kept in {self.checkpoint.path}" if self.checkpoint is not None and self.checkpoint.exists() else ""
        )
        raise not_finite(self.task, step, loss, terms, norm, cases, fix + kept)

    def _after(self, step: int) -> None:
        """A line of the history, a judgement, a checkpoint: whatever is due after a step."""
        done, every = step + 1, self.schedule.judge_every
        last = done == self.schedule.end
        due = self.checkpoint is not None and (last or self.checkpoint.is_due())
        line = last or done % self.schedule.log_every == 0
        judged = last or (due if every is None else every > 0 and done % every == 0)
        if line or judged:
            shared = line or every is not None  # clocks differ between processes: what is due by them is no common moment
            loss, terms = self.means.over_processes(self.accelerator) if shared else self.means.own()
            stretch = Stretch(done, terms, loss, self.schedule.rate(step, self.schedule.steps))
        if line:
            self.history.losses.append({"step": done, **terms})
            self.watcher.losses(stretch)
            self.means.clear()
        if judged:
            self._judge(stretch)
            self.task.training_mode()
        if due or (judged and self.checkpoint is not None and self.checkpoint.minutes is None):
            self._save(done)

    def _judge(self, stretch: Stretch) -> None:
        with nullcontext() if self.average is None else self.average.in_place():
            found = self.task.judge(stretch)
            self.history.stale += 1
            if self.task.keeps_best and self.history.is_better(found.key):
                self.best = {name: tensor.detach().clone() for name, tensor in self.task.kept().items()}
                self.history.best_step, self.history.best_key, self.history.stale = stretch.step, found.key, 0
        if found.record is not None:
            self.history.scores.append(found.record)
            self.watcher.epoch(found.record)

    def _keep(self) -> None:
        """Put what is kept in place of the weights of the last step."""
        if self.best:
            self.task.load_kept(self.best)
        elif self.average is not None:
            self.average.keep()

    # ---- Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self, done: int) -> None:
        """Everything that the next step depends on; one process writes, and only where the next step draws from a seed of its own."""
        can_go_on = done >= self.schedule.end or self.task.seed_of(done) is not None
        if self.checkpoint is None or not can_go_on or not self.accelerator.is_main_process:
            return
        self.is_kept = True
        self.checkpoint.write(
            {
                "step": done,
                "weights": self.task.state(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "average": {} if self.average is None else self.average.values,
                "best": self.best,
                "history": dataclasses.asdict(self.history),
                "means": self.means.state(),
                "memory": self.task.memory(),
            }
        )

    def resume(self) -> int:
        """The step to go on with."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        saved = self.checkpoint.read()
        try:
            self.task.load_state(saved["weights"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.average is not None:
                self.average.restore(saved["average"])
            self.history.restore(saved["history"])
            self.means.restore(saved["means"])
            self.task.load_memory(saved["memory"])
        except (RuntimeError, ValueError, KeyError, TypeError, TargetError) as error:
            raise self.checkpoint.misfit() from error
        if self.accelerator.scaler is not None and saved["scaler"] is not None:  # None: that run was not in float16
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.best = {name: tensor.to(self.accelerator.device) for name, tensor in saved["best"].items()}
        self.is_kept = True
        self.watcher.skip(int(saved["step"]))
        return int(saved["step"])
