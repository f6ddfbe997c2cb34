"""What can be asked for: labels, their synonyms, and the region whose expert answers, for each modality."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.assets import asset_path
from medlore.errors import DataError, InputError, UnknownNameError, nearest_names
from medlore.files import read_json
from medlore.models.segmenter.spellings import folded, side_of

SCHEMA = "medlore/vocabulary/1"

# In the order of the published experts.
REGIONS = ("abdomen", "brain", "head and neck", "lower limb", "pelvis", "spine", "thorax", "upper limb")
# Labels that no region's expert was trained for; the shared base answers them.
WHOLE_BODY = "whole body"

MODALITIES = ("ct", "mri", "us", "pet")
_MODALITY_WORDS = {
    "ct": {"ct", "cta", "cect", "ncct", "cbct", "computed tomography"},
    "mri": {
        "mri",
        "mr",
        "t1",
        "t2",
        "t1w",
        "t2w",
        "t1c",
        "t1ce",
        "t1gd",
        "pd",
        "pdw",
        "flair",
        "dwi",
        "adc",
        "swi",
        "bssfp",
        "lge",
        "cine",
    },
    "us": {"us", "ultrasound", "sonography"},
    "pet": {"pet", "pt", "suv", "fdg-pet"},
}


def canonical_modality(word: str) -> str:
    """`ct`, `mri`, `us` or `pet` for any usual name of a modality or MR sequence.

    `pet/ct` is refused: it names two volumes.

    Raises:
        UnknownNameError: none of them.

    Examples:
        >>> canonical_modality("T1ce"), canonical_modality("PT")
        ('mri', 'pet')
    """
    plain = word.strip().lower()
    for modality, words in _MODALITY_WORDS.items():
        if plain in words or (plain.split("_")[0].split("-")[0].split(" ")[0] in words and "/" not in plain):
            return modality
    raise UnknownNameError("modality", word, sorted(set().union(*_MODALITY_WORDS.values())), "name the modality of this one volume")


@dataclass(frozen=True)
class Entry:
    """One label in one modality.

    Attributes:
        label: the prompt, in the spelling that the text encoder is given.
        modality: ct, mri, us or pet.
        region: whose expert answers; `whole body` means the shared base.
        synonyms: other words for it.
        modalities: in which modalities the label is known.
        published: whether the pair is in the published list of LoRKD's training labels.
        known: False for a label that was let through with `allow_unknown`.
    """

    label: str
    modality: str
    region: str
    synonyms: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    published: bool = False
    known: bool = True

    @property
    def key(self) -> str:
        """`modality/label`, the name of a prompt's embedding."""
        return f"{self.modality}/{self.label}"


class Vocabulary:
    """Labels by modality, with synonyms and regions.

    Args:
        labels: label -> {"regions": {modality: region}, "synonyms": [...], "published": [modality, ...]}.
        datasets: published data-set name -> region, as LoRKD chose its expert.
        translations: label without its side -> language -> names.

    Examples:
        >>> words = default_vocabulary()
        >>> words.lookup("Kidney_left", "ct").label
        'left kidney'
        >>> words.route(["liver", "heart", "spleen"], "ct")
        {'abdomen': ['liver', 'spleen'], 'thorax': ['heart']}
    """

    def __init__(
        self,
        labels: Mapping[str, Mapping[str, Any]],
        datasets: Mapping[str, str] | None = None,
        translations: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    ) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._labels: dict[str, str] = {}  # any spelling -> label
        self.datasets = dict(datasets or {})
        self.translations = {label: tuple(itertools.chain(*names.values())) for label, names in (translations or {}).items()}
        for label, facts in labels.items():
            where, synonyms = facts["regions"], tuple(facts.get("synonyms", ()))
            for modality, region in where.items():
                published = modality in facts.get("published", ())
                self._entries[label, modality] = Entry(label, modality, region, synonyms, tuple(where), published)
            self._labels[_spelling(label)] = label
        for entry in self._entries.values():
            for synonym in entry.synonyms:
                self._labels.setdefault(_spelling(synonym), entry.label)

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """A vocabulary file.

        Raises:
            InputError: no such file.
            DataError: not a vocabulary; every fault is named.
        """
        content = read_json(path)
        faults = _file_faults(content)
        if faults:
            raise DataError(str(path), f"{len(faults)} fault(s)", f"a file of schema {SCHEMA}", "correct what is listed", faults=faults)
        return cls(content["labels"], content.get("datasets", {}), content.get("translations", {}))

    def entries(self, *, modality: str | None = None, region: str | None = None) -> list[Entry]:
        """All pairs of label and modality, or those of one modality, region, or both; sorted by region and label.

        Raises:
            UnknownNameError: no such modality or region.
        """
        wanted = canonical_modality(modality) if modality is not None else None
        if region is not None:
            region = self.checked_region(region)
        chosen = (e for e in self._entries.values() if wanted in (None, e.modality) and region in (None, e.region))
        return sorted(chosen, key=lambda e: (e.region, _natural(e.label), e.modality))

    def checked_region(self, region: str) -> str:
        """The region, spelt as here (`lower_limb` and `Lower limb` are `lower limb`).

        Raises:
            UnknownNameError: no such region.
        """
        plain = _spelling(region)
        if plain not in (*REGIONS, WHOLE_BODY):
            raise UnknownNameError("region", region, (*REGIONS, WHOLE_BODY))
        return plain

    def label_of(self, name: str) -> str | None:
        """The label that a name means in any modality: a label, a synonym, a plural, another spelling or language; None for none."""
        return self._labels.get(_spelling(name)) or self._folded.get(folded(name))

    @functools.cached_property
    def _folded(self) -> dict[str, str]:
        """Form for comparison -> label; what could mean two labels means none."""
        found: dict[str, set[str]] = {}
        for spelling, label in self._labels.items():
            found.setdefault(folded(spelling), set()).add(label)
        for label in dict.fromkeys(self._labels.values()):
            side, bare = side_of(label)
            for name in self.translations.get(bare, ()):
                found.setdefault(folded(name if side is None else f"{side} {name}"), set()).add(label)
        own = {folded(label): label for label in self._labels.values()}
        return {form: own.get(form) or next(iter(labels)) for form, labels in found.items() if form in own or len(labels) == 1}

    def lookup(
        self, label: str, modality: str, *, allow_unknown: bool = False, among: Collection[str] | None = None, suggest: bool = True
    ) -> Entry:
        """The entry of a label, synonym, plural, or name in another spelling or language.

        Args:
            label: any spelling: `left kidney`, `Kidney_left`, a synonym.
            modality: any usual name.
            allow_unknown: let a label through that is unknown, or of another modality. It is answered by the expert of the
                label's region in another modality, or by the shared base.
            among: labels that can be answered, of which the nearest are named; all of the modality unless given.
            suggest: whether the nearest are looked for.

        Raises:
            UnknownNameError: unknown in this modality; the nearest three are named.
        """
        modality = canonical_modality(modality)
        name = self.label_of(label)
        entry = self._entries.get((name, modality)) if name is not None else None
        if entry is not None:
            return entry
        others = [e for e in self._entries.values() if e.label == name]
        if allow_unknown:
            region = others[0].region if others else WHOLE_BODY
            return Entry(name or _spelling(label), modality, region, modalities=tuple(e.modality for e in others), known=False)
        raise self._unknown(label, modality, others, among, suggest=suggest)

    def route(self, labels: Sequence[str], modality: str, *, allow_unknown: bool = False) -> dict[str, list[str]]:
        """Region -> labels in their own spelling, both in the order in which they were asked for; repeated labels count once.

        Raises:
            InputError: some labels are unknown in this modality; all of them are listed, each with the nearest three.
        """
        routes: dict[str, list[str]] = {}
        for entry in self.lookup_all(labels, modality, allow_unknown=allow_unknown):
            routes.setdefault(entry.region, []).append(entry.label)
        return routes

    def lookup_all(
        self, labels: Sequence[str], modality: str, *, allow_unknown: bool = False, among: Collection[str] | None = None
    ) -> list[Entry]:
        """Entries of many labels, without repetition.

        Args:
            labels: in any spelling.
            modality: any usual name.
            allow_unknown: as in `lookup`.
            among: as in `lookup`.

        Raises:
            InputError: some labels are unknown in this modality; all of them are listed, each with the nearest three.
        """
        modality = canonical_modality(modality)
        found: dict[str, Entry] = {}
        faults: list[str] = []
        for label in labels:
            try:
                suggest = len(faults) < InputError.shown_faults  # the others are counted, not shown
                entry = self.lookup(label, modality, allow_unknown=allow_unknown, among=among, suggest=suggest)
                found.setdefault(entry.label, entry)
            except UnknownNameError as error:
                faults.append(f"{error.came}; {error.accepted}")
        if faults:
            raise InputError(
                "labels",
                f"{len(faults)} of {len(labels)} unknown in {modality}",
                f"labels of the vocabulary (`medlore info --labels --modality {modality}`)",
                "correct them (names are English), or force them with --allow-unknown",
                faults=faults,
            )
        return list(found.values())

    def region_of_dataset(self, dataset: str) -> str:
        """Region that LoRKD gives to a data set: by its plain name, or by the suffix of `NAME_region`.

        Raises:
            UnknownNameError: neither.

        Examples:
            >>> default_vocabulary().region_of_dataset("AMOS22_CT_abdomen"), default_vocabulary().region_of_dataset("SKI10")
            ('abdomen', 'lower limb')
        """
        if dataset in self.datasets:
            return self.datasets[dataset]
        for region in REGIONS:
            if _spelling(dataset).endswith(" " + region):
                return region
        raise UnknownNameError("dataset", dataset, self.datasets, "leave `dataset` out, so that each label chooses its own expert")

    def _unknown(self, label: str, modality: str, others: list[Entry], among: Collection[str] | None, *, suggest: bool) -> UnknownNameError:
        error = UnknownNameError("label", label, ())
        error.accepted = f"labels of {modality}"
        if suggest:
            known = sorted({e.label for e in self._entries.values() if e.modality == modality} if among is None else among)
            near = ", ".join(map(repr, self._nearest(label, modality, known)))
            error.accepted = f"{len(known)} labels of {modality}; the nearest are {near}" if known else f"no label of {modality} is known"
        if others:
            error.came = f"label {label!r} is known in {' and '.join(e.modality for e in others)} only, not in {modality}"
        error.fix = "use one of them (names are English; `medlore info --labels` lists them), or force it with --allow-unknown"
        return UnknownNameError.at(error, "vocabulary")  # type: ignore[return-value]

    def _nearest(self, label: str, modality: str, known: Collection[str]) -> list[str]:
        """The three nearest of the known labels; a synonym counts for its label when it is nearly what was asked."""
        there = set(known)
        spellings = {s: name for s, name in self._labels.items() if (name, modality) in self._entries and name in there}
        spellings |= {_spelling(name): name for name in there}
        plain = _spelling(label)
        close = difflib.get_close_matches(plain, spellings, n=3, cutoff=0.8)
        ranked = [*close, *nearest_names(plain, {_spelling(name) for name in spellings.values()}, 3)]
        return list(dict.fromkeys(spellings[spelling] for spelling in ranked))[:3]


@functools.cache
def default_vocabulary() -> Vocabulary:
    """The shipped vocabulary."""
    return Vocabulary.read(asset_path("vocabulary.json"))


def _spelling(label: str) -> str:
    """Lower case, single spaces for underscores and hyphens that join words, and the side in front."""
    plain = re.sub(r"[\s_]+", " ", label.strip().lower())
    side = re.fullmatch(r"(.+?),? (left|right)( \d+)?", plain)  # `kidney left`, `rib right 4`
    return f"{side[2]} {side[1]}{side[3] or ''}" if side else plain


def _natural(label: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label))


def _file_faults(content: Any) -> list[str]:
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA or not isinstance(content.get("labels"), Mapping):
        return [f"no `schema: {SCHEMA}` or no `labels`"]
    faults = []
    regions = {*REGIONS, WHOLE_BODY}
    for label, facts in content["labels"].items():
        where = facts.get("regions") if isinstance(facts, Mapping) else None
        if not isinstance(where, Mapping) or not where:
            faults.append(f"{label}: no regions")
        elif set(where) - set(MODALITIES) or set(where.values()) - regions:
            faults.append(f"{label}: {dict(where)} is not a mapping of {MODALITIES} to regions")
    faults.extend(
        f"data set {name}: unknown region {region!r}" for name, region in content.get("datasets", {}).items() if region not in regions
    )
    return faults
