"""Few-shot draws: a handful of labelled units per class, with nothing shared between training and validation.

One shot is one image, or with `per="group"` one patient, study or slide (a group) with its images, as in MedFMC. A group is
never on both sides, whatever one shot is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.lists import MEDFMC_CLASSES, VTAB_CLASSES
from medlore.data.images.published import Published, read_published
from medlore.errors import DataError, InputError, UnknownNameError


@dataclass(frozen=True)
class Draw:
    """One few-shot sample of a pool.

    Args:
        train: the drawn images.
        validation: what is left, without any image or group of `train`.
        notes: what a reader of results must know: classes that fell short, images left out, overlaps removed.
    """

    train: ImageSet
    validation: ImageSet
    notes: tuple[str, ...] = ()


def draw_shots(
    pool: ImageSet,
    *,
    shots: int,
    draw: int = 1,
    seed: int = 0,
    per: Literal["image", "group"] = "image",
    validation_shots: int | None = None,
    allow_fewer: bool | None = None,
) -> Draw:
    """Draw exactly `shots` units per class; the same arguments give the same draw, in whatever order the pool comes.

    Single-label: every class gets exactly `shots` images, from as many different groups as there are. With `per="group"`:
    exactly `shots` groups, each with its images of that class. A draw with more shots contains the draws with fewer shots
    of the same seed and number.

    Multi-label: units are added class by class, rarest first, until each class has at least `shots` of them; a class
    that the others have already filled gets none of its own, so common labels may exceed `shots`. Every class that can reach
    `shots` does.

    Whatever belongs to a drawn group and was not taken is left out of both parts.

    Args:
        pool: a labelled set; never the test set.
        shots: units per class, from 1.
        draw: number of the draw, from 1; draws of one seed are independent of each other.
        seed: of the whole series of draws.
        per: what one shot is; an image without a group is a group of one.
        validation_shots: keep at most this many units per class for validation; None keeps all that is left.
        allow_fewer: take what there is where a class has fewer than `shots`; None allows it in multi-label sets alone.

    Raises:
        InputError: `shots` or `draw` below 1.
        DataError: the pool has no labels, or classes with too few units (all of them are named).

    Examples:
        >>> from medlore.data.images.reading import from_arrays
        >>> pool = from_arrays(np.zeros((6, 4, 4), np.uint8), [0, 0, 0, 1, 1, 1], classes=("a", "b"), name="toy")
        >>> drawn = draw_shots(pool, shots=2)
        >>> sorted(drawn.train.targets().tolist()), len(drawn.validation)
        ([0, 0, 1, 1], 2)
    """
    for name, value in (("shots", shots), ("draw", draw)):
        if value < 1:
            raise InputError(name, f"got {value}", "a whole number from 1", f"give {name}=1 or more")
    if not pool.labelled:
        raise DataError(pool.source, "images without labels in the pool", "a labelled pool", "name the labelled list")
    drawer = _Drawer(pool, shots, np.random.SeedSequence([seed, draw]), per)
    fewer = pool.task == "multi" if allow_fewer is None else allow_fewer
    notes = drawer.shortage(allowed=fewer)
    chosen = drawer.single() if pool.task == "single" else drawer.multi()
    left, dropped = drawer.rest(chosen)
    if dropped:
        notes.append(f"{dropped} images of drawn groups are in neither part")
    if validation_shots is not None:
        left = drawer.limited(left, validation_shots)
    train = pool.subset(sorted(chosen, key=lambda i: pool.items[i].key), name=f"{pool.name} {shots}-shot draw {draw}")
    validation = pool.subset(left, name=f"{pool.name} validation of draw {draw}")
    return Draw(train, validation, (*notes, *_about(train, validation, shots)))


class _Drawer:
    """The units of a pool by class, in a seeded order that does not depend on the pool's order."""

    def __init__(self, pool: ImageSet, shots: int, seeds: np.random.SeedSequence, per: Literal["group", "image"]) -> None:
        self.pool, self.shots, self.per = pool, shots, per
        self.group = [_group_of(item) for item in pool.items]
        self.unit = self.group if per == "group" else [f"image {item.key}" for item in pool.items]
        self.random = [np.random.default_rng(child) for child in seeds.spawn(len(pool.classes) + 1)]
        self.members: list[dict[str, list[int]]] = [defaultdict(list) for _ in pool.classes]  # class -> unit -> images
        for i in sorted(range(len(pool)), key=lambda i: pool.items[i].key):
            for c in pool.present(pool.items[i]):
                self.members[c][self.unit[i]].append(i)

    def order(self, c: int) -> list[str]:
        units = list(self.members[c])  # in the order of the keys, whatever the pool's
        return [units[i] for i in self.random[c].permutation(len(units))]

    def shortage(self, *, allowed: bool) -> list[str]:
        short = [
            f"{name}: {len(self.members[c])} of {self.shots}"
            for c, name in enumerate(self.pool.classes)
            if len(self.members[c]) < self.shots
        ]
        unit = "patients or studies" if self.per == "group" and any(i.group for i in self.pool.items) else "images"
        if short and not allowed:
            raise DataError(
                f"{self.shots} shots from {self.pool.source}",
                f"{len(short)} classes have fewer {unit}",
                f"at least {self.shots} {unit} in every class",
                "use fewer shots, merge or drop these classes, or allow fewer",
                faults=short,
            )
        return [f"fewer {unit} than asked for: {'; '.join(short)}"] if short else []

    def single(self) -> list[int]:
        chosen: set[int] = set()
        for c in range(len(self.pool.classes)):
            order = self.order(c)
            if self.per == "image":
                order = self._spread(c, order)
            for unit in order[: self.shots]:
                chosen.update(self.members[c][unit])
        return list(chosen)

    def _spread(self, c: int, order: list[str]) -> list[str]:
        """Images of groups not yet seen first, so that k images come from as many patients as there are."""
        seen: Counter[str] = Counter()
        rounds = []
        for unit in order:
            group = self.group[self.members[c][unit][0]]
            rounds.append(seen[group])
            seen[group] += 1
        return [order[i] for i in np.argsort(rounds, kind="stable")]

    def multi(self) -> list[int]:
        taken: set[str] = set()
        have = [0] * len(self.pool.classes)
        images: dict[str, set[int]] = defaultdict(set)
        labels: dict[str, list[int]] = defaultdict(list)
        for c, members in enumerate(self.members):
            for unit, found in members.items():
                images[unit].update(found)
                labels[unit].append(c)
        if self.per == "group":  # a drawn patient comes whole, images without any label included
            for i, unit in enumerate(self.unit):
                images[unit].add(i)
        for c in sorted(range(len(have)), key=lambda c: (len(self.members[c]), c)):
            free = [unit for unit in self.order(c) if unit not in taken]
            while have[c] < self.shots and free:
                # Among the free units, one that adds least to classes already full; the seeded order breaks ties.
                excess = [sum(have[other] >= self.shots for other in labels[unit]) for unit in free]
                unit = free.pop(int(np.argmin(excess)))
                taken.add(unit)
                for other in labels[unit]:
                    have[other] += 1
        return sorted({i for unit in taken for i in images[unit]})

    def rest(self, chosen: Sequence[int]) -> tuple[list[int], int]:
        """Images outside the drawn groups, and how many belong to them and were not taken."""
        drawn = set(chosen)
        groups = {self.group[i] for i in drawn}
        left = [i for i in range(len(self.pool)) if self.group[i] not in groups]
        return left, len(self.pool) - len(left) - len(drawn)

    def limited(self, left: Sequence[int], shots: int) -> list[int]:
        """At most `shots` units per class of what is left; images without any label are kept out."""
        kept: set[int] = set()
        allowed = set(left)
        for members in self.members:
            units = sorted(unit for unit, found in members.items() if allowed.intersection(found))
            for k in self.random[-1].permutation(len(units))[:shots]:
                kept.update(allowed.intersection(members[units[k]]))
        return sorted(kept)


def _group_of(item: ImageItem) -> str:
    """The group, or the image itself as a group of one."""
    return f"image {item.key}" if item.group is None else f"group {item.group}"


def _about(train: ImageSet, validation: ImageSet, shots: int) -> list[str]:
    notes = []
    above = [f"{name} {count}" for name, count in train.counts().items() if count > shots]
    if above:
        notes.append(f"images per class above {shots}: {', '.join(above)}")
    absent = [name for name, count in validation.counts().items() if count == 0]
    if absent:
        notes.append(f"no validation image of: {', '.join(absent)}")
    return notes


def read_official_draw(
    folder: str | Path,
    dataset: str,
    shots: int,
    exp: int,
    *,
    images: str | Path | None = None,
    shared_groups: Literal["remove", "keep"] = "remove",
) -> Draw:
    """Read one published few-shot draw of MedFMC or VTAB-1k, and take out what would leak.

    MedFMC: `{dataset}_{shots}-shot_{train|val}_exp{exp}.txt`. In the published files the validation list of chest and
    endo holds most of the training images, and training lists name images again that were picked for several classes;
    colon shares slides between the two. VTAB-1k: `few_shot_exps/train_{shots}-shot_exp{exp}.txt`; validation is `val200.txt`,
    never the test list.

    Args:
        folder: the folder of the data set with its lists.
        dataset: `chest`, `colon`, `endo`, or a VTAB-1k task.
        shots: 1, 5 or 10 in MedFMC.
        exp: number of the draw, 1 to 5.
        images: the folder of the images, where it lies elsewhere.
        shared_groups: what to do with validation images whose patient or slide is also trained on.

    Returns:
        The draw; its notes say how many lines were doubled and how many images were removed.

    Raises:
        UnknownNameError: no such data set or list.
        DataError: faults in the lists; nothing left for validation.
    """
    if dataset not in (*MEDFMC_CLASSES, *VTAB_CLASSES):
        raise UnknownNameError("dataset", dataset, (*MEDFMC_CLASSES, *VTAB_CLASSES))
    kind: Published = "vtab" if dataset in VTAB_CLASSES else f"medfmc-{dataset}"  # type: ignore[assignment]
    root = Path(folder)
    root = root / dataset if (root / dataset).is_dir() else root
    names = (f"{dataset}_{shots}-shot_train_exp{exp}", f"{dataset}_{shots}-shot_val_exp{exp}")
    if kind == "vtab":
        names = (f"train_{shots}-shot_exp{exp}", "val200")
    place = None if images is None else Path(images)
    train, validation = (read_published(root, kind, split=name, images=place) for name in names)
    return _without_overlap(train, validation, shared_groups=shared_groups)


def _without_overlap(train: ImageSet, validation: ImageSet, *, shared_groups: Literal["remove", "keep"]) -> Draw:
    notes = [f"{part.name}: {len(part.notes)} lines name an image again (the first counts)" for part in (train, validation) if part.notes]
    drawn = set(train.keys)
    left = [i for i, item in enumerate(validation.items) if item.key not in drawn]
    if len(left) < len(validation):
        shared = len(validation) - len(left)
        notes.append(f"{shared} of {len(drawn)} training images were also in the validation list; removed from it")
    groups = {item.group for item in train.items if item.group is not None}
    apart = [i for i in left if validation.items[i].group not in groups]
    if len(apart) < len(left):
        done = "removed" if shared_groups == "remove" else "kept, as asked: the validation score will flatter"
        notes.append(f"{len(left) - len(apart)} validation images share a patient or study with training; {done}")
    kept = apart if shared_groups == "remove" else left
    if not kept:
        raise DataError(
            validation.source, "nothing is left that is not trained on", "validation images of other patients", "use another draw"
        )
    return Draw(train, validation.subset(kept), tuple(notes))
