"""What a study file may say: data sets, shots, draws, methods, seeds and what each of them changes."""

from __future__ import annotations

from typing import Any, Literal

import pydantic

from medlore.data.images.missing_labels import HELP, MissingLabels
from medlore.data.images.reading import Format
from medlore.data.images.words import Flip
from medlore.layers.tuning.methods import METHODS
from medlore.runs.settings import Settings, known_name, setting
from medlore.tuning.settings import DatasetSettings, FinetuneSettings, PartsSettings

DIGITS = "sklearn:digits"
GRID_NAMES = ("data", "shots", "draw", "method", "seed")  # what names a cell
Shots = int | Literal["all"]
Measure = Literal["auto", "accuracy", "balanced_accuracy", "macro_auc", "mean_average_precision"]

# Decided by the grid, the data entry or the study; the settings of a study or a method may not say them again.
FIXED = {"bootstrap": 0, "checkpoints": False}
DECIDED = frozenset({*DatasetSettings.fields(), *PartsSettings.fields(), "method", "seed", "learning_rate", "flip", "track", *FIXED})


class DataEntry(Settings):
    """One data set; paths start from the folder of the study file."""

    name: str = setting(..., "Name in the tables.")
    data: str = setting(..., "Folder, list, table, .npz or .zip, or sklearn:digits.")
    format: Format = setting("auto", "Format of `data`, if auto detects the wrong one.")
    images: str | None = setting(None, "Folder of the images, if they are not beside the list.")
    test_data: str | None = setting(None, "Separate test set.")
    task: Literal["single", "multi"] | None = setting(None, "single or multi, if a table could be both.")
    classes: tuple[str, ...] | None = setting(None, "Class names in label order.")
    group_pattern: str | None = setting(None, "Regular expression for file names whose group captures the patient ID.")
    missing_labels: MissingLabels = setting("fault", HELP)
    group: str | None = setting(None, "Group of the set in the mean of group means (natural, specialized, ... in VTAB-1k).", decides=False)
    per: Literal["image", "group"] = setting("image", "Whether one shot is an image or a group (patient).")
    official_draw: bool = setting(False, "Use the published draws of MedFMC or VTAB-1k.")
    test_fraction: float = setting(0.4, "Share held out for testing, if the set has no test part.", gt=0, lt=1)
    test_limit: int | None = setting(None, "Approximate number of test images to keep, the same for all cells.", ge=1)
    flip: Flip = setting("none", "Mirror images that are anatomically possible.")


class MethodEntry(Settings):
    """One contender; a bare word is its method."""

    method: str = setting(..., "One of the methods of `medlore finetune`.")
    name: str | None = setting(None, "Name in the tables; default the method.")
    rate: float | None = setting(None, "Peak learning rate in place of the method's default; the factors of `tuning` multiply it.", gt=0)
    settings: FinetuneSettings = setting(FinetuneSettings(), "Settings of this method.")
    grid: dict[str, tuple[Any, ...]] = setting({}, "Setting -> values; each value is a separate contender.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: object) -> object:
        return {"method": value} if isinstance(value, str) else value

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        return known_name(value, METHODS, "no such method; the nearest are {near}")


class TuningRules(Settings):
    """Hyper-parameters that are tried, the same number for every method, judged on validation images alone."""

    rate_factors: tuple[pydantic.PositiveFloat, ...] = setting((1.0,), "Multiples of each method's own learning rate.", min_length=1)


class StudySettings(Settings):
    """A grid of tuning runs; `docs/studies.md` explains each field."""

    name: str = setting(..., "Name of the study.")
    data: tuple[DataEntry, ...] = setting(..., "Data sets.")
    shots: tuple[Shots, ...] = setting(..., "Labelled images per class; `all` for every image.")
    draws: int = setting(5, "Draws of each number of shots.", ge=1)
    seeds: tuple[pydantic.NonNegativeInt, ...] = setting((0,), "Seeds; those of one draw are averaged first, so a draw counts once.")
    methods: tuple[MethodEntry, ...] = setting(..., "The contenders.")
    reference: str | None = setting(None, "Method with which all others are compared; default the first.")
    equal_controls: bool = setting(True, "Add to each sr-lora a uniform rank with about as many parameters.")
    validation_shots: int | Literal["all", "none"] | None = setting(None, "Validation images per class; default as many as shots.")
    data_seed: int = setting(0, "Seed of all draws of images.", ge=0)
    measure: Measure = setting("auto", "Score; auto uses balanced accuracy, or macro AUC for multi-label data.")
    tuning: TuningRules = setting(TuningRules(), "Learning rates to try: `rate_factors`.")
    settings: FinetuneSettings = setting(FinetuneSettings(), "Settings of `medlore finetune` for all methods.")
    shots_settings: dict[Shots, FinetuneSettings] = setting({}, "Settings that override them for some numbers of shots.")

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
