"""What one tuning run is asked to do, subject by subject."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import pydantic

from medlore.assets import PREFIX
from medlore.data.images.imageset import Task
from medlore.data.images.missing_labels import HELP, MissingLabels
from medlore.data.images.reading import Format
from medlore.data.images.splits import SplitRules
from medlore.data.images.words import Flip
from medlore.layers.tuning.methods import METHODS, Method, named
from medlore.models.backbones.families import Triple
from medlore.runs.hardware import DeviceChoice, Precision
from medlore.runs.settings import Idle, Settings, Subject, known_name, setting
from medlore.tuning.start_settings import ChoosingSettings, StartSettings

if TYPE_CHECKING:
    from medlore.tuning.training import EpochSchedule

METHOD_GROUP = "Method and ranks"
# The recipe: between two points that were measured on development sets, none of which is reported on; not run itself (docs/tuning.md).
PROBE_RATE_SHARE, HEAD_RATE_SHARE = 0.05, 0.1  # of the method's rate from a probe; of that, for the head
DEFAULT_EPOCHS, FEWEST_STEPS, MOST_STEPS = 8, 40, 60  # passes, in these limits of steps; the upper one for few images
FEW_IMAGES = 200
PUBLISHED_EPOCHS = 20  # from a random start


AUTO = "auto"  # in place of a method: chosen on the shots


def _method(s: FinetuneSettings) -> Method:
    return s.way()


def _one_rank(s: FinetuneSettings) -> bool:
    return _method(s).rule == "uniform" and s.allocation.rank != "equal"


# Why a setting acts on nothing. A reason names other settings in braces.
_NO_FACTORS = Idle(lambda s: _method(s).rule is None, "--method {method} has no low-rank factors")
_NO_TARGETS = Idle(lambda s: _method(s).rule is None and not s.run.track_stable_rank, "--method {method} has no low-rank factors")
_PLANNED = Idle(lambda s: s.allocation.plan is not None, "targets, ranks and alphas come from --plan")
_LISTED = Idle(lambda s: s.allocation.ranks is not None, "the ranks come from --ranks")
_MEASURED = Idle(
    lambda s: s.method != AUTO and _method(s).rule == "stable-rank",
    "the ranks of {method} follow the stable ranks; --scale and --budget change them",
)
_ONE_RANK = Idle(lambda s: s.allocation.ranks is None and _one_rank(s), "--method {method} has one rank (--rank)")
_UNSCALED = Idle(lambda s: not _method(s).scaled, "the supports of {method} have neither scaling nor dropout")
_UNMASKED = Idle(lambda s: not _method(s).component_masks, f"only --method {named(lambda m: m.component_masks)} takes them")
_NOT_DRAWN = Idle(lambda s: s.parts.shots is None, "without --shots every image trains and nothing is drawn")
_COUNTED = Idle(lambda s: s.parts.shots is not None, "with --shots the validation images are counted by --validation-shots")
_PUBLISHED = Idle(lambda s: s.parts.official_draw, "--official-draw reads published lists")
_OWN_TEST = Idle(lambda s: s.dataset.test_data is not None, "the test images come from --test-data")
_AS_THEY_ARE = Idle(lambda s: not s.augmentation.augment, "--no-augment leaves the images as they are")
_ONCE = Idle(lambda s: not _method(s).augments, "{method} computes its features once, without augmentation")
_NEVER_CHANGED = Idle(lambda s: not _method(s).augments and not s.views(), "{method} computes its features once, without views")
_KNOWN_HEADS = Idle(
    lambda s: s.backbone.model.startswith(PREFIX) or not Path(s.backbone.model).is_file(),
    "the configuration of {model} says how many attention heads it has",
)


def _named_text(value: object) -> object:
    if isinstance(value, str) and not value.strip():  # it would become the current folder
        raise ValueError("an empty text names nothing")
    return value


def _from_one(value: int | str | None) -> int | str | None:
    if isinstance(value, int) and value < 1:
        raise ValueError("a number from 1, or the word")
    return value


class DatasetSettings(Subject):
    """Where the labelled images are."""

    title: ClassVar[str] = "Images"

    data: Path | None = setting(None, "Folder of class folders, MedFMC or VTAB-1k folder or list, CSV, .npz or .zip.")
    format: Format = setting("auto", "Format of --data, if auto detects the wrong one.")
    images: Path | None = setting(None, "Folder of the images, if they are not beside the list.")
    test_data: Path | None = setting(None, "Separate test set; default the test part of --data, else a held-out share.")
    split: str | None = setting(None, "Part of --data from which shots are drawn.")
    task: Task | None = setting(None, "single or multi, if a table could be both.")
    classes: tuple[str, ...] | None = setting(None, "Class names in label order.")
    group_pattern: str | None = setting(None, "Regular expression for file names whose group captures the patient ID.")
    missing_labels: MissingLabels = setting("fault", HELP)

    _paths = pydantic.field_validator("data", "images", "test_data", mode="before")(_named_text)


class PartsSettings(Subject):
    """Which images train, select and judge, where the data set does not say it."""

    title: ClassVar[str] = "Images"

    shots: int | None = setting(None, "Labelled images per class; default all.", ge=1)
    draw: int = setting(1, "Number of the few-shot draw.", ge=1, idle=(_NOT_DRAWN,))
    data_seed: int = setting(0, "Seed of all draws of images.", ge=0, idle=(_PUBLISHED,))
    per: Literal["image", "group"] = setting(
        "image", "Whether one shot is an image or a group (patient).", idle=(_NOT_DRAWN, _PUBLISHED), neutral="image"
    )
    official_draw: bool = setting(False, "Use the published draw of MedFMC or VTAB-1k.")
    validation_shots: int | Literal["all", "none"] | None = setting(
        None, "Validation images per class, all or none; default as many as --shots from 10 on, else none.", idle=(_NOT_DRAWN, _PUBLISHED)
    )
    validation_fraction: float = setting(
        0.2, "Share held out for validation if --shots is not given.", ge=0, lt=1, idle=(_COUNTED, _PUBLISHED)
    )
    test_fraction: float = setting(
        0.2, "Share held out for testing, if the data set has no test part.", ge=0, lt=1, idle=(_PUBLISHED, _OWN_TEST)
    )

    _counts = pydantic.field_validator("validation_shots")(_from_one)

    def rules(self) -> SplitRules:
        """How parts are made where the data set has none."""
        names = ("shots", "draw", "per", "validation_shots", "validation_fraction", "test_fraction")
        return SplitRules(seed=self.data_seed, **{name: getattr(self, name) for name in names})


class BackboneSettings(Subject):
    """The pre-trained network."""

    title: ClassVar[str] = "Backbone"

    model: str = setting("medlore:vit-mini", "medlore:vit-mini, a transformers folder, a weights file or a hub name.", path=True)
    image_size: int | None = setting(None, "Side of the input in pixels.", ge=1)
    mean: Triple | None = setting(None, "Channel means of the backbone's training images, three numbers from 0 to 1.")
    std: Triple | None = setting(None, "Standard deviations of their channels, three numbers.")
    heads: int | None = setting(None, "Attention heads of a ViT weights file; default width / 64.", ge=1, idle=(_KNOWN_HEADS,))

    _model = pydantic.field_validator("model", mode="before")(_named_text)

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


class AllocationSettings(Subject):
    """Ranks and scaling of the low-rank factors."""

    title: ClassVar[str] = METHOD_GROUP

    plan: Path | None = setting(None, "Rank plan of `medlore ranks --out`.", idle=(_NO_FACTORS,))
    ranks: str | None = setting(None, "List of given ranks: a file, or medlore:rank-lists/NAME.", path=True, idle=(_NO_FACTORS, _PLANNED))
    targets: str = setting("attention", "attention, attention+mlp, all-linear, conv, or a pattern.", idle=(_NO_TARGETS, _PLANNED))
    granularity: Literal["projection", "fused"] = setting(
        "projection", "projection: one stable rank each for q, k, v; fused: one for all.", idle=(_NO_FACTORS, _PLANNED, _ONE_RANK)
    )
    rank: int | Literal["equal"] = setting(
        8,
        "Rank of methods with a uniform rank; `equal`: about as many parameters as sr-lora.",
        idle=(_NO_FACTORS, _PLANNED, _LISTED, _MEASURED),
    )
    scale: float = setting(1.0, "Factor by which the stable ranks are multiplied.", gt=0, idle=(_NO_FACTORS, _PLANNED, _LISTED, _ONE_RANK))
    budget: str | None = setting(
        None, "Parameter budget of all factors: 250000, 0.5M, 2%, uniform:8.", idle=(_NO_FACTORS, _PLANNED, _LISTED, _ONE_RANK)
    )
    alpha: str | None = setting(None, "rank, rank*C, rslora*C or a number; default the method's.", idle=(_NO_FACTORS, _PLANNED, _UNSCALED))

    _texts = pydantic.field_validator("plan", "ranks", mode="before")(_named_text)
    _rank = pydantic.field_validator("rank")(_from_one)


class FactorSettings(Subject):
    """How the low-rank factors are trained."""

    title: ClassVar[str] = METHOD_GROUP

    partial_update: Literal["off", "nested", "single"] = setting(
        "off", "Stochastic partial update of SR-LoRA: each step trains some components.", idle=(_NO_FACTORS,), neutral="off"
    )
    component_masks: Literal["off", "shapley"] = setting(
        "off", "Random masks over the components, guided by Shapley values.", idle=(_UNMASKED,), neutral="off"
    )
    dropout: float = setting(0.0, "Dropout on the input of the factors.", ge=0, lt=1, idle=(_NO_FACTORS, _UNSCALED), neutral=0.0)


def _of_others(owners: frozenset[str], s: FinetuneSettings) -> bool:
    return s.method not in owners


def _options_of_methods() -> dict[str, Any]:
    """Every option of every method as a field of settings; its default is the methods', where they agree, else None: the method's own."""
    owners: dict[str, list[str]] = {}
    found: dict[str, tuple[Any, set[Any]]] = {}
    for method, entry in METHODS.items():
        hints = typing.get_type_hints(entry.options, include_extras=True)
        for field in fields(entry.options):
            owners.setdefault(field.name, []).append(method)
            found.setdefault(field.name, (hints[field.name], set()))[1].add(field.default)
    made = {}
    for name, (hint, defaults) in found.items():
        several, methods = len(defaults) > 1, ", ".join(owners[name])
        idle = Idle(partial(_of_others, frozenset(owners[name])), f"only --method {methods} takes it")
        text = next(part.description for part in hint.__metadata__ if getattr(part, "description", None))
        values = ", ".join(f"{getattr(METHODS[m].options, name):g} of {m}" for m in owners[name]) if several else ""
        words = f"{text} Only for {methods}." + (f" Default {values}." if several else "")
        made[name] = (hint | None if several else hint, setting(None if several else next(iter(defaults)), words, idle=(idle,)))
    return made


class MethodOptions(Subject):
    """Options of single methods; the fields come from the table of methods."""

    title: ClassVar[str] = METHOD_GROUP


OptionSettings = pydantic.create_model("OptionSettings", __base__=MethodOptions, __module__=__name__, **_options_of_methods())


class TrainingSettings(Subject):
    """How long and how fast."""

    title: ClassVar[str] = "Training"

    steps: int | None = setting(None, "Optimiser steps, rounded up to whole passes over the images; default by their number.", ge=1)
    epochs: int | None = setting(None, "Passes over the training images, in place of --steps.", ge=1)
    batch_size: int = setting(4, "Images per step.", ge=1)
    learning_rate: float | None = setting(
        None,
        "Peak rate of all but the head; default the method's, from a probe a twentieth of it.",
        gt=0,
        flags=("--learning-rate", "--lr"),
    )
    head_learning_rate: float | None = setting(
        None, "Peak rate of the head; default a tenth of the other from a probe, the same from a random start.", gt=0
    )
    refit: bool = setting(True, "Train again on all labels, those of the validation images too, once the length is chosen.", neutral=True)
    min_learning_rate: float = setting(0.0, "Learning rate at the end of the cosine.", ge=0)
    warmup_fraction: float = setting(0.1, "Share of all steps used for a linear warm-up.", ge=0, le=1)
    weight_decay: float = setting(0.05, "Weight decay of matrices; biases and norms have none.", ge=0)
    clip: float | None = setting(1.0, "Largest norm of the gradient.", gt=0)
    patience: int | None = setting(None, "Stop after this many epochs without a better score.", ge=1)
    seed: int = setting(0, "Seed of head, factors, order and augmentation.", ge=0)


class AugmentationSettings(Subject):
    """How training images are changed."""

    title: ClassVar[str] = "Augmentation"

    augment: bool = setting(True, "Crop, rotate and change the brightness of training images, or train on the unchanged images.")
    crop: tuple[float, float] = setting((0.5, 1.0), "Smallest and largest share of the area that is kept.", idle=(_AS_THEY_ARE, _ONCE))
    flip: Flip = setting("none", "Mirror images that are anatomically possible.", idle=(_AS_THEY_ARE, _NEVER_CHANGED), neutral="none")
    degrees: float = setting(10.0, "Largest rotation.", ge=0, idle=(_AS_THEY_ARE, _ONCE))
    light: float = setting(0.1, "Largest change of brightness and contrast.", ge=0, lt=1, idle=(_AS_THEY_ARE, _ONCE))


class RunSettings(Subject):
    """Where and how it runs."""

    title: ClassVar[str] = "Run"

    device: DeviceChoice = setting("auto", "Device to run on.", decides=False)
    precision: Precision = setting("auto", "Numeric precision; auto: float32 on CPU, bfloat16 (else float16) on CUDA.")
    bootstrap: int = setting(1000, "Resamples for the intervals; 0 for none.", ge=0, decides=False)
    track: Literal["none", "tensorboard"] = setting("none", "Tracker that receives losses and scores.", decides=False)
    track_stable_rank: bool = setting(False, "Record the stable ranks of weights and updates after each epoch.")
    checkpoints: bool = setting(True, "Write a checkpoint after each epoch.", decides=False)


class FinetuneSettings(Settings):
    """Everything that decides the result of one tuning run; `docs/tuning.md` lists each setting.

    Names are unique, so that they may be written nested (`training={"epochs": 5}`) or flat (`epochs=5`).

    Example:
        >>> settings = FinetuneSettings(method="LoRA", epochs=5, shots=3)
        >>> settings.method, settings.training.epochs, settings.parts.shots
        ('lora', 5, 3)
    """

    dataset: DatasetSettings = DatasetSettings()
    parts: PartsSettings = PartsSettings()
    backbone: BackboneSettings = BackboneSettings()
    probing: StartSettings = StartSettings()
    method: str = setting(
        "sr-lora", f"{', '.join(METHODS)}, or auto: chosen on the shots.", group=METHOD_GROUP, words=lambda _: [*METHODS, AUTO]
    )
    allocation: AllocationSettings = AllocationSettings()
    factors: FactorSettings = FactorSettings()
    options: OptionSettings = OptionSettings()  # type: ignore[valid-type]
    training: TrainingSettings = TrainingSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    choosing: ChoosingSettings = ChoosingSettings()
    run: RunSettings = RunSettings()

    if TYPE_CHECKING:

        def __init__(self, **values: Any) -> None: ...

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: object) -> object:
        return AUTO if isinstance(value, str) and value.casefold() == AUTO else known_name(value, METHODS)

    def way(self) -> Method:
        """The entry of its method in the table; that of the largest candidate where the method is chosen on the shots."""
        return METHODS["sr-lora" if self.method == AUTO else self.method]

    def chosen_on_shots(self) -> bool:
        """Whether method, rate or length are chosen by cross-validation."""
        return self.method == AUTO or self.choosing.tune == "cv"

    def method_options(self) -> Any:
        """Options of its method: those that were given, its defaults for the rest."""
        return self.way().chosen(self.given_options())

    def given_options(self) -> Mapping[str, Any]:
        """Name -> value of options of single methods; None stands for the method's own default."""
        values: Mapping[str, Any] = self.options.flat()  # type: ignore[attr-defined]
        return values

    def rates(self) -> tuple[float, float]:
        """Peak rates of what is tuned and of the head."""
        way = self.way()
        given, head = self.training.learning_rate, self.training.head_learning_rate
        if self.probing.start == "random":
            rate = given or way.learning_rate
            return rate, head or rate
        rate = given or way.learning_rate * PROBE_RATE_SHARE
        return rate, head or rate * HEAD_RATE_SHARE

    def views(self) -> int:
        """Changed views of each image from which the probe learns: none without a probe, or where images stay as they are."""
        return self.probing.probe_views if self.probing.start == "probe" and self.augmentation.augment else 0

    def passes(self, images: int) -> int:
        """Passes over so many training images: `epochs`, or as many as `steps` take, or as the rule says."""
        training = self.training
        if training.epochs is not None:
            return training.epochs
        if training.steps is None and self.probing.start == "random":
            return PUBLISHED_EPOCHS
        each = math.ceil(images / training.batch_size)
        most = MOST_STEPS if images <= FEW_IMAGES else DEFAULT_EPOCHS * each
        wanted = training.steps or min(max(DEFAULT_EPOCHS * each, FEWEST_STEPS), most)
        return max(1, math.ceil(wanted / each))

    def schedule(self, images: int = 1) -> EpochSchedule:
        """How long and how fast, for so many training images."""
        from medlore.tuning.training import EpochSchedule

        values = self.training.flat()
        del values["steps"], values["refit"]
        rate, head = self.rates()
        return EpochSchedule(**values | {"learning_rate": rate, "head_learning_rate": head, "epochs": self.passes(images)})

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.training.steps is not None and self.training.epochs is not None:
            raise ValueError("steps and epochs: both given; leave one out")
        return self
