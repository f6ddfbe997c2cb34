"""Which images train, which select, which judge: the data set's own parts, else seeded parts that share no patient."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlore.data.images.fewshot import draw_shots, read_official_draw
from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.reading import format_of, read_images
from medlore.errors import DataError, InputError, UnknownNameError


@dataclass(frozen=True)
class ImageSplits:
    """The three parts of one experiment.

    None shares an image with another. Parts that were made here share no group either; where a data set brings its own parts, shared
    groups stay and are counted in the notes.

    Attributes:
        train: images that are learnt from.
        validation: images that choose the epoch; None keeps the last epoch.
        test: images that are looked at once, at the end; None leaves the test out.
        notes: how the parts were made.
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None
    notes: tuple[str, ...] = ()


FEW_SHOTS = 10  # below so many units a class, nothing is held out for validation by default


@dataclass(frozen=True)
class SplitRules:
    """How parts are made where the data set has none.

    Attributes:
        shots: labelled units a class to train on; None takes all.
        draw: number of the few-shot draw, from 1.
        seed: of every draw.
        per: what one shot is where patients are known, `image` or `group`.
        validation_shots: at most this many units a class for validation when shots are drawn; `all` keeps everything that is left,
            `none` nothing; None takes as many as `shots` from `FEW_SHOTS` on, and below it none: no label is spent on choosing.
        validation_fraction: share of the pool for validation when all the rest trains (`shots` is None).
        test_fraction: share of the pool for the test when the data set names no test part; 0 leaves the test out.
    """

    shots: int | None = None
    draw: int = 1
    seed: int = 0
    per: Literal["image", "group"] = "image"
    validation_shots: int | Literal["all", "none"] | None = None
    validation_fraction: float = 0.2
    test_fraction: float = 0.2


def read_splits(
    data: str | Path, rules: SplitRules, *, test_data: str | Path | None = None, official: bool = False, **how: Any
) -> ImageSplits:
    """Read a data set and make its parts.

    Args:
        data: what `read_images` reads.
        rules: shots, fractions and seed.
        test_data: a set of its own for the test; None takes the test part of `data`, else holds a share out.
        official: read the published draw number `rules.draw` of MedFMC or VTAB-1k in place of drawing.
        how: further arguments of `read_images` (`format`, `images`, `task`, `classes`, `group_pattern`, `missing_labels`, `split`).

    Images of the test set never train or select, whatever parts were named: they are taken out, and the notes say how many.

    Raises:
        InputError: nothing is there.
        DataError: too few images, none outside the test set, other classes in it, or faults of the files.
    """
    split = how.pop("split", None)
    test = read_images(test_data, **how) if test_data is not None else part_of(data, "test", how)
    if official:
        return _official(data, rules, test, how)
    own_parts = split is None and part_of(data, "train", how) is not None
    pool = read_images(data, split="train" if own_parts else split, **how)
    validation = part_of(data, "val", how) if own_parts and rules.shots is None else None
    made = split_images(pool, rules, validation=validation, test=test)
    return replace(made, notes=(*_about_reading(pool, validation, test), *made.notes))


def _about_reading(*parts: ImageSet | None) -> list[str]:
    """What was noticed when the parts were read; of each at most three notes."""
    found: list[str] = []
    for part in parts:
        notes = () if part is None else part.notes
        found += [f"{part.name}: {note}" for note in notes[:3]] if part is not None else []
        found += [f"and {len(notes) - 3} notes more of this kind"] if len(notes) > 3 else []
    return list(dict.fromkeys(found))


def _official(data: str | Path, rules: SplitRules, test: ImageSet | None, how: dict[str, Any]) -> ImageSplits:
    """A published few-shot draw, cleaned of what would leak."""
    if rules.shots is None:
        raise InputError("--official-draw", "no number of shots", "the shots of a published draw, e.g. 1, 5 or 10", "give --shots")
    kind = format_of(Path(data), how.get("format", "auto"))
    name = kind.removeprefix("medfmc-") if kind.startswith("medfmc-") else Path(data).name
    drawn = read_official_draw(data, name, rules.shots, rules.draw, images=how.get("images"))
    train, about_train = _apart("training", drawn.train, "test", test)
    validation, about_validation = _apart("validation", drawn.validation, "test", test)
    return ImageSplits(train, validation, test, (*drawn.notes, *about_train, *about_validation))


def split_images(pool: ImageSet, rules: SplitRules, *, validation: ImageSet | None = None, test: ImageSet | None = None) -> ImageSplits:
    """Parts of an image set in memory. A test set that is given stays as it is; its images are taken out of the others.

    Raises:
        DataError: classes with too few images, parts with other classes, or no image that is not in the test set.
    """
    for part in (validation, test):
        if part is not None and (part.classes != pool.classes or part.task != pool.task):
            raise DataError(
                part.source, f"classes {part.classes}", f"the classes of {pool.source}: {pool.classes}", "name them with --classes"
            )
    notes: list[str] = []
    if validation is not None:
        validation, about = _apart("validation", validation, "test", test)
        notes += about
    for word, judge in (("test", test), ("validation", validation)):
        pool, about = _apart("training", pool, word, judge)
        notes += about
    if test is None and rules.test_fraction > 0:
        pool, test = hold_out(pool, rules.test_fraction, seed=rules.seed)
        notes.append(f"no test part: {len(test)} images held out by seed {rules.seed}, before any shot was drawn")
        notes += _absent("test", test, pool)
    if rules.shots is not None:
        how = rules.validation_shots or (rules.shots if rules.shots >= FEW_SHOTS else "none")
        wanted = how if isinstance(how, int) else None
        drawn = draw_shots(pool, shots=rules.shots, draw=rules.draw, seed=rules.seed, per=rules.per, validation_shots=wanted)
        notes += drawn.notes
        train, left = drawn.train, None if how == "none" else drawn.validation
        validation = left if validation is None else validation
    elif validation is None and rules.validation_fraction > 0:
        train, validation = hold_out(pool, rules.validation_fraction, seed=rules.seed + 1)
        notes += _absent("validation", validation, train)
    else:
        train = pool
    if validation is not None and not len(validation):
        validation = None
        notes.append("no image is left for validation: the last epoch is kept")
    return ImageSplits(train, validation, test, tuple(notes))


def hold_out(pool: ImageSet, fraction: float, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off a seeded share, whole groups at a time, class by class so that every class has its share.

    The last image or group of a class is never split off: a class that has only one is in the first part alone.

    Raises:
        InputError: a fraction outside 0 to 1.
        DataError: fewer than two images or groups, or none that a class can spare.
    """
    if not 0 < fraction < 1:
        raise InputError("fraction", f"got {fraction}", "more than 0 and less than 1", "use 0.2")
    units: dict[str, list[int]] = {}
    for i, item in enumerate(pool.items):
        units.setdefault(f"image {item.key}" if item.group is None else f"group {item.group}", []).append(i)
    if len(units) < 2:
        raise DataError(pool.source, f"{len(units)} images or groups", "at least two to split", "give more images")
    by_label: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(units):
        by_label.setdefault(pool.items[units[name][0]].labels, []).append(name)
    draw = np.random.default_rng([seed, len(pool)])
    spare = _Spare(pool)
    held: list[int] = []
    owed = 0.0  # shares of small classes add up until they are worth a whole unit
    for label in sorted(by_label):
        names = by_label[label]
        owed += fraction * len(names)
        count = min(int(owed + 0.5), len(names))
        owed -= count
        for k in draw.permutation(len(names)):
            if count and spare.take(units[names[k]]):
                count -= 1
                held += units[names[k]]
    if not held:
        raise DataError(
            pool.source,
            "no image or group that its classes can spare",
            "classes with at least two images or groups",
            "give more images, or a test and a validation part of their own",
        )
    chosen = set(held)
    rest = [i for i in range(len(pool)) if i not in chosen]
    return pool.subset(rest), pool.subset(sorted(held), name=f"{pool.name} held out")


class _Spare:
    """How many images of each class are left; none gives its last ones away."""

    def __init__(self, pool: ImageSet) -> None:
        self._pool = pool
        self._left: Counter[int] = Counter(c for item in pool.items for c in pool.present(item))

    def take(self, unit: Sequence[int]) -> bool:
        """Take the images of one unit, unless a class would have none left then."""
        wanted = Counter(c for i in unit for c in self._pool.present(self._pool.items[i]))
        if any(self._left[c] <= count for c, count in wanted.items()):
            return False
        self._left -= wanted
        return True


def _absent(word: str, part: ImageSet, rest: ImageSet) -> list[str]:
    """A note on classes that were too small to give an image away."""
    left = rest.counts()
    names = [name for name, count in part.counts().items() if count == 0 and left[name]]
    return [f"no {word} image of: {', '.join(names)} (too few images to hold one out)"] if names else []


def _apart(word: str, part: ImageSet, other: str, judge: ImageSet | None) -> tuple[ImageSet, list[str]]:
    """`part` without the images of `judge`, and what a reader must know about what the two share."""
    if judge is None:
        return part, []
    seen = {identity_of(item) for item in judge.items}
    kept = [i for i, item in enumerate(part.items) if identity_of(item) not in seen]
    if not kept:
        raise DataError(
            part.source, f"every {word} image is a {other} image too", f"images outside the {other} set", "name another part or set"
        )
    notes = []
    if len(kept) < len(part):
        notes.append(f"{len(part) - len(kept)} of {len(part)} {word} images are {other} images too; taken out of the {word} images")
    groups = {item.group for item in judge.items if item.group is not None}
    if shared := sum(part.items[i].group in groups for i in kept):
        notes.append(f"{shared} {word} images share a patient or study with {other} images; parts of the data set's own, left as they are")
    return (part.subset(kept) if len(kept) < len(part) else part), notes


def identity_of(item: ImageItem) -> Hashable:
    """The same for the same file, archive member or array, however it was reached."""
    source = item.source
    if isinstance(source, np.ndarray):
        return source.shape, source.dtype.str, hashlib.sha256(np.ascontiguousarray(source).tobytes()).digest()
    return source.resolve() if isinstance(source, Path) else source


def part_of(data: str | Path, split: str, how: dict[str, Any]) -> ImageSet | None:
    """The part of that name, if the data set has one."""
    try:
        return read_images(data, split=split, **how)
    except UnknownNameError:
        return None
