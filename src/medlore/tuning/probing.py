"""The probe of a run: where the head reads, the regression on all that it may learn from, and the head that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medlore.data.images.imageset import ImageSet
from medlore.errors import DataError, InputError
from medlore.models.backbones.cutting import READINGS, Cut, own_cut, read_as
from medlore.models.backbones.families import FAMILIES
from medlore.models.backbones.reading import Backbone
from medlore.tuning.frozen import FrozenFeatures
from medlore.tuning.probe import STRENGTHS, Choice, Probe, choose_strength, fit_probe, log_likelihood, usual_strengths
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.views import views_of

DEEPEST = 4  # blocks from the end between which `--features auto` chooses
MOST_FOR_CHOOSING = 1000  # images that choose a reading or a strength
# How much log-likelihood of all shots together another reading has to gain over the network's own one (docs/results/recipe-probes.json:
# with 0 or 1 as good, with more the gain of earlier blocks is lost; earlier blocks themselves need not gain more).
OTHER_READING = 1.0


@dataclass(frozen=True)
class Reading:
    """Where the head reads, and what the shots said about the candidates.

    Attributes:
        cut: block and reading; None for a network that can only be read as it is.
        held_out: candidate -> mean log-likelihood of a held-out image; empty where nothing was compared.
    """

    cut: Cut | None
    held_out: dict[str, float]


@dataclass(frozen=True)
class SolvedProbe:
    """A probe and what it was made from.

    Attributes:
        probe: the classifier.
        choice: what the shots say about each strength.
        images: labelled images that it was fitted to.
        training_loss: their mean loss.
        views: changed views of each, beside it.
    """

    probe: Probe
    choice: Choice
    images: int
    training_loss: float
    views: int = 0

    def place(self, head: nn.Module) -> None:
        """Make a linear head give the probe's logits."""
        weight, bias = self.probe.as_linear()
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight))  # type: ignore[operator]
            head.bias.copy_(torch.from_numpy(bias))  # type: ignore[operator]


def choose_reading(settings: FinetuneSettings, backbone: Backbone, images: ImageSet, store: FrozenFeatures, accelerator: Any) -> Reading:
    """Where the head reads: as the settings say, or what the shots like best, weighed against what suits most networks.

    Raises:
        InputError: a reading or a block that the network does not have.
    """
    wanted, own = settings.probing, own_cut(backbone)
    if own is None:
        if wanted.features not in ("auto", "own"):
            came = f"{wanted.features!r} with a {FAMILIES[backbone.family].caption}"
            readable = ", ".join(family.caption for family in FAMILIES.values() if family.reads is not None)
            raise InputError("--features", came, f"a network whose tokens can be read otherwise: {readable}", "leave it at auto")
        return Reading(None, {})
    planned = settings.allocation.plan is not None or settings.allocation.ranks is not None  # for the blocks of the whole network
    if wanted.features == "own" or (planned and wanted.features == "auto"):
        return Reading(own, {})
    if wanted.features != "auto":
        block = wanted.feature_block or own.block
        if block > own.block:
            raise InputError("--feature-block", f"got {block}", f"1 to {own.block} for this network", "name one of its blocks")
        return Reading(Cut(block, wanted.features), {})
    return _compared(settings, backbone, own, images, store, accelerator)


def _compared(
    settings: FinetuneSettings, backbone: Backbone, own: Cut, images: ImageSet, store: FrozenFeatures, accelerator: Any
) -> Reading:
    some = _some(images, settings.training.seed)
    blocks = tuple(range(max(1, own.block - DEEPEST + 1), own.block + 1))
    rows = torch.from_numpy(store.behind(backbone, some, blocks, accelerator=accelerator))
    values, held_out = {}, {}
    for place, block in enumerate(blocks):
        for reading in READINGS:
            cut = Cut(block, reading)
            features = read_as(rows[:, place], reading).numpy()
            choice = _choose(features, some, settings.training.seed, repeats=1, strengths=usual_strengths(features.shape[1]))
            if not choice.folds:  # a class has one image: nothing can be held out
                return Reading(own, {})
            held_out[str(cut)] = max(choice.held_out.values())
            values[cut] = choice.value - OTHER_READING * (reading != own.reading)
    return Reading(max(values, key=lambda cut: values[cut]), held_out)


def probe_of(
    settings: FinetuneSettings, backbone: Backbone, cut: Cut | None, images: ImageSet, store: FrozenFeatures, accelerator: Any
) -> SolvedProbe:
    """The probe of some labelled images at a cut, as the settings want it.

    Raises:
        DataError: features that are not finite, or the same for every image.
        InputError: images of one class.
    """
    looks = [None, *views_of(settings.views(), len(images), settings.augmentation.flip)]
    plain, *views = (store.read(backbone, images, cut, accelerator=accelerator, view=look) for look in looks)
    return solve_probe(plain, images, views=views, strength=settings.probing.probe_strength, seed=settings.training.seed)


def solve_probe(
    features: NDArray[np.floating],
    images: ImageSet,
    *,
    views: Sequence[NDArray[np.floating]] = (),
    strength: float | None = None,
    seed: int = 0,
) -> SolvedProbe:
    """The probe of some labelled images: their strength by cross-validation and prior, then a fit to all of them.

    Args:
        features: (n, d) of `images`.
        images: labelled.
        views: (n, d) each, of the same images changed; an image and its views together count as one.
        strength: inverse penalty; None chooses, on the images as they are.
        seed: of the folds.

    Raises:
        DataError: features that are not finite, or the same for every image.
        InputError: images of one class.
    """
    targets = images.targets()
    if strength is None:
        chosen = _some_rows(len(images), seed)
        part = images.subset([int(i) for i in chosen])
        choice = _choose(features[chosen], part, seed)
    else:
        choice = Choice(strength, {}, 0)
    try:
        probe = fit_probe(
            np.concatenate([features, *views]),
            np.concatenate([targets] * (1 + len(views))),
            classes=len(images.classes),
            task=images.task,
            strength=choice.strength / (1 + len(views)),
        )
    except DataError as error:
        raise error.at(f"{images.name}, features") from error
    loss = -log_likelihood(probe.logits(features), targets, images.task) / len(images)
    return SolvedProbe(probe, choice, len(images), loss, len(views))


def _choose(
    features: NDArray[np.floating], images: ImageSet, seed: int, *, repeats: int | None = None, strengths: Sequence[float] = STRENGTHS
) -> Choice:
    several = 4 if len(images) <= 100 else 2 if len(images) <= 300 else 1
    try:
        return choose_strength(
            features,
            images.targets(),
            classes=len(images.classes),
            task=images.task,
            groups=images.groups if any(group is not None for group in images.groups) else None,
            repeats=repeats or several,
            seed=seed,
            strengths=strengths,
        )
    except DataError as error:
        raise error.at(f"{images.name}, features") from error


def _some(images: ImageSet, seed: int) -> ImageSet:
    return images.subset([int(i) for i in _some_rows(len(images), seed)])


def _some_rows(count: int, seed: int) -> NDArray[np.int64]:
    rows = np.random.default_rng([seed, count]).permutation(count)[:MOST_FOR_CHOOSING]
    return np.sort(rows)


def all_labels(parts: Sequence[ImageSet | None]) -> ImageSet:
    """Several parts as one set, in their order."""
    first, *rest = [part for part in parts if part is not None]
    items = [*first.items, *(item for part in rest for item in part.items)]
    return replace(first, items=tuple(items)) if rest else first
