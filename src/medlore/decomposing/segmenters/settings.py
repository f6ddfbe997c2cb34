"""What a segmentation study says (`kind: segmenter`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from medlore.decomposing.segmenters.rule_settings import checked_patches, checked_synthesis
from medlore.errors import InputError
from medlore.linalg.matricize import Layout
from medlore.models.segmenter.manifest import preprocessing_faults
from medlore.models.segmenter.network import SegmenterConfig
from medlore.models.segmenter.vocabulary import MODALITIES
from medlore.runs.settings import DeviceChoice, Settings

Variant = Literal["teacher", "experts", "shared", "single", "experts-uniform", "experts-given", "experts-stable-rank"]
RankRule = Literal["uniform", "given", "stable-rank"]
BatchMode = Literal["mixed", "region"]
Precision = Literal["fp32", "bf16"]
Positive = pydantic.PositiveInt

DEFAULT_PREPROCESSING: dict[str, Any] = {
    "orientation": "RAS",
    "spacing_mm": [1.0, 1.0, 1.0],
    "roi_size": [96, 96, 96],
    "overlap": 0.5,
    "foreground_above": 0.0,
    "intensity": {"ct": {"clip": [-500.0, 1000.0]}, "other": {"clip_percentiles": [0.5, 99.5]}, "then": "z-score"},
    "gaussian_sigma": 0.125,
    "threshold": 0.5,
}
_OF_INFERENCE = ("roi_size", "overlap", "threshold", "tissues", "parts", "first_pass")  # decide masks, not weights


class DataSettings(Settings):
    """One list of cases.

    Attributes:
        name: for the report.
        cases: jsonl with masks; relative to the study file.
        weight: how often a sample is drawn from it, beside the other lists.
        licence: of the data; goes into the pack.
        held_out: share of the patients for validation and again for test, where the lines name no `split`; 0 trains on all.
        note: what the report says beside its results, such as `no held-out patient`.
    """

    name: str
    cases: Path
    weight: float = pydantic.Field(default=1.0, gt=0)
    licence: str = "not stated"
    held_out: float = pydantic.Field(default=0.15, ge=0, lt=0.5)
    note: str = ""


class SizeSettings(Settings):
    """Sizes of a network; see `medlore.models.segmenter.network.SegmenterConfig`."""

    features: tuple[Positive, ...]
    convs_per_stage: int = pydantic.Field(default=2, ge=1)
    strides: tuple[Positive, ...] | None = None
    query_width: int = 128
    projection_width: int = 256
    mask_width: int = 128
    deep_widths: tuple[Positive, ...] = ()
    image_channels: int = pydantic.Field(default=1, ge=1)
    patch: int = 16
    decoder_layers: int = 2
    heads: int = 4
    feedforward: int = 256
    mask_activation: Literal["gelu", "none"] = "none"

    @pydantic.model_validator(mode="after")
    def _fit_each_other(self) -> SizeSettings:
        try:
            self.config()
        except InputError as error:
            raise ValueError("; ".join(error.faults)) from error
        return self

    def config(self) -> SegmenterConfig:
        """The network's own record.

        Raises:
            InputError: sizes that do not fit each other.
        """
        values = self.model_dump()
        values["strides"] = self.strides or (1, *(2,) * (len(self.features) - 1))
        return SegmenterConfig(**values)


class ScheduleSettings(Settings):
    """How long and how fast one network is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: patches a step and process.
        accumulate: batches whose gradients are summed before a step.
        learning_rate: peak, after the warm-up; a cosine leads to `final_share` of it.
        weight_decay: of matrices and kernels; biases, norms and prompts have none.
        ema: decay of the averaged weights that are kept instead of the last ones; None for none.
    """

    steps: int = pydantic.Field(default=2000, ge=1)
    batch_size: int = pydantic.Field(default=2, ge=1)
    accumulate: int = pydantic.Field(default=1, ge=1)
    learning_rate: float = pydantic.Field(default=1e-3, gt=0)
    final_share: float = pydantic.Field(default=0.0, ge=0, le=1)
    weight_decay: float = pydantic.Field(default=1e-5, ge=0)
    warmup_fraction: float = pydantic.Field(default=0.03, ge=0, lt=1)
    clip: float = pydantic.Field(default=1.0, gt=0)
    ema: float | None = pydantic.Field(default=None, gt=0, lt=1)


class TeacherSettings(ScheduleSettings):
    """The network that is decomposed.

    Attributes:
        source: a pack or a published file (SAT, LoRKD), taken as it is; None trains one here, of these sizes.
        text, prompt_embeddings: where the prompts of a published file come from.
        sizes: of a teacher that is trained here.
        start: a pack of these sizes whose weights and prompts the training begins with, in place of a draw: a further stage.
    """

    source: str | None = None
    text: Path | None = None
    prompt_embeddings: Path | None = None
    sizes: SizeSettings = SizeSettings(features=(16, 32, 64, 128, 256))
    start: str | None = None


class StudentSettings(ScheduleSettings):
    """The light network that experts are installed in.

    Attributes:
        sizes: prompts keep the teacher's width.
        start: `teacher` begins with evenly spaced entries of the teacher's weights, `random` with a draw.
    """

    sizes: SizeSettings = SizeSettings(features=(8, 16, 32, 64, 128))
    start: Literal["teacher", "random"] = "teacher"


class ExpertSettings(Settings):
    """One expert a region in every 3x3x3 convolution of the U-Net.

    Attributes:
        rule: `uniform`: `rank` everywhere; `given`: region -> rank; `stable-rank`: per layer proportional to the stable rank of the
            teacher's weight there, per region to the root of its number of labels. All three at the same number of parameters.
        rank: of the encoder, or the mean.
        decoder: the decoder's rank in units of the encoder's.
        given: region -> rank.
        scaling: factor before the product, whatever the rank.
        layout: `channel` (PEFT's) or `interleaved` (LoRKD's).
    """

    rule: RankRule = "uniform"
    rank: int = pydantic.Field(default=4, ge=1)
    decoder: int = pydantic.Field(default=2, ge=1)
    given: dict[str, Positive] = pydantic.Field(default_factory=dict)
    scaling: float = pydantic.Field(default=2.0, gt=0)
    layout: Layout = "channel"


class LossSettings(Settings):
    """Weights of the terms; a weight of zero skips the term and its cost.

    Attributes:
        bce: of the cross-entropy.
        dice: of the Dice term.
        distillation: of T² KL(teacher ‖ student) on the voxels' logits (students only).
        temperature: T.
    """

    bce: float = pydantic.Field(default=1.0, ge=0)
    dice: float = pydantic.Field(default=1.0, ge=0)
    distillation: float = pydantic.Field(default=0.1, ge=0)
    temperature: float = pydantic.Field(default=1.0, gt=0)


class SegmentationSettings(Settings):
    """A whole study of `medlore decompose` for segmenters.

    Attributes:
        name: of the pack.
        regions: `modality/label` -> region, for labels that the vocabulary does not know or that another expert shall answer.
        patch_size: of the training patches; multiples of the networks' patch.
        max_prompts: asked of one patch, positives first.
        patches: rules of drawing and augmenting a patch; see `medlore.data.volumes.patches.PatchRules`.
        synthesis: rules of images that are made from label maps; see `medlore.data.volumes.synthesis.SynthesisRules`.
        preprocessing: constants that the pack carries; laid over the defaults.
        variants: what is trained and measured: the teacher, the student with experts (always), the student without (`shared`), one
            student a region (`single`), the student with experts of another rank rule (`experts-uniform` and so on).
        batches: `mixed` regions in a batch, or one `region` a batch.
        validate_every: steps between two validations; 0 for the end alone.
        validation_cases: at most so many a list, the first ones.
        checkpoint_minutes: between two checkpoints.
        workers: processes that load data; 0: a thread of this process.
    """

    kind: Literal["segmenter"] = "segmenter"
    name: str
    data: tuple[DataSettings, ...] = pydantic.Field(min_length=1)
    regions: dict[str, str] = pydantic.Field(default_factory=dict)
    cache: Path | None = None
    patch_size: tuple[Positive, Positive, Positive] = (64, 64, 64)
    max_prompts: int = pydantic.Field(default=8, ge=1)
    patches: dict[str, Any] = pydantic.Field(default_factory=dict)
    synthesis: dict[str, Any] = pydantic.Field(default_factory=dict)
    preprocessing: dict[str, Any] = pydantic.Field(default_factory=dict)
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    experts: ExpertSettings = ExpertSettings()
    loss: LossSettings = LossSettings()
    batches: BatchMode = "mixed"
    variants: tuple[Variant, ...] = ("teacher", "shared", "experts")
    validate_every: int = pydantic.Field(default=0, ge=0)
    validation_cases: int = pydantic.Field(default=8, ge=0)
    checkpoint_minutes: float = pydantic.Field(default=5.0, ge=0)
    workers: int = pydantic.Field(default=0, ge=0)
    seed: int = pydantic.Field(default=0, ge=0, lt=2**32)
    device: DeviceChoice = "auto"
    precision: Precision = "fp32"
    weights: Literal["fp32", "fp16"] = "fp16"

    _patches = pydantic.field_validator("patches")(checked_patches)
    _synthesis = pydantic.field_validator("synthesis")(checked_synthesis)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> SegmentationSettings:
        names = [entry.name for entry in self.data]
        if len(set(names)) != len(names):
            raise ValueError(f"two lists share a name in {names}")
        if len(set(self.variants)) != len(self.variants):
            raise ValueError(f"variants name one twice in {list(self.variants)}")
        if faults := preprocessing_faults(self.full_preprocessing, "preprocessing"):
            raise ValueError("; ".join(faults))
        known = (*DEFAULT_PREPROCESSING, "tissues", "parts", "first_pass")
        if strange := sorted(set(self.preprocessing) - set(known)):
            raise ValueError(f"preprocessing has {strange}; known are {', '.join(known)}")
        for who, sizes in (("teacher", self.teacher.sizes), ("student", self.student.sizes)):
            if any(side % sizes.patch for side in self.patch_size):
                raise ValueError(f"patch_size {self.patch_size} must be multiples of {who}.sizes.patch {sizes.patch}")
        if wrong := [key for key in self.regions if key.partition("/")[0] not in MODALITIES or not key.partition("/")[2]]:
            raise ValueError(f"regions has {wrong}; each is modality/label, with a modality of {', '.join(MODALITIES)}")
        if self.teacher.source is None and self.teacher.sizes.query_width != self.student.sizes.query_width:
            raise ValueError("teacher and student share their prompts: give both the same query_width")
        if "experts" not in self.variants:
            raise ValueError("variants must hold 'experts': it is what the study makes")
        return self

    def check_windows(self) -> None:
        """Refuse windows that the networks of this study could not take when they are validated, after their training.

        Raises:
            InputError: a side of `preprocessing.roi_size` that is no multiple of a network's patch.
        """
        roi_size, patches = self.full_preprocessing["roi_size"], {self.teacher.sizes.patch, self.student.sizes.patch}
        if any(side % patch for patch in patches for side in roi_size):
            accepted = f"multiples of the networks' patch, {', '.join(map(str, sorted(patches)))}"
            raise InputError("preprocessing.roi_size", str(list(roi_size)), accepted, "give other sides")

    @property
    def full_preprocessing(self) -> dict[str, Any]:
        """The defaults with this study's values laid over them."""
        return {**DEFAULT_PREPROCESSING, **self.preprocessing}

    def with_rule(self, rule: RankRule) -> SegmentationSettings:
        """The same study with experts of another rank rule."""
        return self.model_copy(update={"experts": self.experts.model_copy(update={"rule": rule})})

    def decides(self, *parts: str) -> dict[str, Any]:
        """The settings that decide a network's weights; a finished one is taken over only when they are the same."""
        common = {"seed", "patch_size", "max_prompts", "patches", "synthesis", "batches", "loss", "precision", *parts}
        told = {name: value for name, value in self.model_dump(mode="json").items() if name in common}
        told["preprocessing"] = {k: v for k, v in self.full_preprocessing.items() if k not in _OF_INFERENCE}
        if "student" not in parts:  # a teacher is not taught
            told["loss"] = {name: told["loss"][name] for name in ("bce", "dice")}
        return told
