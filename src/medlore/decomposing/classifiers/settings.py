"""What a decomposition study says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from medlore.data.images.missing_labels import HELP, MissingLabels
from medlore.data.images.words import Flip
from medlore.decomposing.rank_rules import ExpertRule, one_of_variants
from medlore.linalg.matricize import Layout
from medlore.models.backbones.shufflenet import Norm
from medlore.models.backbones.students import StudentKind
from medlore.ranks.experts import GivenRank
from medlore.runs.hardware import DeviceChoice
from medlore.runs.settings import Settings, setting

Variant = Annotated[str, pydantic.AfterValidator(one_of_variants("teacher", "experts", "shared", "shared-distilled", "single"))]


_STUDENTS = ("students",)  # settings that decide the students' weights and not the teacher's


class TaskSettings(Settings):
    """One task: a data set with its own head and its own expert."""

    name: str = setting(..., "Name of the task and of its expert.")
    data: Path = setting(..., "Folder, list, table, npz or zip; relative to the study file.")
    format: str = setting("auto", "As for `medlore finetune`; `auto` detects it.")
    images: Path | None = setting(None, "Folder of the images, if they are not beside the list.")
    train: str | None = setting(None, "Name of the training part, if the data has parts; otherwise parts are drawn by group and seed.")
    validation: str | None = setting(None, "Name of the validation part.")
    test: str | None = setting(None, "Name of the test part.")
    held_out: float = setting(0.15, "Share of the groups held out for validation, and again for test, if no parts are named.", gt=0, lt=0.5)
    classes: tuple[str, ...] | None = setting(None, "Keep only these classes of a single-label set, in this order; default all.")
    missing_labels: MissingLabels = setting("fault", HELP)
    flip: Flip = setting("none", "Mirror images that are anatomically possible.")
    limit: int | None = setting(None, "Largest number of training images; default all.", ge=1)
    validation_limit: int | None = setting(
        None, "Largest number of validation images, drawn by seed; the test part is never reduced.", ge=1
    )
    licence: str = setting("not stated", "Licence of the data, recorded in the pack.")

    @pydantic.field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]*", name):
            raise ValueError("letters, digits, blanks, - and _, beginning with a letter or digit, because it names the expert's file")
        return name


class ClassifierTeacherSettings(Settings):
    """The foundation model."""

    source: str = setting(
        "resnet-18", "A student architecture (trained here from scratch), or anything that `medlore finetune --model` takes.", path=True
    )
    train: Literal["all", "heads"] = setting("all", "`all` trains body and heads on the tasks, `heads` keeps the body frozen.")
    steps: int = setting(2000, "Optimiser steps.", ge=1)
    learning_rate: float = setting(1e-3, "Peak learning rate.", gt=0)


class ClassifierStudentSettings(Settings):
    """The light network that experts are installed in; see `medlore.models.backbones.students.build_student`."""

    kind: StudentKind = setting("shufflenet", "Architecture.")
    norm: Norm = setting("group", "`group` keeps samples independent in training, `batch` is the published form.")
    stem_stride: int = setting(2, "First stride of `shufflenet`: 1 for images of about 64 pixels.", ge=1, le=2)
    batchnorm: Literal["refuse", "freeze", "per-expert"] = setting("refuse", "How batch statistics are treated beside experts.")


class RankSettings(Settings):
    """Ranks of the experts."""

    rule: ExpertRule = setting(
        "uniform",
        "`uniform`; `given`; `task-size` (proportional to the square root of the task's training images, the mean being `rank`); "
        "`stable-rank` (per layer, proportional to the stable rank of the teacher's weight at the same relative depth, the mean over "
        "layers being `rank`).",
    )
    rank: int = setting(8, "The uniform rank, or the mean rank.", ge=1)
    given: dict[str, GivenRank] = setting({}, "task -> rank, or the plan file of an expert (OUT/ranks/TASK.json of another study).")
    alpha: float | None = setting(None, "Scaling is alpha / rank; default 2 x rank, whatever the rank (LoRKD's unequal form).")
    layout: Layout = setting("channel", "`channel` (PEFT's) or `interleaved` (LoRKD's).")


class ClassifierLossSettings(Settings):
    """Weights of the terms; a weight of zero skips the term and its cost."""

    beta: float = setting(0.5, "Weight of T² KL(teacher ‖ student) on the logits.", ge=0)
    temperature: float = setting(4.0, "Temperature T of the distillation.", gt=0)
    feature: float = setting(
        0.5, "Weight of 1 - cosine between projected student features and teacher features; the projection is trained.", ge=0
    )


class DecomposeSettings(Settings):
    """A whole study of `medlore decompose`. What decides the teacher's weights, decides those of the students too."""

    kind: Literal["classifier"] = setting("classifier", "What is decomposed; a study of segmenters has its own settings.", decides=False)
    name: str = setting(..., "Name of the pack.", decides=False)
    image_size: int = setting(64, "Side of the input in pixels.", ge=16, le=2048)
    tasks: tuple[TaskSettings, ...] = setting(..., "The tasks; at least one.", min_length=1)
    teacher: ClassifierTeacherSettings | None = setting(
        ClassifierTeacherSettings(), "The teacher; none trains the student without distillation."
    )
    student: ClassifierStudentSettings = setting(ClassifierStudentSettings(), "The light network.")
    ranks: RankSettings = setting(RankSettings(), "Ranks of the experts.", decides=_STUDENTS)
    loss: ClassifierLossSettings = setting(ClassifierLossSettings(), "Weights of the terms of the loss.", decides=_STUDENTS)
    variants: tuple[Variant, ...] = setting(
        ("teacher", "experts", "shared", "shared-distilled", "single"),
        "Networks to train and report beside the student with experts; `experts-RULE` uses another rank rule than the pack.",
        decides=False,
    )
    steps: int = setting(
        2000,
        "Optimiser steps of every student; a single-task student takes its task's share of them, so that each network sees a task's "
        "images equally often.",
        ge=1,
        decides=_STUDENTS,
    )
    batch_size: int = setting(64, "Images per step.", ge=1)
    task_power: float = setting(0.5, "A task's share of a batch is proportional to size ** task_power.", ge=0, le=1)
    learning_rate: float = setting(2e-3, "Peak learning rate of the students.", gt=0, decides=_STUDENTS)
    weight_decay: float = setting(0.02, "Weight decay of matrices; vectors have none.", ge=0)
    warmup_fraction: float = setting(0.05, "Share of the steps used for a linear warm-up.", ge=0, lt=1)
    clip: float = setting(1.0, "Largest norm of the gradient.", gt=0)
    crop: float = setting(0.5, "Smallest share of the area that a training image keeps.", gt=0, le=1)
    evaluate_every: int = setting(200, "Steps between two validations.", ge=1)
    seed: int = setting(0, "Seed of all random draws.", ge=0, lt=2**32)
    device: DeviceChoice = setting("auto", "Device to run on.", decides=False)
    precision: Literal["fp32", "bf16"] = setting("fp32", "Numeric precision of the training.")
    weights: Literal["fp32", "fp16"] = setting("fp16", "Number type in which the pack is stored.", decides=False)

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
        return {"variant": variant, **self.decisive(*(() if variant == "teacher" else _STUDENTS))}
