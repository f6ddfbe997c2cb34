"""All that is known of a tuning run before its first step: images, backbone, features, start, ranks, method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits
from medlore.data.images.transforms import TrainAugmentation
from medlore.errors import InputError
from medlore.layers.tuning.attach import added_parameters
from medlore.layers.tuning.interface import Request, Tuning
from medlore.layers.tuning.methods import install_method
from medlore.models.backbones.cutting import Cut, cut_backbone, own_cut
from medlore.models.backbones.reading import Backbone
from medlore.models.backbones.store import BackboneStore
from medlore.ranks.plan import RankPlan
from medlore.tuning.examples import image_examples, preprocessing_of, refuse_unreadable, steps_of
from medlore.tuning.frozen import FrozenFeatures
from medlore.tuning.plans import plan_once, tracking_of
from medlore.tuning.probing import Reading, SolvedProbe, choose_reading, probe_of
from medlore.tuning.rank_tracking import RankTracking
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import Examples

SOLVED_NOTE = "the probe is solved to convergence on features that are computed once: length, rates and batch size act on nothing"


@dataclass
class Workshop:
    """What several trainings of one process share: devices, backbones that were read, features that were computed."""

    accelerator: Any
    backbones: BackboneStore = field(default_factory=BackboneStore)

    @property
    def features(self) -> FrozenFeatures:
        """They stay as long as the backbones do."""
        kept: FrozenFeatures = self.backbones.memory.setdefault("features", FrozenFeatures())
        return kept


@dataclass
class Prepared:
    """All that is known before the first step.

    Attributes:
        images: what trains.
        validation_images: what selects; None for nothing.
        backbone: cut, with the method installed in it.
        reading: where the head reads.
        cut: the same, where it is not where the backbone's own head reads.
        probe: the regression on `images`, where the head starts; None for a random start.
        plan: ranks, for methods with factors.
        tuning: the method.
        train: inputs of `images`.
        validation: inputs of `validation_images`.
        steps: of the optimiser.
        tracking: of stable ranks, where it is asked for.
        description: the backbone before anything was added.
        head_parameters: of the head.
        added_parameters: of what the method added.
        notes: for the report.
    """

    images: ImageSet
    validation_images: ImageSet | None
    backbone: Backbone
    reading: Reading
    cut: Cut | None
    probe: SolvedProbe | None
    plan: RankPlan | None
    tuning: Tuning
    train: Examples
    validation: Examples | None
    steps: int
    tracking: RankTracking | None
    description: dict[str, Any]
    head_parameters: int
    added_parameters: int
    notes: list[str] = field(default_factory=list)

    @property
    def is_solved(self) -> bool:
        """Whether the start is the whole result: the probe itself."""
        return self.probe is not None and self.tuning.head_only

    def features(self) -> dict[str, Any]:
        """Where the head reads, for the report."""
        cut = self.reading.cut
        found: dict[str, Any] = {"read": "the network's own" if cut is None else str(cut)}
        if cut is not None:
            found |= {"block": cut.block, "reading": cut.reading}
        return found | ({"held_out_log_likelihood": self.reading.held_out} if self.reading.held_out else {})


def check_parts(settings: FinetuneSettings, splits: ImageSplits) -> None:
    """Refuse images without labels, of one class, without the groups that are asked for, or that cannot be read.

    Raises:
        InputError: one class, or no groups.
        DataError: images without a label, or broken ones; all of them are named.
    """
    for part in (splits.train, splits.validation, splits.test):
        if part is not None:
            part.targets()  # names every image without a label
    if len(splits.train.classes) < 2 and splits.train.task == "single":
        raise InputError("--data", f"{len(splits.train.classes)} class", "at least two classes", "add a class folder or a label column")
    parts = [part for part in (splits.train, splits.validation) if part is not None]
    if settings.parts.per == "group" and not any(group is not None for part in parts for group in part.groups):
        raise InputError(
            "--per", "'group', but no image has a patient or study", "data that names them", "give --group-pattern, or use --per image"
        )
    refuse_unreadable(splits.train, splits.validation, splits.test)


def prepare(
    settings: FinetuneSettings,
    images: ImageSet,
    validation: ImageSet | None,
    workshop: Workshop,
    *,
    reading: Reading | None = None,
) -> Prepared:
    """Install the method in a backbone whose head reads and starts where the settings say.

    Args:
        settings: what to do.
        images: what trains; all that the start, the reading and the ranks may depend on.
        validation: what selects.
        workshop: what several trainings share.
        reading: where the head reads, where an earlier training has chosen it; None chooses.
    """
    accelerator, seed = workshop.accelerator, settings.training.seed
    backbone = load_backbone_of(settings, workshop, classes=len(images.classes))
    reading = reading or choose_reading(settings, backbone, images, workshop.features, accelerator)
    probe = None if settings.probing.start == "random" else _probe(settings, backbone, reading, images, workshop)
    cut = None if reading.cut == own_cut(backbone) else reading.cut
    backbone.model.to("cpu")  # features may have been computed elsewhere
    if reading.cut is not None:
        backbone = cut_backbone(backbone, reading.cut, classes=len(images.classes), seed=seed)
    if probe is not None:
        probe.place(backbone.head())
    plan = plan_once(settings, backbone, workshop.backbones, reading.cut)
    train = _training_examples(settings, images, backbone, accelerator)
    length = steps_of(len(train), settings.training.batch_size, settings.passes(len(images)))
    backbone.model.to(accelerator.device)
    request = Request(
        head=backbone.head_name,
        sample=train.inputs(np.arange(1), step=None).to(accelerator.device),
        plan=plan,
        seed=seed,
        steps=length,
        options=settings.given_options(),
        **settings.factors.flat(),
        batches=lambda: _look(train, accelerator.device),
    )
    tracking = tracking_of(settings, backbone, plan)
    description, head_parameters = backbone.describe(), sum(p.numel() for p in backbone.head().parameters())
    tuning = install_method(settings.method, backbone.model, request)
    if tracking is not None:
        tracking.follow(tuning.model)
    notes = [*backbone.notes, *tuning.notes]
    if settings.training.patience and validation is None:
        notes.append("no validation images: --patience cannot stop the run")
    if probe is not None and tuning.head_only and any(getattr(settings.training, name) for name in ("steps", "epochs", "learning_rate")):
        notes.append(SOLVED_NOTE)
    if probe is not None and not probe.choice.folds and settings.probing.probe_strength is None:
        notes.append("a class has one image (or patient): nothing can be held out, so strength and features are those of other data sets")
    return Prepared(
        images=images,
        validation_images=validation,
        backbone=backbone,
        reading=reading,
        cut=cut,
        probe=probe,
        plan=plan,
        tuning=tuning,
        train=train,
        validation=None if validation is None else image_examples(validation, preprocessing_of(backbone)),
        steps=length,
        tracking=tracking,
        description=description,
        head_parameters=head_parameters,
        added_parameters=added_parameters(tuning.model) or (0 if plan is None else plan.parameters),
        notes=notes,
    )


def load_backbone_of(settings: FinetuneSettings, workshop: Workshop, *, classes: int) -> Backbone:
    """The backbone of a run, a copy of its own, with a fresh head."""
    chosen = settings.backbone.flat()
    return workshop.backbones.load(chosen.pop("model"), classes=classes, seed=settings.training.seed, **chosen)


def _probe(settings: FinetuneSettings, backbone: Backbone, reading: Reading, images: ImageSet, workshop: Workshop) -> SolvedProbe:
    return probe_of(settings, backbone, reading.cut, images, workshop.features, workshop.accelerator)


def _training_examples(settings: FinetuneSettings, images: ImageSet, backbone: Backbone, accelerator: Any) -> Examples:
    preprocessing = preprocessing_of(backbone)
    changes = settings.augmentation.flat()
    augmentation = None
    if changes.pop("augment") and settings.way().augments:
        augmentation = TrainAugmentation(preprocessing, seed=settings.training.seed + accelerator.process_index, **changes)
    return image_examples(images, preprocessing, augmentation=augmentation)


def _look(train: Examples, device: Any, *, batch_size: int = 16, most: int = 8) -> list[torch.Tensor]:
    """A few training batches as they are, for methods that look at the data."""
    starts = range(0, min(len(train), batch_size * most), batch_size)
    return [train.inputs(np.arange(s, min(s + batch_size, len(train))), step=None).to(device) for s in starts]
