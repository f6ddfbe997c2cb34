"""The loop of every segmenter: teacher, plain student, one region's student, student with experts, an added expert.

The state after step s is a function of the seed and s: patches, augmentation and dropout are drawn from (seed, step), so a
run that goes on from a checkpoint ends where an unbroken one ends (bit-equal on a CPU with one setting of threads).
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from medlore.decomposing.segmenters.batches import Batch, Dealer, batches_ahead
from medlore.decomposing.segmenters.network import PromptedSegmenter, parameter_groups
from medlore.decomposing.segmenters.settings import LossSettings, Precision, ScheduleSettings
from medlore.errors import CheckpointError, StepError
from medlore.files import atomic_path
from medlore.losses import deep_mask_loss, mask_distillation

Progress = Callable[[int, int, str], None]
Scores = dict[str, Any]
Validate = Callable[[PromptedSegmenter], Scores]


@dataclass(frozen=True)
class Plan:
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
    loss: LossSettings
    seed: int
    precision: Precision
    validate_every: int = 0
    checkpoint_minutes: float = 5.0
    workers: int = 0
    log_every: int = 50


@dataclass
class History:
    """What a training run leaves beside the weights.

    Attributes:
        losses: mean of each term over `log_every` steps.
        scores: of each validation.
        seconds: of all steps, over all parts of a run that was resumed.
        waited: of them, spent waiting for data.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0


def train_segmenter(  # noqa: PLR0913 - one door for one run
    network: PromptedSegmenter,
    dealer: Dealer,
    plan: Plan,
    *,
    accelerator: Accelerator,
    checkpoint: Path,
    teacher: PromptedSegmenter | None = None,
    validate: Validate | None = None,
    progress: Progress = lambda _step, _steps, _text: None,
    name: str = "segmenter",
) -> History:
    """Train in place; a checkpoint of an earlier run is gone on with.

    Args:
        network: its trainable parameters are trained.
        dealer: of the batches.
        plan: schedule and loss.
        accelerator: device and processes.
        checkpoint: file; removed by the caller when the network is safe.
        teacher: frozen; its voxel logits are distilled where the loss has a weight for it.
        validate: called on the network whose weights would be kept.
        progress: step, steps, text.
        name: of the network, for the trackers.

    Raises:
        StepError: loss or gradient are no longer finite; the state before that step is kept, and the cases are named.
        CheckpointError: a checkpoint of another network.
    """
    loop = _Loop(network.to(accelerator.device), plan, accelerator, checkpoint, teacher, name)
    schedule, history = plan.schedule, loop.history
    start = loop.resume()
    numbers = _batch_numbers(start, schedule, accelerator)
    batches = iter(batches_ahead(dealer, numbers, workers=plan.workers))
    for step in range(start, schedule.steps):
        began = time.perf_counter()
        terms = loop.step(step, batches)
        history.seconds += time.perf_counter() - began
        loop.log(step, terms)
        done = step + 1
        share = history.waited / max(history.seconds, 1e-9)
        progress(done, schedule.steps, f"loss {sum(terms.values()):.3f}, waits for data {share:.0%}")
        last = done == schedule.steps
        if validate is not None and (last or (plan.validate_every and done % plan.validate_every == 0)):
            loop.score(done, validate)
        if not last:  # the caller writes the end itself
            loop.save_if_due(done)
    loop.keep_average()
    return history


def learning_rate(step: int, schedule: ScheduleSettings) -> float:
    """Linear warm-up over a fraction of the steps, then a cosine to `final_share` of the peak."""
    warmup = max(round(schedule.warmup_fraction * schedule.steps), 1)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(schedule.steps - warmup, 1)))
    return schedule.learning_rate * (schedule.final_share + (1 - schedule.final_share) * cosine)


def autocast(device: torch.device | str, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 where it is asked for."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext()


def loss_terms(levels: Sequence[Tensor], batch: Batch, loss: LossSettings, taught: Tensor | None = None) -> dict[str, Tensor]:
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


class _Loop:
    """State of one training run."""

    def __init__(
        self,
        network: PromptedSegmenter,
        plan: Plan,
        accelerator: Accelerator,
        checkpoint: Path,
        teacher: PromptedSegmenter | None,
        name: str,
    ) -> None:
        self.network, self.plan, self.accelerator, self.checkpoint, self.name = network, plan, accelerator, checkpoint, name
        self.teacher = teacher if teacher is not None and plan.loss.distillation > 0 else None
        if self.teacher is not None:
            self.teacher.to(accelerator.device).eval().requires_grad_(requires_grad=False)
        if plan.precision == "bf16" or accelerator.device.type == "cpu":  # channels last is 10 to 50 percent of a step on a processor
            self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        schedule = plan.schedule
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(parameter_groups(network, schedule.weight_decay), lr=schedule.learning_rate, fused=True)
        self.average = {n: p.detach().clone() for n, p in self._trained()} if schedule.ema else {}
        self.wrapped: nn.Module = accelerator.prepare_model(network)
        self.history = History()
        self.sums: dict[str, float] = {}
        self.saved_at = time.monotonic()

    def step(self, step: int, batches: Any) -> dict[str, float]:
        """One optimiser step; the weighted terms of its loss."""
        plan, schedule = self.plan, self.plan.schedule
        torch.manual_seed((plan.seed << 32) + (step << 8) + self.accelerator.process_index)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(step, schedule)
        self.network.train()
        self.optimiser.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        names: list[str] = []
        for micro in range(schedule.accumulate):
            began = time.perf_counter()
            batch: Batch = next(batches).to(self.accelerator.device)
            self.history.waited += time.perf_counter() - began
            names += batch.names
            last = micro + 1 == schedule.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                for term, value in self._backward(batch).items():
                    totals[term] = totals.get(term, 0.0) + value
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, schedule.clip))
        if not (math.isfinite(sum(totals.values())) and math.isfinite(norm)):
            self._stop(step, totals, norm, names)
        self.optimiser.step()
        for name, parameter in self._trained() if schedule.ema else ():
            self.average[name].lerp_(parameter.detach(), 1 - min(float(schedule.ema or 0), (step + 1) / (step + 10)))
        return totals

    def _backward(self, batch: Batch) -> dict[str, float]:
        with autocast(self.accelerator.device, self.plan.precision):
            levels = self.wrapped(batch.images, batch.rows, batch.regions, deep=True)
            with torch.no_grad():
                taught = None if self.teacher is None else self.teacher(batch.images, batch.rows, batch.regions)[0]
        terms = loss_terms(levels, batch, self.plan.loss, taught)
        self.accelerator.backward(torch.stack(list(terms.values())).sum() / self.plan.schedule.accumulate)
        return {name: float(term.detach()) / self.plan.schedule.accumulate for name, term in terms.items()}

    def _stop(self, step: int, totals: dict[str, float], norm: float, names: list[str]) -> None:
        """The weights are those before the bad batch: keep them."""
        self.save(step)
        found = ", ".join(f"{name} {value:g}" for name, value in totals.items())
        raise StepError(
            f"{self.name}, step {step}, cases {', '.join(dict.fromkeys(names))}",
            f"loss {found}, gradient norm {norm:g}",
            "finite numbers",
            f"look at these cases, or lower the learning rate (now {self.plan.schedule.learning_rate:g}); "
            f"the last good state is kept in {self.checkpoint}",
        )

    def log(self, step: int, terms: dict[str, float]) -> None:
        for term, value in terms.items():
            self.sums[term] = self.sums.get(term, 0.0) + value
        done = step + 1
        if done % self.plan.log_every == 0 or done == self.plan.schedule.steps:
            count = (done - 1) % self.plan.log_every + 1
            means = {term: total / count for term, total in self.sums.items()}
            self.history.losses.append({"step": done, **means})
            self.accelerator.log(
                {f"{self.name}/{t}": v for t, v in means.items()} | {f"{self.name}/rate": learning_rate(step, self.plan.schedule)},
                step=done,
            )
            self.sums.clear()

    def score(self, done: int, validate: Validate) -> None:
        """Validate the weights that would be kept: the average where there is one."""
        with _weights(self.network, self.average):
            scores = validate(self.network)
        self.history.scores.append({"step": done, **scores})
        if (mean := scores.get("mean")) is not None:
            self.accelerator.log({f"{self.name}/validation dice": mean}, step=done)

    def save_if_due(self, done: int) -> None:
        if time.monotonic() - self.saved_at >= 60 * self.plan.checkpoint_minutes:
            self.save(done)

    def save(self, done: int) -> None:
        """Everything that the next step depends on; one process writes."""
        if self.accelerator.is_main_process:
            state = {
                "step": done,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": self.average,
                "history": vars(self.history),
                "sums": self.sums,
            }
            with atomic_path(self.checkpoint) as temporary:
                torch.save(state, temporary)
        self.saved_at = time.monotonic()

    def resume(self) -> int:
        """The step to go on with."""
        if not self.checkpoint.is_file():
            return 0
        state = self._checkpoint_state()
        try:
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            fix = "give another --out, or delete the file to begin again"
            raise CheckpointError(str(self.checkpoint), "of another network", "a checkpoint of this study", fix) from error
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        vars(self.history).update(state["history"])
        self.sums.update(state["sums"])
        return int(state["step"])

    def _checkpoint_state(self) -> dict[str, Any]:
        try:
            return dict(torch.load(self.checkpoint, map_location=self.accelerator.device, weights_only=True))
        except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            fix = "delete the file to begin this network again"
            raise CheckpointError(str(self.checkpoint), "damaged", "a checkpoint of this study", fix) from error

    def keep_average(self) -> None:
        """Put the averaged weights in place of the last ones."""
        for name, parameter in self._trained() if self.average else ():
            parameter.data.copy_(self.average[name])

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]


class _weights(AbstractContextManager[None]):  # noqa: N801 - reads as a word in `with`
    """Other values of some parameters for a while."""

    def __init__(self, network: nn.Module, values: dict[str, Tensor]) -> None:
        self.network, self.values = network, values

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        parameters = dict(self.network.named_parameters())
        for name, value in self.values.items():
            held = parameters[name].data
            parameters[name].data = value
            self.values[name] = held


def _batch_numbers(start: int, schedule: ScheduleSettings, accelerator: Accelerator) -> list[int]:
    """Numbers of this process's batches: every process takes one of each group."""
    per_step, processes = schedule.accumulate, accelerator.num_processes
    return [
        (step * per_step + micro) * processes + accelerator.process_index
        for step in range(start, schedule.steps)
        for micro in range(per_step)
    ]
