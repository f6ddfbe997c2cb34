"""What a segmentation study says (`kind: segmenter`)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from medlore.decomposing.rank_rules import ExpertRule, one_of_variants
from medlore.decomposing.segmenters.rule_settings import checked_patches, checked_synthesis
from medlore.errors import InputError
from medlore.linalg.matricize import Layout
from medlore.models.segmenter.encoders import UNET
from medlore.models.segmenter.manifest import preprocessing_faults
from medlore.models.segmenter.network import SegmenterConfig
from medlore.models.segmenter.vocabulary import MODALITIES
from medlore.ranks.experts import GivenRank
from medlore.runs.hardware import DeviceChoice
from medlore.runs.settings import Settings, setting

Variant = Annotated[str, pydantic.AfterValidator(one_of_variants("teacher", "experts", "shared", "single"))]
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
KNOWN_PREPROCESSING = (*DEFAULT_PREPROCESSING, "tissues", "parts", "first_pass")
_OF_INFERENCE = ("roi_size", "overlap", "threshold", "tissues", "parts", "first_pass")  # decide masks, not weights


class DataSettings(Settings):
    """One list of cases."""

    name: str = setting(..., "Name in the report.")
    cases: Path = setting(..., "Case list (jsonl) with masks; relative to the study file.")
    weight: float = setting(1.0, "Relative frequency of samples from this list.", gt=0)
    licence: str = setting("not stated", "Licence of the data, recorded in the pack.")
    held_out: float = setting(
        0.15,
        "Share of the patients held out for validation, and again for test, if the lines have no `split`; 0 trains on all.",
        ge=0,
        lt=0.5,
    )
    note: str = setting("", "Remark in the report beside its results, such as `no held-out patient`.")


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
    encoder: str = UNET

    @pydantic.model_validator(mode="after")
    def _fit_each_other(self) -> SizeSettings:
        try:
            self.config()
        except InputError as error:
            raise ValueError("; ".join(error.faults)) from error
        return self

    @classmethod
    def of(cls, config: SegmenterConfig) -> SizeSettings:
        """The sizes of a network that is there."""
        return cls(**asdict(config))

    def config(self) -> SegmenterConfig:
        """The network's own record.

        Raises:
            InputError: sizes that do not fit each other.
        """
        values = self.model_dump()
        values["strides"] = self.strides or (1, *(2,) * (len(self.features) - 1))
        return SegmenterConfig(**values)


class ScheduleSettings(Settings):
    """How long and how fast one network is trained."""

    steps: int = setting(2000, "Optimiser steps.", ge=1)
    batch_size: int = setting(2, "Patches per step and process.", ge=1)
    accumulate: int = setting(1, "Batches whose gradients are summed before a step.", ge=1)
    learning_rate: float = setting(1e-3, "Peak learning rate after the warm-up; a cosine lowers it to `final_share` of the peak.", gt=0)
    final_share: float = setting(0.0, "Share of the rate at which the cosine ends.", ge=0, le=1)
    weight_decay: float = setting(1e-5, "Weight decay of matrices and kernels; biases, norms and prompts have none.", ge=0)
    warmup_fraction: float = setting(0.03, "Share of the steps used for a linear warm-up.", ge=0, lt=1)
    clip: float = setting(1.0, "Largest norm of the gradient.", gt=0)
    ema: float | None = setting(
        None, "Decay of the moving average of the weights, which is kept instead of the last weights; default none.", gt=0, lt=1
    )


class SegmenterTeacherSettings(ScheduleSettings):
    """The network that is decomposed. Paths start from the folder of the study file."""

    source: str | None = setting(
        None, "A pack or a published file (SAT, LoRKD), used as it is; if absent, a teacher of the given sizes is trained."
    )
    text: Path | None = setting(None, "Text encoder that embeds the prompts of a published file.")
    prompt_embeddings: Path | None = setting(None, "Table of prompts of a published file.")
    sizes: SizeSettings = setting(SizeSettings(features=(16, 32, 64, 128, 256)), "Sizes of a teacher that is trained here.")
    start: str | None = setting(
        None, "A pack of these sizes whose weights and prompts the training starts from, instead of random ones (a further stage)."
    )


class SegmenterStudentSettings(ScheduleSettings):
    """The light network that experts are installed in."""

    sizes: SizeSettings = setting(SizeSettings(features=(8, 16, 32, 64, 128)), "Sizes of the student; prompts keep the teacher's width.")
    start: Literal["teacher", "random"] = setting(
        "teacher", "`teacher` starts from evenly spaced entries of the teacher's weights, `random` from random weights."
    )


class ExpertSettings(Settings):
    """One expert per region in every 3x3x3 convolution of the U-Net."""

    rule: ExpertRule = setting(
        "uniform",
        "`uniform`: `rank` everywhere; `given`: region -> rank; `stable-rank`: per layer proportional to the stable rank of the "
        "teacher's weight there, per region to the root of its number of labels. All three at the same number of parameters.",
    )
    rank: int = setting(4, "Rank of the encoder, or the mean rank.", ge=1)
    decoder: int = setting(2, "Rank of the decoder as a multiple of the encoder's.", ge=1)
    given: dict[str, GivenRank] = setting({}, "region -> rank, or the plan file of an expert (OUT/ranks/REGION.json of another study).")
    scaling: float = setting(2.0, "Scaling of the product of the factors, whatever the rank.", gt=0)
    layout: Layout = setting("channel", "`channel` (PEFT's) or `interleaved` (LoRKD's).")


class SegmenterLossSettings(Settings):
    """Weights of the terms; a weight of zero skips the term and its cost. A teacher is not taught."""

    bce: float = setting(1.0, "Weight of the cross-entropy.", ge=0)
    dice: float = setting(1.0, "Weight of the Dice term.", ge=0)
    distillation: float = setting(
        0.1, "Weight of T² KL(teacher ‖ student) on the voxels' logits (students only).", ge=0, decides=("student",)
    )
    temperature: float = setting(1.0, "Temperature T of the distillation.", gt=0, decides=("student",))


class SegmentationSettings(Settings):
    """A whole study of `medlore decompose` for segmenters."""

    kind: Literal["segmenter"] = setting("segmenter", "What is decomposed.", decides=False)
    name: str = setting(..., "Name of the pack.", decides=False)
    data: tuple[DataSettings, ...] = setting(
        ..., "Lists of cases; a run is identified by their content, not by their path.", min_length=1, decides=False
    )
    regions: dict[str, str] = setting(
        {}, "`modality/label` -> region, for labels that the vocabulary does not know or that belong to another expert.", decides=False
    )
    cache: Path | None = setting(None, "Folder of the prepared cases; default OUT/cache.", decides=False)
    patch_size: tuple[Positive, Positive, Positive] = setting(
        (64, 64, 64), "Size of the training patches; multiples of the networks' patch."
    )
    max_prompts: int = setting(8, "Largest number of prompts per patch, positives first.", ge=1)
    patches: dict[str, Any] = setting({}, "How patches are drawn and augmented; see PatchRules.")
    synthesis: dict[str, Any] = setting({}, "How images are synthesised from label maps; see SynthesisRules.")
    preprocessing: dict[str, Any] = setting({}, "Preprocessing constants recorded in the pack; they override the defaults.", decides=False)
    teacher: SegmenterTeacherSettings = setting(SegmenterTeacherSettings(), "The network that is decomposed.", decides=("teacher",))
    student: SegmenterStudentSettings = setting(SegmenterStudentSettings(), "The light network.", decides=("student",))
    experts: ExpertSettings = setting(ExpertSettings(), "The experts, one per region.", decides=("experts",))
    loss: SegmenterLossSettings = setting(SegmenterLossSettings(), "Weights of the terms of the loss.")
    batches: BatchMode = setting("mixed", "`mixed`: several regions in a batch; `region`: one region per batch.")
    variants: tuple[Variant, ...] = setting(
        ("teacher", "shared", "experts"),
        "What is trained and measured: the teacher, the student with experts (always), the student without (`shared`), one student per "
        "region (`single`), the student with experts of another rank rule (`experts-uniform` and so on).",
        decides=False,
    )
    validate_every: int = setting(0, "Steps between two validations; 0 validates only at the end.", ge=0, decides=False)
    validation_cases: int = setting(8, "Largest number of validation cases per list; the first ones are used.", ge=0, decides=False)
    checkpoint_minutes: float = setting(5.0, "Minutes between two checkpoints.", ge=0, decides=False)
    workers: int = setting(0, "Processes that load data; 0 uses a thread of this process.", ge=0, decides=False)
    seed: int = setting(0, "Seed of all random draws.", ge=0, lt=2**32)
    device: DeviceChoice = setting("auto", "Device to run on.", decides=False)
    precision: Precision = setting("fp32", "Numeric precision of the training.")
    weights: Literal["fp32", "fp16"] = setting("fp16", "Number type in which the pack is stored.", decides=False)

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
        if strange := sorted(set(self.preprocessing) - set(KNOWN_PREPROCESSING)):
            raise ValueError(f"preprocessing has {strange}; known are {', '.join(KNOWN_PREPROCESSING)}")
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

    def with_rule(self, rule: str) -> SegmentationSettings:
        """The same study with experts of another rank rule."""
        return self.changed(experts=self.experts.changed(rule=rule))

    def decides(self, *parts: str) -> dict[str, Any]:
        """The settings that decide a network's weights; a finished one is taken over only when they are the same."""
        preprocessing = {k: v for k, v in self.full_preprocessing.items() if k not in _OF_INFERENCE}
        return {**self.decisive(*parts), "preprocessing": preprocessing}
