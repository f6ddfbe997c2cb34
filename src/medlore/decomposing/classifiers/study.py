"""`medlore decompose`: a teacher becomes one light shared backbone and a low-rank expert per task.

Top to bottom: read the tasks; train or fit the teacher; train the student with experts, and the networks that it has to
be compared with; measure them on the test parts; write the expert pack and the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from medlore.assets import PREFIX
from medlore.data.images.transforms import Preprocessing
from medlore.decomposing.classifiers.export import write_backbone
from medlore.decomposing.classifiers.ranks import adapted_layers, choose_ranks
from medlore.decomposing.classifiers.report import measure, table_rows
from medlore.decomposing.classifiers.settings import DecomposeSettings, RankSettings, Rule
from medlore.decomposing.classifiers.tasks import Task, fingerprint, read_tasks
from medlore.decomposing.classifiers.training import Distillation, Progress, Schedule, make_accelerator, train_network
from medlore.decomposing.stored_weights import as_stored
from medlore.errors import UnknownNameError
from medlore.files import atomic_folder, atomic_path, made_folder, read_json, write_json
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.surgery import install_experts
from medlore.models.backbones.reading import load_backbone
from medlore.models.backbones.students import StudentKind, build_student, feature_width
from medlore.models.classifier_pack import ExpertEntry, save_classifier_pack
from medlore.models.multitask import MixedOutput, MultiTaskNetwork, count_parameters
from medlore.runs.settings import Run, choose_device, read_settings, seed_everything

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
    shop, body = _open(study, out, narrate, flags)
    if not shop.writes:  # the other processes of a distributed run train along and leave the files to the first
        return Decomposition(shop.out / "pack", _run(shop, body)[0])
    made_folder(out)
    with Run("decompose", out, settings=shop.settings, seed=shop.settings.seed, device=shop.device) as run:
        run.add_input(study)
        table, experts = _run(shop, body)
        pack = _write_pack(shop, experts, table)
        run.add_output("pack", pack)
        run.results.update(table=table, tasks={name: _sizes(task) for name, task in shop.tasks.items()})
    return Decomposition(pack, table)


def _run(shop: _Workshop, body: nn.Module | None) -> tuple[list[dict[str, Any]], MultiTaskNetwork]:
    rows, experts = _train_all(shop, None if body is None else _teacher(shop, body))
    return table_rows(rows), experts


def plan(study: str | Path, **flags: Any) -> dict[str, Any]:
    """What a study would train: sizes of the tasks, and parameters of teacher, shared base and each expert.

    Raises:
        InputError: the study or its data cannot be used.
    """
    shop, body = _open(study, "", lambda _name: lambda _step, _steps, _text: None, flags)
    student = shop.network(shop.student(), shop.tasks)
    network = _with_experts(shop, None if body is None else shop.network(body, shop.tasks))
    layers = [m for m in network.body.modules() if isinstance(m, ExpertLayer)]
    cost = {name: sum(m.lora_A[name].numel() + m.lora_B[name].numel() for m in layers if m.ranks[name]) for name in shop.tasks}
    return {
        "device": shop.device,
        "tasks": {name: _sizes(task) for name, task in shop.tasks.items()},
        "teacher_parameters": None if body is None else count_parameters(body),
        "base_parameters": count_parameters(student.body),
        "expert_parameters": cost,
        "adapted_layers": len(layers),
        "ranks": {name: [m.ranks[name] for m in layers] for name in shop.tasks},
        "steps": shop.settings.steps,
        "variants": list(shop.settings.variants),
    }


def _open(study: str | Path, out: str | Path, narrate: Narrator, flags: Mapping[str, Any]) -> tuple[_Workshop, nn.Module | None]:
    settings = read_settings(DecomposeSettings, study, **flags)
    body, preprocessing = _teacher_body(settings)
    tasks = read_tasks(settings, preprocessing, folder=Path(study).resolve().parent)
    device = choose_device(settings.device)
    shop = _Workshop(settings, tasks, preprocessing, Path(out), device, narrate, make_accelerator(device))
    _with_experts(shop, None, RankSettings(layout=settings.ranks.layout))  # what cannot be installed is said before anything is trained
    return shop, body


@dataclass
class _Workshop:
    """The settings and data that every network of a study shares."""

    settings: DecomposeSettings
    tasks: dict[str, Task]
    preprocessing: Preprocessing
    out: Path
    device: str
    narrate: Narrator
    accelerator: Accelerator
    seen: dict[int, MixedOutput] = field(default_factory=dict)  # the teacher's answers, by step

    @property
    def writes(self) -> bool:
        """Whether this process writes the files: the only one, or the first of several."""
        return bool(self.accelerator.is_main_process)

    def network(self, body: nn.Module, tasks: Mapping[str, Task], *, experts: bool = False) -> MultiTaskNetwork:
        classes = {name: len(task.classes) for name, task in tasks.items()}
        return MultiTaskNetwork(body, classes, width=feature_width(body, self.settings.image_size), experts=experts)

    def student(self) -> nn.Module:
        s = self.settings.student
        seed_everything(self.settings.seed)
        return build_student(s.kind, image_size=self.settings.image_size, norm=s.norm, stem_stride=s.stem_stride)

    def schedule(self, steps: int, learning_rate: float) -> Schedule:
        s = self.settings
        every = min(s.evaluate_every, steps)
        return Schedule(
            steps, s.batch_size, learning_rate, s.weight_decay, s.warmup_fraction, s.clip, every, s.task_power, s.seed, s.precision
        )


def _train_all(shop: _Workshop, teacher: MultiTaskNetwork | None) -> tuple[list[dict[str, Any]], MultiTaskNetwork]:
    """Rows of every network that was asked for, and the student with experts."""
    settings = shop.settings
    rows: list[dict[str, Any]] = []
    if teacher is not None and "teacher" in settings.variants:
        rows += measure("teacher", teacher, shop.tasks, shop.preprocessing)
    if "shared" in settings.variants:
        rows += _compare(shop, "shared", shop.network(shop.student(), shop.tasks))
    if "shared-distilled" in settings.variants:
        rows += _compare(shop, "shared-distilled", shop.network(shop.student(), shop.tasks), _distillation(shop, teacher))
    if "single" in settings.variants:
        for name, task in shop.tasks.items():
            rows += _compare(shop, f"single-{name}", shop.network(shop.student(), {name: task}), only=name)
    for variant in settings.variants:
        if variant.startswith("experts-"):
            rule = cast("Rule", variant.removeprefix("experts-"))
            ranks = settings.ranks.model_copy(update={"rule": rule})
            rows += _compare(shop, variant, _with_experts(shop, teacher, ranks), _distillation(shop, teacher))
    experts = _with_experts(shop, teacher)
    rows += _compare(shop, "experts", experts, _distillation(shop, teacher))
    return rows, experts


def _with_experts(shop: _Workshop, teacher: MultiTaskNetwork | None, ranks: RankSettings | None = None) -> MultiTaskNetwork:
    body = shop.student()
    layers = adapted_layers(body)
    wanted = ranks or shop.settings.ranks
    install_experts(
        body,
        experts=list(shop.tasks),
        ranks=choose_ranks(wanted, layers, shop.tasks, None if teacher is None else teacher.body),
        targets=lambda name, _module: name in layers,
        layout=wanted.layout,
        alpha=wanted.alpha,
        scaling=_SCALING if wanted.alpha is None else None,
        base="trainable",
        batchnorm=shop.settings.student.batchnorm,
    )
    return shop.network(body, shop.tasks, experts=True)


def _teacher_body(settings: DecomposeSettings) -> tuple[nn.Module | None, Preprocessing]:
    """The teacher's body without a head, and the input that it, and so its student, expects."""
    plain = Preprocessing(settings.image_size)
    if settings.teacher is None:
        return None, plain
    source = settings.teacher.source
    seed_everything(settings.seed)
    if source in _STUDENTS:
        return build_student(cast("StudentKind", source), image_size=settings.image_size, norm=settings.student.norm), plain
    if not source.startswith(PREFIX) and "/" not in source and not Path(source).exists():
        raise UnknownNameError(
            "teacher.source", source, [*_STUDENTS, "medlore:vit-mini"], "take one of them, or give a folder, file or hub name"
        )
    backbone = load_backbone(source, classes=1, image_size=settings.image_size, seed=settings.seed)
    backbone.model.set_submodule(backbone.head_name, nn.Identity())
    return backbone.model, Preprocessing(settings.image_size, backbone.mean, backbone.std, backbone.interpolation)


def _teacher(shop: _Workshop, body: nn.Module) -> MultiTaskNetwork | None:
    """The teacher, fitted to the tasks and frozen; None where nothing asks for it."""
    settings, wanted = shop.settings, shop.settings.teacher
    if wanted is None or not (settings.distils or "teacher" in settings.variants or settings.reads_spectra):
        return None
    network = shop.network(body, shop.tasks)
    network.body.requires_grad_(wanted.train == "all")
    _finish(shop, "teacher", network, shop.schedule(wanted.steps, wanted.learning_rate), None, shop.tasks)
    if shop.writes:
        with atomic_folder(shop.out / "teacher") as folder:
            write_backbone(folder, network.body, vars(shop.preprocessing))
    return network.eval().requires_grad_(requires_grad=False)


def _distillation(shop: _Workshop, teacher: MultiTaskNetwork | None) -> Distillation | None:
    """The teacher beside one student, which trains a projection of its own; None where no term is live."""
    settings = shop.settings
    if teacher is None or not settings.distils:
        return None
    projection: nn.Module | None = None
    if settings.loss.feature > 0:
        student, size = shop.student(), settings.image_size
        projection = nn.Linear(feature_width(student, size), feature_width(teacher.body, size))
    return Distillation(teacher.to(shop.device), projection, settings.loss, shop.seen if _fits_in_memory(settings, teacher) else None)


def _fits_in_memory(settings: DecomposeSettings, teacher: MultiTaskNetwork) -> bool:
    """Whether the teacher's answers to all steps may be kept: every student sees the same images in the same step."""
    width = feature_width(teacher.body, settings.image_size) + sum(
        head.out_features for head in teacher.heads.values() if isinstance(head, nn.Linear)
    )
    return 4 * settings.steps * settings.batch_size * width <= _ANSWER_BYTES


def _compare(
    shop: _Workshop, variant: str, network: MultiTaskNetwork, distillation: Distillation | None = None, *, only: str | None = None
) -> list[dict[str, Any]]:
    """Train one network and measure it; with `only`, on one task and for that task's share of the steps."""
    settings, tasks, steps = shop.settings, shop.tasks, shop.settings.steps
    if only is not None:
        weights = {name: len(task.train) ** settings.task_power for name, task in tasks.items()}
        steps = max(round(steps * weights[only] / sum(weights.values())), 1)
        tasks = {only: tasks[only]}
    _finish(shop, variant, network, shop.schedule(steps, settings.learning_rate), distillation, tasks)
    if variant.startswith("experts"):
        as_stored(network, settings.weights)
    return measure(variant, network, tasks, shop.preprocessing)


def _finish(
    shop: _Workshop,
    variant: str,
    network: MultiTaskNetwork,
    schedule: Schedule,
    distillation: Distillation | None,
    tasks: Mapping[str, Task],
) -> None:
    """Train a network, or take over a finished one of the same settings."""
    folder = shop.out / "networks" / variant
    told = [shop.settings.parameters_of(variant), {name: fingerprint(task) for name, task in tasks.items()}]
    identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    weights, done = folder / "best.pt", folder / "history.json"
    if done.is_file() and read_json(done).get("identity") == identity:
        network.load_state_dict(torch.load(weights, map_location=shop.device, weights_only=True))
        network.to(shop.device)
        return
    checkpoint = folder / f"checkpoint-{identity[:12]}.pt"
    history = train_network(
        network,
        tasks,
        schedule,
        accelerator=shop.accelerator,
        preprocessing=shop.preprocessing,
        checkpoint=checkpoint,
        distillation=distillation,
        progress=shop.narrate(variant) if shop.writes else lambda _step, _steps, _text: None,
    )
    if shop.writes:
        with atomic_path(weights) as temporary:
            torch.save(network.state_dict(), temporary)
        write_json(done, {"identity": identity, **vars(history)})
        checkpoint.unlink(missing_ok=True)
    shop.accelerator.wait_for_everyone()


def _write_pack(shop: _Workshop, network: MultiTaskNetwork, table: list[dict[str, Any]]) -> Path:
    """The expert pack: shared base, one file per expert, a manifest with ranks, licences and the test metrics."""
    settings, pre = shop.settings, shop.preprocessing
    entries = {}
    for name, task in shop.tasks.items():
        row = next(r for r in table if r["network"] == "experts" and r["task"] == name)
        ranks = {layer: module.ranks[name] for layer, module in network.body.named_modules() if isinstance(module, ExpertLayer)}
        entries[name] = ExpertEntry(name, task.classes, task.kind, ranks, row["report"]["metrics"], task.settings.licence)
    student = settings.student
    return save_classifier_pack(
        shop.out / "pack",
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


def _sizes(task: Task) -> dict[str, Any]:
    return {
        "classes": list(task.classes),
        "kind": task.kind,
        "train": len(task.train),
        "validation": len(task.validation),
        "test": len(task.test),
    }
