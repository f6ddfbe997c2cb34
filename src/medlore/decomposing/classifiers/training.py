"""The loop of every network of a decomposition: mixed batches, both losses live, validation, checkpoints, exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from medlore.data.images.sampling import TaskBatch, TaskSampler
from medlore.data.images.transforms import Preprocessing, batches, normalise
from medlore.decomposing.classifiers.settings import LossSettings
from medlore.decomposing.classifiers.tasks import Part, Task
from medlore.errors import StepError
from medlore.files import atomic_path
from medlore.losses import feature_distillation, logit_distillation, task_loss
from medlore.metrics.classification import classification_report
from medlore.models.multitask import MixedOutput, MultiTaskNetwork

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one network is trained."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    clip: float
    evaluate_every: int
    task_power: float
    seed: int
    precision: str


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher and the weights of its terms.

    Attributes:
        network: the teacher, in eval mode.
        projection: student features -> the teacher's width; trained with the student, thrown away after.
        seen: the teacher's answers by step, filled as they are asked for and shared by the students of a study, whose batches are
            the same; None keeps none.
    """

    network: MultiTaskNetwork
    projection: nn.Module | None
    loss: LossSettings
    seen: dict[int, MixedOutput] | None = None

    @torch.no_grad()
    def answers(self, images: Tensor, parts: list[tuple[str, int]], step: int) -> MixedOutput:
        """The teacher's logits and features of the images of a step."""
        if self.seen is None:
            return self.network(images, parts)  # type: ignore[no-any-return]
        if step not in self.seen:
            self.seen[step] = self.network(images, parts)
        return self.seen[step]


@dataclass
class History:
    """What a training run leaves beside the weights.

    Attributes:
        losses: name of the term -> its mean over the steps between two evaluations.
        scores: validation score (mean of the tasks) at each evaluation.
        best_step: the step whose weights were kept.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_score: float = -math.inf


def train_network(
    network: MultiTaskNetwork,
    tasks: Mapping[str, Task],
    schedule: Schedule,
    *,
    accelerator: Accelerator,
    preprocessing: Preprocessing,
    checkpoint: Path,
    distillation: Distillation | None = None,
    progress: Progress = lambda _step, _steps, _text: None,
) -> History:
    """Train in place and leave the network at its best validation score.

    The state after step s is a function of the seed and s: batches and augmentation are drawn from (seed, step), so a run
    that goes on from `checkpoint` ends where an unbroken one ends (bit-equal on CPU with one thread setting).

    Raises:
        StepError: the loss is no longer finite; the last good checkpoint stays.
    """
    device = accelerator.device
    trained: nn.ModuleDict = nn.ModuleDict({"network": network})
    if distillation is not None and distillation.projection is not None:
        trained["projection"] = distillation.projection
    trained.to(device)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    sampler = TaskSampler(
        {n: len(t.train) for n, t in tasks.items()}, batch_size=schedule.batch_size, power=schedule.task_power, seed=schedule.seed
    )
    history, start = History(), 0
    best = _copy(trained["network"])
    if checkpoint.is_file():
        start, history, best = _load(checkpoint, trained, optimiser, device)
    wrapped = accelerator.prepare_model(_Step(network, None if distillation is None else distillation.projection))
    sums: dict[str, float] = {}
    for step in range(start, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, schedule)
        network.train()
        parts = _share_of_process(sampler.batch(step), accelerator)
        # each process augments by its own numbers, and a single one by the step's
        images, targets = _gather(parts, tasks, step * accelerator.num_processes + accelerator.process_index, device)
        terms = _losses(wrapped, images, targets, parts, tasks, distillation, schedule, step)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise StepError(
                f"step {step}",
                f"loss {float(loss.detach())}",
                "a finite loss",
                f"lower the learning rate (now {schedule.learning_rate}); {checkpoint} is kept",
            )
        optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimiser.step()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + float(term.detach())
        progress(step + 1, schedule.steps, f"loss {float(loss.detach()):.3f}")
        if (step + 1) % schedule.evaluate_every == 0 or step + 1 == schedule.steps:
            _evaluate_and_keep(step + 1, network, tasks, preprocessing, history, best, sums, schedule)
            if accelerator.is_main_process:
                _save(checkpoint, step + 1, trained, optimiser, history, best)
            accelerator.wait_for_everyone()
    network.load_state_dict(best)
    return history


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up over a fraction of the steps, then a cosine to zero."""
    warmup = max(round(schedule.warmup_fraction * schedule.steps), 1)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(schedule.steps - warmup, 1)))


@torch.no_grad()
def predict_scores(network: MultiTaskNetwork, part: Part, task: Task, preprocessing: Preprocessing, *, batch_size: int = 256) -> np.ndarray:
    """Scores (n, c) of a task's images: softmax or sigmoid of its head's logits, through its expert where there are experts."""
    network.eval()
    device = next(network.parameters()).device
    found = []
    for rows in batches(len(part), batch_size):
        images = normalise(part.images[rows].to(device), preprocessing)
        logits = network(images, [(task.name, len(images))]).logits[task.name].float()
        found.append((logits.softmax(-1) if task.kind == "single" else logits.sigmoid()).cpu())
    return torch.cat(found).numpy()


def validation_score(scores: np.ndarray, task: Task, part: Part) -> float:
    """What selection looks at: balanced accuracy of single-label tasks, macro AUC of multi-label ones; 0 to 1."""
    report = classification_report(part.targets.numpy(), scores, classes=task.classes, task=task.kind, bootstrap=0)
    value = report["metrics"]["balanced_accuracy" if task.kind == "single" else "macro_auc"]["value"]
    return math.nan if value is None else float(value)


class _Step(nn.Module):
    """Network and projection in one forward, so that DistributedDataParallel sees every parameter that is trained."""

    def __init__(self, network: MultiTaskNetwork, projection: nn.Module | None) -> None:
        super().__init__()
        self.network, self.projection = network, projection

    def forward(self, images: Tensor, parts: list[tuple[str, int]]) -> tuple[MixedOutput, Tensor | None]:
        output = self.network(images, parts)
        return output, None if self.projection is None else self.projection(output.features)


def make_accelerator(device: str) -> Accelerator:
    """An accelerator on a device; absent experts have no gradient in a step, which DDP has to be told."""
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def _losses(
    wrapped: nn.Module,
    images: Tensor,
    targets: Mapping[str, Tensor],
    parts: list[TaskBatch],
    tasks: Mapping[str, Task],
    distillation: Distillation | None,
    schedule: Schedule,
    step: int,
) -> dict[str, Tensor]:
    """The terms of the loss, each already weighted; every row of the batch weighs alike."""
    layout = [(p.task, len(p.indices)) for p in parts]
    autocast = torch.autocast(images.device.type, torch.bfloat16) if schedule.precision == "bf16" else nullcontext()
    with autocast:
        output, projected = wrapped(images, layout)
    weight = {name: rows / len(images) for name, rows in layout}
    logits = {name: z.float() for name, z in output.logits.items()}
    terms = {"task": _weighted(weight, lambda n: task_loss(logits[n], targets[n], tasks[n].kind))}
    if distillation is None:
        return terms
    loss = distillation.loss
    with autocast:
        seen = distillation.answers(images, layout, step)
    if loss.beta > 0:
        terms["logit distillation"] = loss.beta * _weighted(
            weight, lambda n: logit_distillation(logits[n], seen.logits[n].float(), tasks[n].kind, loss.temperature)
        )
    if loss.feature > 0 and projected is not None:
        terms["feature distillation"] = loss.feature * feature_distillation(projected.float(), seen.features.float())
    return terms


def _weighted(weight: Mapping[str, float], term: Callable[[str], Tensor]) -> Tensor:
    return torch.stack([share * term(name) for name, share in weight.items()]).sum()


def _gather(parts: list[TaskBatch], tasks: Mapping[str, Task], number: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    images = [tasks[p.task].augment(tasks[p.task].train.images[torch.from_numpy(p.indices)].to(device), step=number) for p in parts]
    targets = {p.task: tasks[p.task].train.targets[torch.from_numpy(p.indices)].to(device) for p in parts}
    return torch.cat(images), targets


def _share_of_process(parts: list[TaskBatch], accelerator: Accelerator) -> list[TaskBatch]:
    """This process's rows of the mixed batch: every n-th row, an equal share in which all tasks take part.

    Were the shares contiguous, statistics kept per expert would follow the tasks of the first process alone, whose buffers
    DistributedDataParallel hands to the others.
    """
    count = accelerator.num_processes
    if count == 1:
        return parts
    mine, start = [], 0
    for part in parts:
        indices = part.indices[(accelerator.process_index - start) % count :: count]
        if len(indices):
            mine.append(TaskBatch(part.task, indices))
        start += len(part.indices)
    return mine


def _evaluate_and_keep(
    step: int,
    network: MultiTaskNetwork,
    tasks: Mapping[str, Task],
    preprocessing: Preprocessing,
    history: History,
    best: dict[str, Tensor],
    sums: dict[str, float],
    schedule: Schedule,
) -> None:
    scores = {n: validation_score(predict_scores(network, t.validation, t, preprocessing), t, t.validation) for n, t in tasks.items()}
    defined = [score for score in scores.values() if not math.isnan(score)]
    mean = sum(defined) / len(defined) if defined else math.nan
    count = (step - 1) % schedule.evaluate_every + 1
    history.losses.append({"step": step, **{name: total / count for name, total in sums.items()}})
    history.scores.append({"step": step, **scores, "mean": mean})
    sums.clear()
    if mean > history.best_score or history.best_score == -math.inf:  # no score is defined so far: the latest weights, not the first
        history.best_step = step
        history.best_score = history.best_score if math.isnan(mean) else mean
        for name, value in network.state_dict().items():
            best[name].copy_(value)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _save(path: Path, step: int, trained: nn.Module, optimiser: torch.optim.Optimizer, history: History, best: dict[str, Tensor]) -> None:
    state: dict[str, Any] = {
        "step": step,
        "trained": trained.state_dict(),
        "optimiser": optimiser.state_dict(),
        "best": best,
        "history": vars(history),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load(path: Path, trained: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> tuple[int, History, dict[str, Tensor]]:
    state = torch.load(path, map_location=device, weights_only=True)
    trained.load_state_dict(state["trained"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"]), History(**state["history"]), state["best"]
