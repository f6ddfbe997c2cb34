"""What a decomposition study says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from medlore.data.images.transforms import Flip
from medlore.linalg.matricize import Layout
from medlore.models.backbones.shufflenet import Norm
from medlore.models.backbones.students import StudentKind
from medlore.runs.settings import DeviceChoice, Settings

Rule = Literal["uniform", "given", "task-size", "stable-rank"]
Variant = Literal[
    "teacher", "experts", "shared", "shared-distilled", "single", "experts-uniform", "experts-task-size", "experts-stable-rank"
]


class TaskSettings(Settings):
    """One task: a data set with its own head and its own expert.

    Attributes:
        name: name of the task and of its expert.
        data: folder, list, table, npz or zip; relative to the study file.
        format: as for `medlore finetune`; `auto` looks at the data.
        images: folder of the images, where a list lies elsewhere.
        train, validation, test: names of the parts, where the data has them; None takes them from the whole by group, seeded.
        held_out: share of the groups for validation and again for test, where no parts are named.
        classes: keep only these classes of a single-label set, in this order (a group of classes as a task); None keeps all.
        flip: which mirror images are possible patients.
        limit: at most so many training images; None takes all.
        validation_limit: at most so many validation images, drawn with the seed; the test part is never cut.
        licence: of the data; goes into the pack.
    """

    name: str
    data: Path
    format: str = "auto"
    images: Path | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    held_out: float = pydantic.Field(default=0.15, gt=0, lt=0.5)
    classes: tuple[str, ...] | None = None
    flip: Flip = "none"
    limit: int | None = pydantic.Field(default=None, ge=1)
    validation_limit: int | None = pydantic.Field(default=None, ge=1)
    licence: str = "not stated"

    @pydantic.field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]*", name):
            raise ValueError("letters, digits, blanks, - and _, beginning with a letter or digit, because it names the expert's file")
        return name


class TeacherSettings(Settings):
    """The foundation model.

    Attributes:
        source: a student name (trained here from nothing), or anything that `medlore finetune --model` takes.
        train: `all` fits body and heads to the tasks, `heads` keeps the body frozen.
        steps: optimiser steps.
        learning_rate: peak of the schedule.
    """

    source: str = "resnet-18"
    train: Literal["all", "heads"] = "all"
    steps: int = pydantic.Field(default=2000, ge=1)
    learning_rate: float = pydantic.Field(default=1e-3, gt=0)


class StudentSettings(Settings):
    """The light network that experts are installed in; see `medlore.models.backbones.students.build_student`."""

    kind: StudentKind = "shufflenet"
    norm: Norm = "group"
    stem_stride: int = pydantic.Field(default=2, ge=1, le=2)
    batchnorm: Literal["refuse", "freeze", "per-expert"] = "refuse"


class RankSettings(Settings):
    """How much rank each expert gets.

    Attributes:
        rule: `uniform`; `given`; `task-size` (proportional to the square root of the task's training images, the mean being
            `rank`); `stable-rank` (per layer, proportional to the stable rank of the teacher's weight at the same relative
            depth, the mean over layers being `rank`).
        rank: the uniform rank, or the mean.
        given: task -> rank, from 1.
        alpha: scaling is alpha / rank; None takes alpha = 2 x rank, that is scaling 2 whatever the rank (LoRKD's unequal form).
        layout: `channel` (PEFT's) or `interleaved` (LoRKD's).
    """

    rule: Rule = "uniform"
    rank: int = pydantic.Field(default=8, ge=1)
    given: dict[str, Annotated[int, pydantic.Field(ge=1, strict=True)]] = pydantic.Field(default_factory=dict)
    alpha: float | None = None
    layout: Layout = "channel"


class LossSettings(Settings):
    """Weights of the terms; a weight of zero skips the term and its cost.

    Attributes:
        beta: of T² KL(teacher ‖ student) on the logits.
        temperature: T.
        feature: of 1 - cosine between projected student features and teacher features; the projection is trained.
    """

    beta: float = pydantic.Field(default=0.5, ge=0)
    temperature: float = pydantic.Field(default=4.0, gt=0)
    feature: float = pydantic.Field(default=0.5, ge=0)


class DecomposeSettings(Settings):
    """A whole study of `medlore decompose`.

    Attributes:
        kind: what is decomposed; a study of segmenters has settings of its own.
        name: of the pack.
        tasks: at least one.
        teacher: None trains the student without distillation.
        variants: which networks to train and report beside the student with experts; each is a row of the table.
            `experts-RULE` is the student with experts under another rule of ranks than the pack's.
        steps: optimiser steps of every student; a single-task student takes its task's share of them, so that each
            network sees a task's images equally often.
        task_power: a task's share of a batch is proportional to size ** task_power.
    """

    kind: Literal["classifier"] = "classifier"
    name: str
    image_size: int = pydantic.Field(default=64, ge=16, le=2048)
    tasks: tuple[TaskSettings, ...] = pydantic.Field(min_length=1)
    teacher: TeacherSettings | None = TeacherSettings()
    student: StudentSettings = StudentSettings()
    ranks: RankSettings = RankSettings()
    loss: LossSettings = LossSettings()
    variants: tuple[Variant, ...] = ("teacher", "experts", "shared", "shared-distilled", "single")
    steps: int = pydantic.Field(default=2000, ge=1)
    batch_size: int = pydantic.Field(default=64, ge=1)
    task_power: float = pydantic.Field(default=0.5, ge=0, le=1)
    learning_rate: float = pydantic.Field(default=2e-3, gt=0)
    weight_decay: float = pydantic.Field(default=0.02, ge=0)
    warmup_fraction: float = pydantic.Field(default=0.05, ge=0, lt=1)
    clip: float = pydantic.Field(default=1.0, gt=0)
    crop: float = pydantic.Field(default=0.5, gt=0, le=1)
    evaluate_every: int = pydantic.Field(default=200, ge=1)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    device: DeviceChoice = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["fp32", "fp16"] = "fp16"

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> DecomposeSettings:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"two tasks share a name in {names}")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants name one twice in {list(self.variants)}")
        if self.ranks.rule == "given" and set(self.ranks.given) != set(names):
            raise ValueError(f"ranks.given has {sorted(self.ranks.given)}, the tasks are {sorted(names)}")
        if self.teacher is None and {"teacher", "shared-distilled"} & set(self.variants):
            raise ValueError("variants 'teacher' and 'shared-distilled' need a teacher")
        if f"experts-{self.ranks.rule}" in self.variants:
            raise ValueError(f"variant 'experts-{self.ranks.rule}' has the rule of the pack: leave it out, 'experts' is always trained")
        if (self.ranks.rule == "stable-rank" or "experts-stable-rank" in self.variants) and self.teacher is None:
            raise ValueError("the rule stable-rank reads the teacher's weights: name a teacher")
        return self

    @property
    def distils(self) -> bool:
        """Whether any term of the loss needs the teacher."""
        return self.teacher is not None and (self.loss.beta > 0 or self.loss.feature > 0)

    @property
    def reads_spectra(self) -> bool:
        """Whether any ranks come from the teacher's weights."""
        return self.ranks.rule == "stable-rank" or "experts-stable-rank" in self.variants

    def parameters_of(self, variant: str) -> dict[str, Any]:
        """The settings that decide a variant's weights; a finished one is taken over only when they are the same."""
        skipped = {"kind", "variants", "device", "weights", "name"}
        if variant == "teacher":  # what is only the students'
            skipped |= {"ranks", "loss", "steps", "learning_rate"}
        return {"variant": variant, **{k: v for k, v in self.model_dump(mode="json").items() if k not in skipped}}
