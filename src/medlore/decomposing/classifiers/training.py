"""The training of every network of a decomposition: mixed batches, both losses live, the best validation score kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medlore.data.images.sampling import TaskBatch, TaskSampler
from medlore.data.images.transforms import Preprocessing, batches, normalise
from medlore.decomposing.classifiers.settings import ClassifierLossSettings
from medlore.decomposing.classifiers.tasks import LabelledImages, TaskData
from medlore.losses import feature_distillation, logit_distillation, task_loss
from medlore.metrics.classification import classification_report
from medlore.models.multitask import MixedOutput, MultiTaskNetwork
from medlore.training import task as engine
from medlore.training.checkpoint import Checkpoint
from medlore.training.history import History
from medlore.training.loop import train
from medlore.training.schedule import Schedule
from medlore.training.watching import Narration, NetworkTracking, Progress, Watchers


@dataclass(frozen=True)
class ClassifierTrainingPlan:
    """How one network is trained.

    Attributes:
        schedule: how long and how fast.
        batch_size: images a step, over all processes together.
        task_power: a task's share of a batch is proportional to size ** task_power.
        seed: of order, augmentation and dropout.
    """

    schedule: Schedule
    batch_size: int
    task_power: float
    seed: int


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
    loss: ClassifierLossSettings
    seen: dict[int, MixedOutput] | None = None

    @torch.no_grad()
    def answers(self, images: Tensor, parts: list[tuple[str, int]], step: int) -> MixedOutput:
        """The teacher's logits and features of the images of a step."""
        if self.seen is None:
            return self.network(images, parts)  # type: ignore[no-any-return]
        if step not in self.seen:
            self.seen[step] = self.network(images, parts)
        return self.seen[step]


@dataclass(frozen=True)
class _Mixed:
    """A mixed batch: images (b, 3, s, s) grouped by task, targets by task, and which samples of each task they are."""

    images: Tensor
    targets: dict[str, Tensor]
    parts: list[TaskBatch]

    @property
    def layout(self) -> list[tuple[str, int]]:
        """(task, rows) in the order of the rows."""
        return [(part.task, len(part.indices)) for part in self.parts]


def train_network(  # noqa: PLR0913 - one door for one training
    network: MultiTaskNetwork,
    tasks: Mapping[str, TaskData],
    plan: ClassifierTrainingPlan,
    *,
    accelerator: Any,
    preprocessing: Preprocessing,
    checkpoint: Checkpoint | None = None,
    distillation: Distillation | None = None,
    progress: Progress = lambda _step, _steps, _text: None,
    name: str = "network",
) -> History:
    """Train in place and leave the network at its best validation score.

    Raises:
        StepError: the loss is no longer finite; the last good checkpoint stays.
        CheckpointError: a checkpoint that is damaged or of another network.
    """
    task, history = ClassifierTask(network, tasks, plan, accelerator, preprocessing, distillation, name=name), History()
    looking_on = [Narration(progress, plan.schedule.steps, history), NetworkTracking(accelerator, name, measure="score")]
    return train(task, plan.schedule, checkpoint=checkpoint, watcher=Watchers(looking_on), history=history)


class ClassifierTask(engine.Task):
    """What the engine is given for one network; the step of the best mean score over the tasks is kept.

    Args:
        network: its trainable parameters are trained, and the projection of the distillation beside them.
        tasks: their training and validation parts.
        plan: schedule and batches.
        accelerator: device, precision and processes.
        preprocessing: of the images.
        distillation: from a teacher; None for none.
        name: of the network.
    """

    keeps_best: ClassVar[bool] = True

    def __init__(
        self,
        network: MultiTaskNetwork,
        tasks: Mapping[str, TaskData],
        plan: ClassifierTrainingPlan,
        accelerator: Any,
        preprocessing: Preprocessing,
        distillation: Distillation | None,
        *,
        name: str = "network",
    ) -> None:
        both = _Step(network, None if distillation is None else distillation.projection)
        super().__init__(name, both, accelerator, seed=plan.seed)
        self.network, self.tasks, self.preprocessing, self.distillation = network, tasks, preprocessing, distillation
        sizes = {n: len(t.train) for n, t in tasks.items()}
        self.sampler = TaskSampler(sizes, batch_size=plan.batch_size, power=plan.task_power, seed=plan.seed)

    def batches(self, start: int, stop: int) -> Generator[_Mixed]:
        """Each process augments by its own numbers, and a single one by the step's."""
        accelerator = self.accelerator
        for step in range(start, stop):
            parts = _share_of_process(self.sampler.batch(step), accelerator)
            number = step * accelerator.num_processes + accelerator.process_index
            yield _Mixed(*_gather(parts, self.tasks, number, accelerator.device), parts)

    def loss(self, batch: _Mixed, step: int) -> dict[str, Tensor]:
        """Every row of the batch weighs alike."""
        layout = batch.layout
        output, projected = self.forward(batch.images, layout)
        weight = {name: rows / len(batch.images) for name, rows in layout}
        logits = {name: z.float() for name, z in output.logits.items()}
        terms = {"task": _weighted(weight, lambda n: task_loss(logits[n], batch.targets[n], self.tasks[n].kind))}
        return terms if self.distillation is None else terms | self._distilled(batch, step, logits, projected, weight)

    def _distilled(
        self, batch: _Mixed, step: int, logits: Mapping[str, Tensor], projected: Tensor | None, weight: Mapping[str, float]
    ) -> dict[str, Tensor]:
        assert self.distillation is not None  # noqa: S101  # nosec B101 # the caller looks
        with self.accelerator.autocast():
            seen = self.distillation.answers(batch.images, batch.layout, step)
        loss, terms = self.distillation.loss, dict[str, Tensor]()
        if loss.beta > 0:
            terms["logit distillation"] = loss.beta * _weighted(
                weight, lambda n: logit_distillation(logits[n], seen.logits[n].float(), self.tasks[n].kind, loss.temperature)
            )
        if loss.feature > 0 and projected is not None:
            terms["feature distillation"] = loss.feature * feature_distillation(projected.float(), seen.features.float())
        return terms

    def cases(self, batch: _Mixed) -> list[str]:
        """`task/image` of every row."""
        return [f"{part.task}/{self.tasks[part.task].train.keys[int(i)]}" for part in batch.parts for i in part.indices]

    def judge(self, stretch: engine.Stretch) -> engine.Judgement:
        """The validation score of each task, and their mean over those where one is defined."""
        scores = {
            n: validation_score(predict_scores(self.network, t.validation, t, self.preprocessing), t, t.validation)
            for n, t in self.tasks.items()
        }
        defined = [score for score in scores.values() if not math.isnan(score)]
        mean = sum(defined) / len(defined) if defined else math.nan
        return engine.Judgement({"step": stretch.step, **scores, "mean": mean}, (mean,) if defined else None)

    def kept(self) -> dict[str, Tensor]:
        """The network; the projection is thrown away after the training."""
        return self.network.state_dict()

    def load_kept(self, kept: Mapping[str, Tensor]) -> None:
        """Put it back."""
        self.network.load_state_dict(kept)


@torch.no_grad()
def predict_scores(
    network: MultiTaskNetwork, part: LabelledImages, task: TaskData, preprocessing: Preprocessing, *, batch_size: int = 256
) -> np.ndarray:
    """Scores (n, c) of a task's images: softmax or sigmoid of its head's logits, through its expert where there are experts."""
    network.eval()
    device = next(network.parameters()).device
    found = []
    for rows in batches(len(part), batch_size):
        images = normalise(part.images[rows].to(device), preprocessing)
        logits = network(images, [(task.name, len(images))]).logits[task.name].float()
        found.append((logits.softmax(-1) if task.kind == "single" else logits.sigmoid()).cpu())
    return torch.cat(found).numpy()


def validation_score(scores: np.ndarray, task: TaskData, part: LabelledImages) -> float:
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


def _weighted(weight: Mapping[str, float], term: Callable[[str], Tensor]) -> Tensor:
    return torch.stack([share * term(name) for name, share in weight.items()]).sum()


def _gather(parts: list[TaskBatch], tasks: Mapping[str, TaskData], number: int, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    images = [tasks[p.task].augment(tasks[p.task].train.images[torch.from_numpy(p.indices)].to(device), step=number) for p in parts]
    targets = {p.task: tasks[p.task].train.targets[torch.from_numpy(p.indices)].to(device) for p in parts}
    return torch.cat(images), targets


def _share_of_process(parts: list[TaskBatch], accelerator: Any) -> list[TaskBatch]:
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
