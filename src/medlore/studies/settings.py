"""What a study file may say: data sets, shots, draws, methods, seeds and what each of them changes."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from medlore.data.images.reading import Format
from medlore.data.images.transforms import Flip
from medlore.errors import nearest_names
from medlore.layers.tuning.methods import METHODS
from medlore.runs.settings import Settings
from medlore.tuning.settings import FinetuneSettings, MethodName

DIGITS = "sklearn:digits"
GRID_NAMES = ("data", "shots", "draw", "method", "seed")  # what names a cell
Shots = int | Literal["all"]
Measure = Literal["auto", "accuracy", "balanced_accuracy", "macro_auc", "mean_average_precision"]

# Decided by the grid, the data entry or the study; the settings of a study or a method may not say them again.
DECIDED = frozenset({
    "data", "format", "images", "test_data", "split", "task", "classes", "group_pattern", "shots", "draw", "data_seed", "per",
    "official_draw", "validation_shots", "validation_fraction", "test_fraction", "method", "seed", "learning_rate", "flip", "bootstrap",
    "track", "checkpoints",
})  # fmt: skip


class DataEntry(Settings):
    """One data set.

    `data`, `images` and `test_data` are paths beside the study file, or `sklearn:digits`. `group` gathers sets for the mean of
    group means (natural, specialized and structured in VTAB-1k). `test_limit` keeps about that many test images, the same for all cells.
    """

    name: str
    data: str
    format: Format = "auto"
    images: str | None = None
    test_data: str | None = None
    task: Literal["single", "multi"] | None = None
    classes: tuple[str, ...] | None = None
    group_pattern: str | None = None
    group: str | None = None
    per: Literal["image", "group"] = "image"
    official_draw: bool = False
    test_fraction: float = pydantic.Field(default=0.4, gt=0, lt=1)
    test_limit: int | None = pydantic.Field(default=None, ge=1)
    flip: Flip = "none"


class MethodEntry(Settings):
    """One contender: a method, what is set for it, and values that are tried one after the other as contenders of their own.

    `rate` is its peak learning rate in place of the method's default; the factors of `tuning` multiply it.
    """

    method: MethodName
    name: str | None = None
    rate: float | None = pydantic.Field(default=None, gt=0)
    settings: FinetuneSettings = FinetuneSettings()
    grid: dict[str, tuple[Any, ...]] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: object) -> object:
        return {"method": value} if isinstance(value, str) else value

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        if isinstance(value, str) and value not in METHODS:
            raise ValueError(f"no such method; the nearest are {', '.join(nearest_names(value, METHODS))}")
        return value


class TuningRules(Settings):
    """Hyper-parameters that are tried, the same number for every method, judged on validation images alone.

    `rate_factors`: multiples of each method's own learning rate.
    """

    rate_factors: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(default=(1.0,), min_length=1)


class StudySettings(Settings):
    """A grid of tuning runs; `docs/studies.md` explains each field."""

    name: str
    data: tuple[DataEntry, ...]
    shots: tuple[Shots, ...]
    draws: int = pydantic.Field(default=5, ge=1)
    seeds: tuple[pydantic.NonNegativeInt, ...] = (0,)
    methods: tuple[MethodEntry, ...]
    reference: str | None = None
    equal_controls: bool = True
    validation_shots: int | Literal["all", "none"] | None = None
    data_seed: int = pydantic.Field(default=0, ge=0)
    measure: Measure = "auto"
    tuning: TuningRules = TuningRules()
    settings: FinetuneSettings = FinetuneSettings()
    shots_settings: dict[Shots, FinetuneSettings] = pydantic.Field(default_factory=dict)

    @pydantic.field_validator("data", "shots", "seeds", "methods")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("at least one")
        return value

    @pydantic.field_validator("shots")
    @classmethod
    def _from_one(cls, value: tuple[Shots, ...]) -> tuple[Shots, ...]:
        if any(isinstance(each, int) and each < 1 for each in value):
            raise ValueError("numbers from 1, or `all`")
        return value

    @pydantic.field_validator("validation_shots")
    @classmethod
    def _some(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("a number from 1, `all` or `none`")
        return value
