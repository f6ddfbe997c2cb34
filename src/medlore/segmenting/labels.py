"""From what was asked for to what is run: labels, their experts, and the facts of a model that this needs (no torch)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlore.assets import PREFIX, asset_path
from medlore.errors import InputError, UnknownNameError
from medlore.files import read_json
from medlore.models.pack_names import BASE, MANIFEST
from medlore.models.segmenter.encoders import UNET
from medlore.models.segmenter.spellings import folded
from medlore.models.segmenter.vocabulary import REGIONS, WHOLE_BODY, Vocabulary, canonical_modality, default_vocabulary
from medlore.segmenting.expectations import Expectations
from medlore.segmenting.plan import NetworkSize

if TYPE_CHECKING:
    from medlore.models.segmenter.bundle import SegmenterBundle

EVERYTHING = "all"
REGION_PREFIX = "region:"  # `region:brain` is all labels of the brain, `brain` is the brain itself


@dataclass(frozen=True)
class ModelFacts:
    """What routing and planning need to know of a model.

    Args:
        name: for people.
        experts: regions that have an expert of their own.
        region: the region of a merged expert; None for a model of all regions.
        size: for the memory plan.
        preprocessing: constants of the training.
        prompts: keys `modality/label` of the stored embeddings; None where a text encoder answers anything.
        label_regions: `modality/label` -> region, for labels that the vocabulary does not know.
        patch: a window's sides are multiples of it.
    """

    name: str
    experts: tuple[str, ...]
    region: str | None
    size: NetworkSize
    preprocessing: Mapping[str, Any]
    prompts: frozenset[str] | None
    label_regions: Mapping[str, str] = field(default_factory=dict)
    patch: int = 1


def facts_of_bundle(bundle: SegmenterBundle) -> ModelFacts:
    """The facts of a loaded model."""
    weights = bundle.weights
    adapted = {target for expert in weights.experts.values() for target in expert.pairs}
    merged = sum(weights.base[f"{target}.weight"].numel() for target in adapted)
    parameters = sum(t.numel() for t in weights.base.values())
    size = NetworkSize(bundle.config.features[0], parameters, merged, bundle.config.encoder)
    keys = None if bundle.text is not None or bundle.prompts is None else frozenset(bundle.prompts.keys)
    own = bundle.preprocessing.get("label_regions", {})
    return ModelFacts(bundle.name, tuple(weights.experts), bundle.region, size, bundle.preprocessing, keys, own, bundle.config.patch)


def facts_of_pack(path: str | Path) -> ModelFacts | None:
    """The facts of a pack from its manifest alone; None where `path` is no pack of a segmenter, or one that only a full load can judge."""
    path = asset_path(str(path)) if str(path).startswith(PREFIX) else Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return None
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("kind") != "segmenter":
        return None
    try:
        return _facts_of_manifest(manifest, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # the loader names what is wrong with it
        return None


def _facts_of_manifest(manifest: Mapping[str, Any], folder: Path) -> ModelFacts:
    prompts, sizes, rules = manifest.get("prompts"), manifest["config"], manifest["preprocessing"]
    keys = None if prompts is None else frozenset(prompts["keys"])
    counts = _counts_of(folder / BASE)
    adapted = {target for expert in manifest["experts"].values() for target in expert["scaling"]}
    merged = sum(counts[f"{target}.weight"] for target in adapted)
    size = NetworkSize(sizes["features"][0], sum(counts.values()), merged, sizes.get("encoder", UNET))
    own, patch = rules.get("label_regions", {}), int(sizes.get("patch", 32))
    return ModelFacts(manifest["name"], tuple(manifest["experts"]), manifest.get("region"), size, rules, keys, own, patch)


def _counts_of(file: Path) -> dict[str, int]:
    """Number of values of each tensor, from the header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Routes:
    """Who answers for what.

    Args:
        modality: ct, mri, us or pet.
        labels: in the order of the label map's values.
        by_region: region -> labels; the key `None`'s place is taken by `whole body` (the shared base).
    """

    modality: str
    labels: tuple[str, ...]
    by_region: dict[str, list[str]]


def route_labels(
    facts: ModelFacts,
    labels: Sequence[str],
    modality: str,
    *,
    region: str | None = None,
    dataset: str | None = None,
    allow_unknown: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Routes:
    """Choose the expert of every label.

    Args:
        facts: of the model.
        labels: names or synonyms, `region:NAME` (or NAME where no label has that name) for a region's labels, or `all`.
        modality: any usual word.
        region: this expert answers for all labels.
        dataset: a published data set's name that chooses one expert, as LoRKD does.
        allow_unknown: let labels through that the vocabulary does not know.
        vocabulary: the shipped one unless given.

    Raises:
        InputError: a label that is unknown, belongs to another modality, or has no expert in this model.
    """
    words = vocabulary or default_vocabulary()
    modality = canonical_modality(modality)
    names = _expand(facts, labels, modality, words)
    regions = _regions_of(facts, names, modality, words, allow_unknown=allow_unknown)
    if region is not None or dataset is not None:
        chosen = words.checked_region(region) if region is not None and region not in facts.experts else region
        chosen = chosen or words.region_of_dataset(str(dataset))
        regions = dict.fromkeys(regions, chosen)
    _check_experts(facts, regions)
    _check_prompts(facts, list(regions), modality)
    by_region: dict[str, list[str]] = {}
    for label, its_region in regions.items():
        key = its_region if facts.experts else (facts.region or "all regions")
        by_region.setdefault(key, []).append(label)
    return Routes(modality, tuple(regions), by_region)


def known_labels(pack: str | None, modality: str | None) -> list[str]:
    """Labels that a pack has prompts for, of one modality or of all, and `all`; of the vocabulary where no pack is named that says it.

    Example:
        >>> "hippocampus" in known_labels("medlore:seg-mini", "t1"), "left_lung" in known_labels(None, "ct")
        (True, False)
    """
    try:
        facts = None if pack is None else facts_of_pack(pack)
        wanted = None if modality is None else canonical_modality(modality)
    except InputError:  # half a name, while it is typed
        facts, wanted = None, None
    keys = [entry.key for entry in default_vocabulary().entries()] if facts is None or facts.prompts is None else sorted(facts.prompts)
    labels = [label for kind, _, label in (key.partition("/") for key in keys) if wanted in (None, kind)]
    return [*dict.fromkeys(labels), EVERYTHING]


def tissues_of(facts: ModelFacts, routes: Routes) -> tuple[str, ...]:
    """The model's tissues of a modality, if one of them is asked for and all of them have a prompt; else none."""
    tissues = tuple(facts.preprocessing.get("tissues", {}).get(routes.modality, ()))
    answered = all(facts.prompts is None or f"{routes.modality}/{label}" in facts.prompts for label in tissues)
    return tissues if answered and set(tissues) & set(routes.labels) else ()


def with_tissues(routes: Routes, tissues: Sequence[str]) -> dict[str, list[str]]:
    """What is asked of each expert: the labels of `routes`, and the tissues that are needed beside the one that was asked for."""
    return asked_beside(routes.by_region, tissues, tissues)


def label_around(facts: ModelFacts, routes: Routes, expected: Expectations) -> str | None:
    """The label that the structures of a pack lie inside (the brain), if one of them is asked for and it has a prompt; else None."""
    around = expected.inside
    answered = around is not None and (facts.prompts is None or f"{routes.modality}/{around}" in facts.prompts)
    return around if answered and set(expected.structures) & set(routes.labels) else None


def asked_beside(asked: Mapping[str, Sequence[str]], needed: Sequence[str], near: Collection[str]) -> dict[str, list[str]]:
    """What is asked of each expert: its labels, and those that are needed beside them.

    Args:
        asked: region -> labels.
        needed: labels that have to be there.
        near: the expert that answers for one of these answers for what is missing too.
    """
    there = {label for labels in asked.values() for label in labels}
    missing = [label for label in needed if label not in there]
    place = next((region for region, labels in asked.items() if set(labels) & set(near)), None)
    return {region: [*labels, *(missing if region == place else ())] for region, labels in asked.items()}


def _expand(facts: ModelFacts, labels: Sequence[str], modality: str, words: Vocabulary) -> list[str]:
    """`all` and names of regions become labels that this model has prompts for."""
    known = {e.label for e in words.entries(modality=modality)} | {key.split("/", 1)[1].casefold() for key in facts.label_regions}
    names: list[str] = []
    for label in labels:
        plain = label.strip().casefold()
        whole_region = plain.removeprefix(REGION_PREFIX)
        if plain == EVERYTHING:
            names += _known_labels(facts, modality, words, None)
        elif plain.startswith(REGION_PREFIX) or (plain in {*REGIONS, WHOLE_BODY, *facts.experts} and plain not in known):
            names += _known_labels(facts, modality, words, words.checked_region(whole_region))
        else:
            names.append(label)
    if not names:
        raise InputError("labels", "no label", f"labels of {modality} for which {facts.name} has prompts", "see medlore info --labels")
    return list(dict.fromkeys(names))


def _known_labels(facts: ModelFacts, modality: str, words: Vocabulary, region: str | None) -> list[str]:
    own = [key.split("/", 1)[1] for key, r in facts.label_regions.items() if key.startswith(f"{modality}/") and region in (None, r)]
    shared = [e.label for e in words.entries(modality=modality) if region in (None, e.region)]
    answered = [e for e in dict.fromkeys([*own, *shared]) if facts.prompts is None or f"{modality}/{e}" in facts.prompts]
    if region is None and (facts.experts or facts.region):
        there = {*(facts.experts or (facts.region,)), WHOLE_BODY} if facts.experts else {facts.region}
        places = {e.label: e.region for e in words.entries(modality=modality)}
        answered = [label for label in answered if facts.label_regions.get(f"{modality}/{label}", places.get(label)) in there]
    return answered


def _regions_of(facts: ModelFacts, names: Sequence[str], modality: str, words: Vocabulary, *, allow_unknown: bool) -> dict[str, str]:
    own = {key.casefold(): (key.split("/", 1)[1], region) for key, region in facts.label_regions.items()}
    forms = {folded(key.split("/", 1)[1]): key.casefold() for key in facts.label_regions if key.startswith(f"{modality}/")}

    def own_key(name: str) -> str | None:
        """The model's own label that a name means: as it is, in another spelling, or by the vocabulary's word for it."""
        meant = (f"{modality}/{name}".casefold(), forms.get(folded(name)), f"{modality}/{words.label_of(name) or ''}".casefold())
        return next((key for key in meant if key in own), None)

    found: dict[str, str] = {}
    among = None if facts.prompts is None else {key.split("/", 1)[1] for key in facts.prompts if key.startswith(f"{modality}/")}
    asked = [name for name in names if own_key(name) is None]
    words.lookup_all(asked, modality, allow_unknown=allow_unknown, among=among)  # reports every unknown label at once
    entries = iter([words.lookup(name, modality, allow_unknown=allow_unknown) for name in asked])
    for name in names:
        if (key := own_key(name)) is not None:
            found.setdefault(*own[key])
        else:
            entry = next(entries)
            found.setdefault(entry.label, entry.region)
    return found


def _check_experts(facts: ModelFacts, regions: Mapping[str, str]) -> None:
    there = {*facts.experts, WHOLE_BODY} if facts.experts else {facts.region} if facts.region else None
    missing = {} if there is None else {label: region for label, region in regions.items() if region not in there}
    if missing:
        faults = [f"{label}: needs the expert for {region}" for label, region in missing.items()]
        accepted = f"labels of {', '.join(facts.experts or (str(facts.region),))}"
        fix = "load a model with these experts, or choose one that is there with --region"
        raise InputError("labels", f"{facts.name} has no expert for {len(missing)} of them", accepted, fix, faults=faults)


def _check_prompts(facts: ModelFacts, labels: Sequence[str], modality: str) -> None:
    if facts.prompts is None:
        return
    missing = [label for label in labels if f"{modality}/{label}" not in facts.prompts]
    if missing:
        known = sorted(key.split("/", 1)[1] for key in facts.prompts if key.startswith(f"{modality}/"))
        error = UnknownNameError("labels", missing[0], known)
        accepted = error.accepted if known else f"no prompt of {modality} is stored in {facts.name}"
        fix = "use one of them, or give a text encoder (--text)"
        faults = [f"{label!r} has no stored embedding" for label in missing]
        raise InputError("labels", f"{len(missing)} without a prompt in {facts.name}", accepted, fix, faults=faults)
