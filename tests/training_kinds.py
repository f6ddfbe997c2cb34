"""The five kinds of training, each as small as it can be and with the parts that it has in the product."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medlore.training.schedule import Schedule
from medlore.training.task import Task

STEPS = 6


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Attributes:
        make: accelerator, folder, optionally validation scores in place of those that are measured -> a task with an untrained network.
        schedule: six steps, three judgements, half of them with a line of the history.
        spared: parameters of more than one dimension that have no decay all the same.
    """

    make: Callable[..., Task]
    schedule: Schedule
    spared: tuple[str, ...] = ()
    names_cases: bool = True


def kind(name: str) -> Kind:
    """One of `KINDS`; what it needs is imported now."""
    return {
        "tuning": _tuning, "pre-training": _pretraining, "classifier": _classifier, "segmenter": _segmenter, "few-shot": _few_shot
    }[name]()  # fmt: skip


KINDS = ("tuning", "pre-training", "classifier", "segmenter", "few-shot")
KEEP_BEST = ("tuning", "classifier")  # the others keep the average, or the end


# ---- Few-shot tuning ------------------------------------------------------------------------------------------------------


class TinyNet(nn.Module):
    """A classifier of flat features with a norm, and dropout so that random states matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def _tuning() -> Kind:
    from medlore.layers.tuning.interface import Tuning
    from medlore.training.watching import Watcher
    from medlore.tuning.training import EpochSchedule, Examples, Trainer, TuningTask

    schedule = EpochSchedule(epochs=3, batch_size=4, learning_rate=0.05, warmup_fraction=0.2)

    def make(accelerator: Any, _folder: Path, scores: list[float] | None = None) -> Task:
        rng = np.random.default_rng(4)
        targets = np.arange(8) % 2
        features = torch.from_numpy((rng.standard_normal((8, 4)) + targets[:, None]).astype(np.float32))
        data = Examples(lambda rows, *, step: features[torch.from_numpy(rows)], targets.astype(np.int64), [f"image{i}" for i in range(8)])
        net = TinyNet()
        script = iter(scores or [])
        trainer = Trainer(
            Tuning(net, "weights", lambda _folder: None, lambda: net), "single", schedule, accelerator, watcher=Watcher(),
            judge=lambda labels, found: next(script) if scores else float((found.argmax(1) == labels).mean()),
        )  # fmt: skip
        return TuningTask(trainer, data, data)

    return Kind(make, schedule.in_steps(2))


# ---- Pre-training ---------------------------------------------------------------------------------------------------------


def _pretraining() -> Kind:
    from maintenance.pretrain import PretrainTask
    from maintenance.pretrain_images import LabelledImages
    from maintenance.pretrain_settings import PretrainSettings

    settings = PretrainSettings(
        archives=("colours.zip",), image_size=16, width=16, depth=1, heads=2, mlp_width=16, steps=STEPS, batch_size=8, kept_patches=3,
        full_from=0.5, mix_share=0.5, learning_rate=0.01, ema_decay=0.6,
    )  # fmt: skip

    def make(accelerator: Any, folder: Path, scores: list[float] | None = None) -> Task:
        del scores
        rng = np.random.default_rng(0)
        images = torch.from_numpy(rng.integers(0, 255, (24, 3, 16, 16)).astype(np.uint8))
        data = LabelledImages(images, torch.arange(24) % 3, ("colours:a", "colours:b", "colours:c"))
        return PretrainTask(settings, {"train": data, "val": data}, accelerator, folder / "pretraining")

    schedule = settings.in_steps()
    spared = ("vit.embeddings.cls_token", "vit.embeddings.position_embeddings")
    return Kind(make, Schedule(**{**vars(schedule), "judge_every": 2, "log_every": 3}), spared, names_cases=False)


# ---- Decomposition of a classifier ----------------------------------------------------------------------------------------


class TinyBody(nn.Module):
    """A convolution, a norm, dropout; answers like a transformers classifier without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.Dropout(0.3)
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.conv(self.drop(self.norm(self.stem(pixel_values)).relu())).mean((2, 3)))


def _classifier() -> Kind:
    from medlore.data.images.transforms import Preprocessing, TrainAugmentation
    from medlore.decomposing.classifiers.settings import ClassifierLossSettings, TaskSettings
    from medlore.decomposing.classifiers.tasks import LabelledImages, TaskData
    from medlore.decomposing.classifiers.training import ClassifierTask, ClassifierTrainingPlan, Distillation
    from medlore.layers.experts.surgery import install_experts
    from medlore.models.multitask import MultiTaskNetwork
    from medlore.training.schedule import CosineAfterWarmup

    schedule = Schedule(STEPS, CosineAfterWarmup(0.02, warmup_fraction=0.2), weight_decay=0.02, clip=1.0, judge_every=2, log_every=2)
    preprocessing = Preprocessing(16)

    def part(seed: int, classes: int, count: int) -> LabelledImages:
        rng = np.random.default_rng(seed)
        images = torch.from_numpy(rng.integers(0, 255, (count, 3, 16, 16)).astype(np.uint8))
        return LabelledImages(images, torch.arange(count) % classes, tuple(f"{seed}-{i}" for i in range(count)), (None,) * count)

    def task(name: str, classes: int, seed: int) -> TaskData:
        parts = [part(seed + k, classes, 12) for k in range(3)]
        names = tuple(f"c{i}" for i in range(classes))
        augment = TrainAugmentation(preprocessing, seed=seed, crop=(0.5, 1.0))
        return TaskData(name, names, "single", parts[0], parts[1], parts[2], augment, TaskSettings(name=name, data=Path("nowhere")))

    def make(accelerator: Any, _folder: Path, scores: list[float] | None = None) -> Task:
        torch.manual_seed(2)
        tasks = {"left": task("left", 2, 10), "right": task("right", 3, 20)}
        classes = {name: len(t.classes) for name, t in tasks.items()}
        teacher = MultiTaskNetwork(TinyBody(), classes, width=8).eval().requires_grad_(requires_grad=False)
        body = TinyBody()
        install_experts(body, experts=list(tasks), ranks={"left": 1, "right": 2}, targets=lambda name, _module: name == "conv", scaling=2.0)
        network = MultiTaskNetwork(body, classes, width=8, experts=True)
        distillation = Distillation(teacher, nn.Linear(8, 8), ClassifierLossSettings())
        made = ClassifierTask(
            network, tasks, ClassifierTrainingPlan(schedule, 6, 0.5, 1), accelerator, preprocessing, distillation, name="experts"
        )
        if scores is not None:
            _script(made, scores, len(tasks))
        return made

    return Kind(make, schedule)


def _script(task: Any, scores: list[float], tasks: int) -> None:
    """Validation scores as they are written, the same for every task."""
    from medlore.decomposing.classifiers import training

    left = iter([score for score in scores for _ in range(tasks)])
    measured, task_judge = training.validation_score, task.judge

    def judge(stretch: Any) -> Any:
        training.validation_score = lambda *_: next(left)
        try:
            return task_judge(stretch)
        finally:
            training.validation_score = measured

    task.judge = judge


# ---- Segmenters -----------------------------------------------------------------------------------------------------------


@functools.cache
def _study(folder: Path) -> tuple[Any, Any]:
    from medlore.decomposing.segmenters.cohort import read_cohort
    from medlore.decomposing.segmenters.settings import SegmentationSettings
    from medlore.runs.settings_file import read_settings
    from tiny_segmentation import write_study

    file = folder / "study" / "study.yaml"
    settings = read_settings(SegmentationSettings, file if file.is_file() else write_study(file.parent))
    return settings, read_cohort(settings, folder=file.parent, cache=file.parent / "cache")


def _sampler(settings: Any, cohort: Any, batch_size: int) -> Any:
    from medlore.decomposing.segmenters.batches import make_sampler
    from medlore.decomposing.segmenters.context import settings_rules

    rules = settings_rules(settings)
    return make_sampler(cohort, patch_size=(16, 16, 16), max_prompts=3, rules=rules, batch_size=batch_size, mode="mixed", seed=3)


def _with_experts(model: Any, experts: list[str], base: str) -> Any:
    from medlore.layers.experts.surgery import install_experts
    from medlore.models.segmenter.network import expert_targets

    targets = set(expert_targets(model.config))
    install_experts(model, experts=experts, ranks=2, targets=lambda name, _module: name in targets, scaling=2.0, base=base)  # type: ignore[arg-type]
    return model


def _plan(**changes: Any) -> Any:
    from medlore.decomposing.segmenters.settings import ScheduleSettings, SegmenterLossSettings
    from medlore.decomposing.segmenters.training import SegmenterTrainingPlan

    values = {"steps": STEPS, "batch_size": 1, "learning_rate": 3e-3, "warmup_fraction": 0.2, **changes}
    return SegmenterTrainingPlan(
        ScheduleSettings(**values), SegmenterLossSettings(), seed=5, precision="fp32", validate_every=2, log_every=3
    )


def _segmenter() -> Kind:
    from medlore.decomposing.segmenters.network import PromptedSegmenter, new_prompts
    from medlore.decomposing.segmenters.training import SegmenterTask
    from medlore.models.segmenter.network import Segmenter

    plan = _plan(accumulate=2, ema=0.2, batch_size=2, weight_decay=0.01)

    def make(accelerator: Any, folder: Path, scores: list[float] | None = None) -> Task:
        del scores
        settings, cohort = _study(folder)
        torch.manual_seed(1)
        teacher = PromptedSegmenter(Segmenter(settings.teacher.sizes.config(), dropout=0.0), new_prompts(3, 16, seed=0), learn_prompts=True)
        model = _with_experts(Segmenter(settings.student.sizes.config(), dropout=0.2), list(cohort.regions), "trainable")
        network = PromptedSegmenter(model, new_prompts(3, 16, seed=0), learn_prompts=True)
        return SegmenterTask(network, _sampler(settings, cohort, 2), plan, accelerator, teacher, _weights_seen, name="experts")

    return Kind(make, plan.in_steps(), ("prompts",))


def _few_shot() -> Kind:
    from medlore.decomposing.segmenters.few_shot import _NEW, _TunedSegmenter
    from medlore.decomposing.segmenters.network import new_prompts
    from medlore.decomposing.segmenters.training import SegmenterTask
    from medlore.models.segmenter.network import Segmenter

    plan = _plan(weight_decay=0.01)

    def make(accelerator: Any, folder: Path, scores: list[float] | None = None) -> Task:
        del scores
        settings, cohort = _study(folder)
        torch.manual_seed(1)
        model = _with_experts(Segmenter(settings.student.sizes.config(), dropout=0.2), [_NEW], "frozen")
        network = _TunedSegmenter(model, new_prompts(3, 16, seed=0), learn_prompts=True)
        return SegmenterTask(network, _sampler(settings, cohort, 1), plan, accelerator, None, _weights_seen, name="sr-lora")

    return Kind(make, plan.in_steps(), ("prompts",))


def _weights_seen(network: Any) -> dict[str, Any]:
    """In place of Dice, which takes long: what the validation would look at, as one number."""
    return {"mean": float(sum(p.detach().double().abs().sum() for p in copy.copy(list(network.parameters()))))}
