"""What one tuning run is asked to do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal, Self

import pydantic

from medlore.data.images.reading import Format
from medlore.data.images.splits import SplitRules
from medlore.data.images.transforms import Flip
from medlore.errors import InputError
from medlore.layers.tuning.methods import METHODS, ComponentMasking
from medlore.layers.tuning.options import DEFAULT_PATH, TuningOptions, supports_of
from medlore.models.backbones.statistics import Triple
from medlore.runs.settings import DeviceChoice, Settings
from medlore.training.accelerator import Precision
from medlore.tuning.training import Schedule

MethodName = Literal[
    "sr-lora", "lora", "rslora", "dora", "adalora", "eva", "pissa", "dylora", "melora", "moslora", "capaboost", "glora",
    "adapter", "adaptformer", "repadapter", "vpt-shallow", "vpt-deep", "ssf", "layernorm", "linear-probe", "bitfit", "partial", "full",
]  # fmt: skip


class FinetuneSettings(Settings):
    """Everything that decides the result of one tuning run; `docs/tuning.md` explains each field.

    Images: `data` to `test_fraction`. Model: `model` to `heads`. Method and ranks: `method` to `mask_density`. Training: `epochs`
    to `light`. The rest: where and how it runs.
    """

    data: Path | None = None
    format: Format = "auto"
    images: Path | None = None
    test_data: Path | None = None
    split: str | None = None
    task: Literal["single", "multi"] | None = None
    classes: tuple[str, ...] | None = None
    group_pattern: str | None = None
    shots: int | None = pydantic.Field(default=None, ge=1)
    draw: int = pydantic.Field(default=1, ge=1)
    data_seed: int = pydantic.Field(default=0, ge=0)
    per: Literal["image", "group"] = "image"
    official_draw: bool = False
    validation_shots: int | Literal["all"] | None = None
    validation_fraction: float = pydantic.Field(default=0.2, ge=0, lt=1)
    test_fraction: float = pydantic.Field(default=0.2, ge=0, lt=1)

    model: str = "medlore:vit-mini"
    image_size: int | None = pydantic.Field(default=None, ge=1)
    mean: Triple | None = None
    std: Triple | None = None
    heads: int | None = pydantic.Field(default=None, ge=1)

    method: MethodName = "sr-lora"
    plan: Path | None = None
    ranks: str | None = None
    targets: str = "attention"
    granularity: Literal["projection", "fused"] = "projection"
    rank: int | Literal["equal"] = 8
    scale: float = pydantic.Field(default=1.0, gt=0)
    budget: str | None = None
    alpha: str | None = None
    partial_update: Literal["off", "nested", "single"] = "off"
    last_blocks: int = pydantic.Field(default=2, ge=1)
    component_masks: ComponentMasking = "off"
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    bottleneck: int | None = pydantic.Field(default=None, ge=1)
    adapter_scale: float | None = pydantic.Field(default=None, gt=0)
    adapter_dropout: float | None = pydantic.Field(default=None, ge=0, lt=1)
    prompt_length: int = pydantic.Field(default=10, ge=1)
    glora_path: str = DEFAULT_PATH
    mini_loras: int = pydantic.Field(default=4, ge=1)
    tied_layers: int = pydantic.Field(default=2, ge=1)
    mask_density: float = pydantic.Field(default=0.5, gt=0, le=1)

    epochs: int = pydantic.Field(default=20, ge=1)
    batch_size: int = pydantic.Field(default=4, ge=1)
    learning_rate: float | None = pydantic.Field(default=None, gt=0)
    min_learning_rate: float = pydantic.Field(default=0.0, ge=0)
    warmup_fraction: float = pydantic.Field(default=0.1, ge=0, le=1)
    weight_decay: float = pydantic.Field(default=0.05, ge=0)
    clip: float | None = pydantic.Field(default=1.0, gt=0)
    patience: int | None = pydantic.Field(default=None, ge=1)
    augment: bool = True
    crop: tuple[float, float] = (0.5, 1.0)
    flip: Flip = "none"
    degrees: float = pydantic.Field(default=10.0, ge=0)
    light: float = pydantic.Field(default=0.1, ge=0, lt=1)

    seed: int = pydantic.Field(default=0, ge=0)
    device: DeviceChoice = "auto"
    precision: Precision = "auto"
    bootstrap: int = pydantic.Field(default=1000, ge=0)
    track: Literal["none", "tensorboard"] = "none"
    track_stable_rank: bool = False
    checkpoints: bool = True

    @pydantic.field_validator("rank", "validation_shots")
    @classmethod
    def _from_one(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("a number from 1, or the word")
        return value

    @pydantic.field_validator("data", "images", "test_data", "plan", "model", "ranks", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if isinstance(value, str) and not value.strip():  # it would become the current folder
            raise ValueError("an empty text names nothing")
        return value

    @pydantic.field_validator("std")
    @classmethod
    def _above_zero(cls, value: Triple | None) -> Triple | None:
        if value is not None and min(value) <= 0:
            raise ValueError("three numbers above 0")
        return value

    @pydantic.model_validator(mode="after")
    def _both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std: one without the other")
        return self

    @pydantic.field_validator("glora_path")
    @classmethod
    def _is_path(cls, value: str) -> str:
        try:
            supports_of(value)
        except InputError as error:
            raise ValueError(f"five words for A, B, C, D, E: {'; '.join(error.faults)}") from error
        return value

    def tuning_options(self) -> TuningOptions:
        """Sizes of what a method adds."""
        return TuningOptions(**{f.name: getattr(self, f.name) for f in fields(TuningOptions)})

    def split_rules(self) -> SplitRules:
        """How parts are made where the data set has none."""
        names = ("shots", "draw", "per", "validation_shots", "validation_fraction", "test_fraction")
        return SplitRules(seed=self.data_seed, **{name: getattr(self, name) for name in names})

    def schedule(self) -> Schedule:
        """How long and how fast."""
        names = ("epochs", "batch_size", "min_learning_rate", "warmup_fraction", "weight_decay", "clip", "patience", "seed")
        rate = self.learning_rate if self.learning_rate is not None else METHODS[self.method].learning_rate
        return Schedule(learning_rate=rate, **{name: getattr(self, name) for name in names})
