"""`medlore decompose`: a teacher becomes one light shared backbone and a low-rank expert per task.

Top to bottom: read the tasks; train or fit the teacher; train the student with experts, and the networks that it has to
be compared with; measure them on the test parts; write the expert pack and the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from medlore.assets import PREFIX
from medlore.data.images.transforms import Preprocessing
from medlore.decomposing.classifiers.export import write_backbone
from medlore.decomposing.classifiers.ranks import adapted_layers, choose_ranks
from medlore.decomposing.classifiers.report import measure, table_rows
from medlore.decomposing.classifiers.settings import DecomposeSettings, RankSettings
from medlore.decomposing.classifiers.tasks import TaskData, fingerprint, read_tasks
from medlore.decomposing.classifiers.training import ClassifierTrainingPlan, Distillation, train_network
from medlore.decomposing.rank_rules import rule_of_variant
from medlore.decomposing.stored_weights import as_stored
from medlore.decomposing.trained_once import TrainedOnce, identity_of
from medlore.errors import UnknownNameError
from medlore.files import atomic_folder, made_folder
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.surgery import install_experts
from medlore.models.backbones.reading import load_backbone
from medlore.models.backbones.students import StudentKind, build_student, feature_width
from medlore.models.classifier_pack import ExpertEntry, save_classifier_pack
from medlore.models.multitask import MixedOutput, MultiTaskNetwork, count_parameters
from medlore.ranks.experts import given_digest, write_expert_plans
from medlore.runs.hardware import seed_everything
from medlore.runs.report import Run
from medlore.runs.settings import found_beside
from medlore.runs.settings_file import read_settings
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint
from medlore.training.schedule import CosineAfterWarmup, Schedule
from medlore.training.watching import Progress

_STUDENTS = ("shufflenet", "resnet-18", "vit-small")
_SCALING = 2.0  # of every expert, whatever its rank, as in LoRKD's form with unequal ranks
_ANSWER_BYTES = 2**29
Narrator = Callable[[str], Progress]


@dataclass(frozen=True)
class Decomposition:
    """What `decompose` leaves.

    Attributes:
        pack: folder of the expert pack.
        table: one row per network and task, as in the report.
    """

    pack: Path
    table: list[dict[str, Any]]


def decompose(
    study: str | Path, out: str | Path, *, narrate: Narrator = lambda _name: lambda _step, _steps, _text: None, **flags: Any
) -> Decomposition:
    """Run a study; finished networks of an earlier run with the same settings are taken over.

    Args:
        study: YAML file of `DecomposeSettings`; its data paths are relative to it.
        out: folder for the pack (`OUT/pack`), the report and the checkpoints.
        narrate: name of a network -> a progress callback for its training.
        flags: settings that override the file.

    Raises:
        InputError: the study or its data cannot be used; nothing is written.
        StepError: a training diverged; the last good checkpoint stays.
    """
    context, body = _open(study, out, narrate, flags)
    if not context.writes:  # the other processes of a distributed run train along and leave the files to the first
        return Decomposition(context.out / "pack", _run(context, body)[0])
    made_folder(out)
    with Run("decompose", out, settings=context.settings, seed=context.settings.seed, device=context.device) as run:
        run.add_input(study)
        table, experts = _run(context, body)
        pack = _write_pack(context, experts, table)
        run.add_output("pack", pack)
        run.add_output("ranks", _write_ranks(context, experts))
        run.results.update(table=table, tasks={name: _sizes(task) for name, task in context.tasks.items()})
    return Decomposition(pack, table)


def _run(context: _Context, body: nn.Module | None) -> tuple[list[dict[str, Any]], MultiTaskNetwork]:
    rows, experts = _train_all(context, None if body is None else _teacher(context, body))
    return table_rows(rows), experts


def plan(study: str | Path, **flags: Any) -> dict[str, Any]:
    """What a study would train: sizes of the tasks, and parameters of teacher, shared base and each expert.

    Raises:
        InputError: the study or its data cannot be used.
    """
    context, body = _open(study, "", lambda _name: lambda _step, _steps, _text: None, flags)
    student = context.network(context.student(), context.tasks)
    network = _with_experts(context, None if body is None else context.network(body, context.tasks))
    layers = [m for m in network.body.modules() if isinstance(m, ExpertLayer)]
    cost = {name: sum(m.lora_A[name].numel() + m.lora_B[name].numel() for m in layers if m.ranks[name]) for name in context.tasks}
    return {
        "device": context.device,
        "tasks": {name: _sizes(task) for name, task in context.tasks.items()},
        "teacher_parameters": None if body is None else count_parameters(body),
        "base_parameters": count_parameters(student.body),
        "expert_parameters": cost,
        "adapted_layers": len(layers),
        "ranks": {name: [m.ranks[name] for m in layers] for name in context.tasks},
        "steps": context.settings.steps,
        "variants": list(context.settings.variants),
    }


def _open(study: str | Path, out: str | Path, narrate: Narrator, flags: Mapping[str, Any]) -> tuple[_Context, nn.Module | None]:
    settings = read_settings(DecomposeSettings, study, **flags)
    folder = Path(study).resolve().parent
    body, preprocessing = _teacher_body(settings, folder)
    tasks = read_tasks(settings, preprocessing, folder=folder)
    accelerator = make_accelerator(settings.device, settings.precision, absent_parameters=True)
    context = _Context(settings, tasks, preprocessing, Path(out), narrate, accelerator, folder)
    _with_experts(context, None, RankSettings(layout=settings.ranks.layout))  # what cannot be installed is said before anything is trained
    return context, body


@dataclass
class _Context:
    """The settings and data that every network of a study shares."""

    settings: DecomposeSettings
    tasks: dict[str, TaskData]
    preprocessing: Preprocessing
    out: Path
    narrate: Narrator
    accelerator: Any
    folder: Path = Path()  # of the study file
    seen: dict[int, MixedOutput] = field(default_factory=dict)  # the teacher's answers, by step

    @property
    def device(self) -> str:
        """Where the networks are."""
        return str(self.accelerator.device.type)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files: the only one, or the first of several."""
        return bool(self.accelerator.is_main_process)

    def network(self, body: nn.Module, tasks: Mapping[str, TaskData], *, experts: bool = False) -> MultiTaskNetwork:
        classes = {name: len(task.classes) for name, task in tasks.items()}
        return MultiTaskNetwork(body, classes, width=feature_width(body, self.settings.image_size), experts=experts)

    def student(self) -> nn.Module:
        s = self.settings.student
        seed_everything(self.settings.seed)
        return build_student(s.kind, image_size=self.settings.image_size, norm=s.norm, stem_stride=s.stem_stride)

    def plan(self, steps: int, learning_rate: float) -> ClassifierTrainingPlan:
        s = self.settings
        every = min(s.evaluate_every, steps)
        rate = CosineAfterWarmup(learning_rate, warmup_fraction=s.warmup_fraction)
        schedule = Schedule(steps, rate, weight_decay=s.weight_decay, clip=s.clip, judge_every=every, log_every=every)
        return ClassifierTrainingPlan(schedule, s.batch_size, s.task_power, s.seed)

    def identity(self, variant: str, tasks: Mapping[str, TaskData]) -> str:
        """A hash of all that decides a network's weights."""
        spares = ["weight decay spares vectors"] if self.settings.weight_decay > 0 else []  # until then it did not
        plans = [found] if (found := given_digest(self.settings.ranks.given, self.folder)) else []
        return identity_of(self.settings.parameters_of(variant), {name: fingerprint(task) for name, task in tasks.items()}, *spares, *plans)


def _train_all(context: _Context, teacher: MultiTaskNetwork | None) -> tuple[list[dict[str, Any]], MultiTaskNetwork]:
    """Rows of every network that was asked for, and the student with experts."""
    settings = context.settings
    rows: list[dict[str, Any]] = []
    if teacher is not None and "teacher" in settings.variants:
        rows += measure("teacher", teacher, context.tasks, context.preprocessing)
    if "shared" in settings.variants:
        rows += _compare(context, "shared", context.network(context.student(), context.tasks))
    if "shared-distilled" in settings.variants:
        rows += _compare(context, "shared-distilled", context.network(context.student(), context.tasks), _distillation(context, teacher))
    if "single" in settings.variants:
        for name, task in context.tasks.items():
            rows += _compare(context, f"single-{name}", context.network(context.student(), {name: task}), only=name)
    for variant in settings.variants:
        if (rule := rule_of_variant(variant)) is not None:
            ranks = settings.ranks.changed(rule=rule)
            rows += _compare(context, variant, _with_experts(context, teacher, ranks), _distillation(context, teacher))
    experts = _with_experts(context, teacher)
    rows += _compare(context, "experts", experts, _distillation(context, teacher))
    return rows, experts


def _with_experts(context: _Context, teacher: MultiTaskNetwork | None, ranks: RankSettings | None = None) -> MultiTaskNetwork:
    body = context.student()
    layers = adapted_layers(body)
    wanted = ranks or context.settings.ranks
    install_experts(
        body,
        experts=list(context.tasks),
        ranks=choose_ranks(wanted, layers, context.tasks, None if teacher is None else teacher.body, folder=context.folder),
        targets=lambda name, _module: name in layers,
        layout=wanted.layout,
        alpha=wanted.alpha,
        scaling=_SCALING if wanted.alpha is None else None,
        base="trainable",
        batchnorm=context.settings.student.batchnorm,
    )
    return context.network(body, context.tasks, experts=True)


def _teacher_body(settings: DecomposeSettings, folder: Path) -> tuple[nn.Module | None, Preprocessing]:
    """The teacher's body without a head, and the input that it, and so its student, expects."""
    plain = Preprocessing(settings.image_size)
    if settings.teacher is None:
        return None, plain
    source = settings.teacher.source
    seed_everything(settings.seed)
    if source in _STUDENTS:
        return build_student(cast("StudentKind", source), image_size=settings.image_size, norm=settings.student.norm), plain
    source = found_beside(folder, source, where="teacher.source")
    if not source.startswith(PREFIX) and "/" not in source and not Path(source).exists():
        raise UnknownNameError(
            "teacher.source", source, [*_STUDENTS, "medlore:vit-mini"], "use one of them, or give a folder, file or hub name"
        )
    backbone = load_backbone(source, classes=1, image_size=settings.image_size, seed=settings.seed)
    backbone.model.set_submodule(backbone.head_name, nn.Identity())
    return backbone.model, Preprocessing(settings.image_size, backbone.mean, backbone.std, backbone.interpolation)


def _teacher(context: _Context, body: nn.Module) -> MultiTaskNetwork | None:
    """The teacher, fitted to the tasks and frozen; None where nothing asks for it."""
    settings, wanted = context.settings, context.settings.teacher
    if wanted is None or not (settings.distils or "teacher" in settings.variants or settings.reads_spectra):
        return None
    network = context.network(body, context.tasks)
    network.body.requires_grad_(wanted.train == "all")
    _finish(context, "teacher", network, context.plan(wanted.steps, wanted.learning_rate), None, context.tasks)
    if context.writes:
        with atomic_folder(context.out / "teacher") as folder:
            write_backbone(folder, network.body, vars(context.preprocessing))
    return network.eval().requires_grad_(requires_grad=False)


def _distillation(context: _Context, teacher: MultiTaskNetwork | None) -> Distillation | None:
    """The teacher beside one student, which trains a projection of its own; None where no term is live."""
    settings = context.settings
    if teacher is None or not settings.distils:
        return None
    projection: nn.Module | None = None
    if settings.loss.feature > 0:
        student, size = context.student(), settings.image_size
        projection = nn.Linear(feature_width(student, size), feature_width(teacher.body, size))
    return Distillation(teacher.to(context.device), projection, settings.loss, context.seen if _fits_in_memory(settings, teacher) else None)


def _fits_in_memory(settings: DecomposeSettings, teacher: MultiTaskNetwork) -> bool:
    """Whether the teacher's answers to all steps may be kept: every student sees the same images in the same step."""
    width = feature_width(teacher.body, settings.image_size) + sum(
        head.out_features for head in teacher.heads.values() if isinstance(head, nn.Linear)
    )
    return 4 * settings.steps * settings.batch_size * width <= _ANSWER_BYTES


def _compare(
    context: _Context, variant: str, network: MultiTaskNetwork, distillation: Distillation | None = None, *, only: str | None = None
) -> list[dict[str, Any]]:
    """Train one network and measure it; with `only`, on one task and for that task's share of the steps."""
    settings, tasks, steps = context.settings, context.tasks, context.settings.steps
    if only is not None:
        weights = {name: len(task.train) ** settings.task_power for name, task in tasks.items()}
        steps = max(round(steps * weights[only] / sum(weights.values())), 1)
        tasks = {only: tasks[only]}
    _finish(context, variant, network, context.plan(steps, settings.learning_rate), distillation, tasks)
    if variant.startswith("experts"):
        as_stored(network, settings.weights)
    return measure(variant, network, tasks, context.preprocessing)


def _finish(
    context: _Context,
    variant: str,
    network: MultiTaskNetwork,
    plan: ClassifierTrainingPlan,
    distillation: Distillation | None,
    tasks: Mapping[str, TaskData],
) -> None:
    """Train a network, or take over a finished one of the same settings and data."""

    def train(checkpoint: Checkpoint) -> dict[str, Any]:
        history = train_network(
            network,
            tasks,
            plan,
            accelerator=context.accelerator,
            preprocessing=context.preprocessing,
            checkpoint=checkpoint,
            distillation=distillation,
            progress=context.narrate(variant) if context.writes else lambda _step, _steps, _text: None,
            name=variant,
        )
        best = -math.inf if history.best_key is None else history.best_key[0]
        return {"losses": history.losses, "scores": history.scores, "best_step": history.best_step, "best_score": best}

    networks = TrainedOnce(context.out / "networks", context.accelerator, weights="best.pt")
    networks.finish(variant, context.identity(variant, tasks), network, train)


def _write_pack(context: _Context, network: MultiTaskNetwork, table: list[dict[str, Any]]) -> Path:
    """The expert pack: shared base, one file per expert, a manifest with ranks, licences and the test metrics."""
    settings, pre = context.settings, context.preprocessing
    entries = {}
    for name, task in context.tasks.items():
        row = next(r for r in table if r["network"] == "experts" and r["task"] == name)
        ranks = {layer: module.ranks[name] for layer, module in network.body.named_modules() if isinstance(module, ExpertLayer)}
        entries[name] = ExpertEntry(name, task.classes, task.kind, ranks, row["report"]["metrics"], task.settings.licence)
    student = settings.student
    return save_classifier_pack(
        context.out / "pack",
        network,
        student={"kind": student.kind, "norm": student.norm, "stem_stride": student.stem_stride},
        experts=entries,
        preprocessing={"image_size": pre.image_size, "mean": pre.mean, "std": pre.std, "interpolation": pre.interpolation},
        layout=settings.ranks.layout,
        weights=settings.weights,
        extra={
            "name": settings.name,
            "batchnorm": student.batchnorm,
            "teacher": None if settings.teacher is None else settings.teacher.model_dump(),
        },
    )


def _write_ranks(context: _Context, network: MultiTaskNetwork) -> Path:
    """Beside the pack a plan file for each expert, which another study can give (`ranks.given`)."""
    wanted = context.settings.ranks
    layers = {name: module for name, module in network.body.named_modules() if isinstance(module, ExpertLayer)}
    ranks = {(name, task): module.ranks[task] for name, module in layers.items() for task in context.tasks}
    shapes = {name: tuple(module.base_layer.weight.shape) for name, module in layers.items()}
    alpha = f"rank*{_SCALING:g}" if wanted.alpha is None else wanted.alpha
    write_expert_plans(context.out / "ranks", ranks, shapes, rule=wanted.rule, alpha=alpha, source=context.settings.student.kind)
    return context.out / "ranks"


def _sizes(task: TaskData) -> dict[str, Any]:
    return {
        "classes": list(task.classes),
        "kind": task.kind,
        "train": len(task.train),
        "validation": len(task.validation),
        "test": len(task.test),
    }
