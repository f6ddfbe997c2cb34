"""The data of a segmentation study: cached cases by part, their labels, prompts and regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.cases import Case, read_cases
from medlore.data.volumes.training_cache import CachedCase, build_cache
from medlore.decomposing.segmenters.settings import SegmentationSettings
from medlore.errors import DataError, InputError
from medlore.models.segmenter.vocabulary import WHOLE_BODY, default_vocabulary

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prompt:
    """One question that the network can be asked.

    Attributes:
        key: `modality/label` in the vocabulary's spelling.
        row: in the table of prompts.
        region: whose expert answers.
    """

    key: str
    row: int
    region: str


@dataclass(frozen=True, eq=False)
class Cohort:
    """All cases of a study.

    Attributes:
        parts: train, validation, test -> list name -> cases.
        prompts: (modality, label as the case writes it) -> prompt.
        weights: list name -> how often it is drawn from.
        faults: cases that were skipped, and why.
    """

    parts: Mapping[str, Mapping[str, Sequence[CachedCase]]]
    prompts: Mapping[tuple[str, str], Prompt]
    weights: Mapping[str, float]
    faults: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Prompts in the order of their rows."""
        return tuple(dict.fromkeys(p.key for p in sorted(self.prompts.values(), key=lambda p: p.row)))

    @property
    def regions(self) -> tuple[str, ...]:
        """Regions that need an expert, in alphabetical order."""
        return tuple(sorted({p.region for p in self.prompts.values()} - {WHOLE_BODY}))

    def labels_of(self, case: CachedCase, region: str | None = None, *, absent: bool = False) -> list[str]:
        """Labels that a case annotates, of one region or of all; with `absent` those that it is known not to show, too."""
        return [label for label in self._known(case, absent=absent) if region in (None, self.prompts[case.modality, label].region)]

    def regions_of(self, case: CachedCase, *, absent: bool = False) -> list[str]:
        """Regions of a case's labels, in the order of its labels."""
        return list(dict.fromkeys(self.prompts[case.modality, label].region for label in self._known(case, absent=absent)))

    def _known(self, case: CachedCase, *, absent: bool) -> list[str]:
        labels = (*case.labels, *case.absent) if absent else case.labels
        return [label for label in labels if (case.modality, label) in self.prompts]

    def cases(self, part: str) -> list[tuple[str, CachedCase]]:
        """(list name, case) of one part."""
        return [(name, case) for name, cases in self.parts[part].items() for case in cases]

    def label_regions(self) -> dict[str, str]:
        """`modality/label` -> region where the vocabulary says nothing or something else: what a pack has to carry."""
        known = {entry.key: entry.region for entry in default_vocabulary().entries()}
        return {p.key: p.region for p in self.prompts.values() if known.get(p.key) != p.region}

    def only(self, region: str) -> Cohort:
        """The cases and labels of one region; rows stay as they are."""
        parts = {
            part: {name: tuple(kept for c in cases if (kept := self._part_of(c, region)) is not None) for name, cases in lists.items()}
            for part, lists in self.parts.items()
        }
        return replace(self, parts=parts)

    def _part_of(self, case: CachedCase, region: str) -> CachedCase | None:
        labels = tuple(self.labels_of(case, region))
        absent = tuple(label for label in case.absent if label in self.labels_of(case, region, absent=True))
        return replace(case, labels=labels, absent=absent) if labels else None

    def fingerprint(self) -> list[Any]:
        """What the training data are: weight of the list, keys of the cached files and labels of every training case."""
        return [[self.weights[name], case.key, list(case.labels), list(case.absent)] for name, case in self.cases("train")]


def read_cohort(settings: SegmentationSettings, *, folder: Path, cache: Path, say: Callable[[str], None] = lambda _text: None) -> Cohort:
    """Read, cache and split the cases of a study.

    Args:
        settings: of the study.
        folder: of the study file; its paths are relative to it.
        cache: folder of the cache.
        say: hears of every case that is skipped, and of labels that are annotated without a voxel.

    Raises:
        DataError: a list that cannot be read, labels without a region, or a study without any training case.
    """
    listed: dict[str, Sequence[CachedCase]] = {}
    faults: list[str] = []
    for entry in settings.data:
        cases = with_split(read_cases(folder / entry.cases), entry.held_out, settings.seed)
        report = build_cache(cases, cache, settings.full_preprocessing)
        listed[entry.name] = report.cases
        faults += [f"{entry.name}: {fault}" for fault in report.faults]
    prompts = _prompts((case for cases in listed.values() for case in cases), settings)
    parts: dict[str, dict[str, Sequence[CachedCase]]] = {part: {} for part in PARTS}
    for entry in settings.data:
        for part in PARTS:
            parts[part][entry.name] = [case for case in listed[entry.name] if case.split == part]
    cohort = Cohort(parts, prompts, {entry.name: entry.weight for entry in settings.data}, tuple(faults))
    if not cohort.cases("train"):
        raise DataError("data", "no training case", "at least one case that can be read", "see what was skipped", faults=faults)
    for fault in faults:
        say(f"skipped: {fault}")
    for name, cached in listed.items():
        for note in labels_without_voxels(cached):
            say(f"{name}: {note}")
    return cohort


def labels_without_voxels(cases: Sequence[CachedCase]) -> list[str]:
    """Labels that cases annotate without a voxel, one line each: they train as negative examples, which may be meant or a mistake."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for label in case.labels:
            if label not in case.present:
                found.setdefault(label, []).append(case.name)
    annotated = Counter(label for case in cases for label in case.labels)
    return [
        f"{label} is annotated without a voxel in {len(names)} of {annotated[label]} cases, which count as negative examples: "
        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for label, names in sorted(found.items())
    ]


def _prompts(cases: Iterable[CachedCase], settings: SegmentationSettings) -> dict[tuple[str, str], Prompt]:
    words, own = default_vocabulary(), {key.casefold(): (key, region) for key, region in settings.regions.items()}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    faults: list[str] = []
    wanted = dict.fromkeys((case.modality, label) for case in cases for label in case.labels)
    for modality, label in wanted:
        if (key := f"{modality}/{label}".casefold()) in own:
            found[modality, label] = own[key]
            continue
        try:
            entry = words.lookup(label, modality)
            found[modality, label] = (entry.key, entry.region)
        except InputError as error:
            faults.append(f"{modality}/{label}: {error.came}; {error.accepted}")
    if faults:
        fix = "use the vocabulary's spelling, or name the region of each in the study's `regions`"
        raise DataError("labels", f"{len(faults)} without a region", "labels of the vocabulary", fix, faults=faults)
    rows = {key: row for row, key in enumerate(sorted({key for key, _ in found.values()}))}
    return {pair: Prompt(key, rows[key], region) for pair, (key, region) in found.items()}


def with_split(cases: Sequence[Case], held_out: float, seed: int) -> list[Case]:
    """The cases with a `split` each; where a line does not say it, that of the patient's other lines, else by patient and seeded.

    Args:
        cases: of one list.
        held_out: share of the patients for the test, and again for validation.
        seed: of the shuffle.
    """
    said: dict[str, str] = {}
    for part in PARTS:  # a patient with lines in several is kept out of the training
        said |= {_patient(case): part for case in cases if case.other.get("split") == part}
    free = sorted({_patient(case) for case in cases if "split" not in case.other} - said.keys())
    held = round(held_out * len(free))
    order = [free[i] for i in np.random.default_rng([seed, len(free)]).permutation(len(free))]
    part_of = said | {p: "test" if i < held else "validation" if i < 2 * held else "train" for i, p in enumerate(order)}
    return [c if "split" in c.other else replace(c, other={**c.other, "split": part_of[_patient(c)]}) for c in cases]


def _patient(case: Case) -> str:
    return str(case.other.get("patient", case.image))


def check_experts_have_cases(cohort: Cohort, regions: Iterable[str]) -> None:
    """Refuse an expert without a training case of its region.

    Raises:
        DataError: such a region; the others are named.
    """
    there = {region for _, case in cohort.cases("train") for region in cohort.regions_of(case)}
    missing = [region for region in regions if region not in there]
    if missing:
        fix = "add cases with labels of that region, or leave its expert out"
        raise DataError("data", f"no training case for {', '.join(missing)}", f"cases of each expert; there are {sorted(there)}", fix)
