"""What is this? A weights file, a pack, a plan, an adapter, a run, a folder of images: each kind has one small describer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medlore.assets import PREFIX, asset_path
from medlore.data.formats import is_volume_name
from medlore.errors import CheckpointError, InputError, UnknownNameError
from medlore.files import existing_path, read_json, sha256_of
from medlore.inspecting.folders import describe_case, describe_network_file, describe_network_folder, describe_run
from medlore.models import packs
from medlore.models.segmenter.bundle import KIND, PROMPTS_FILE, load_segmenter
from medlore.models.segmenter.checkpoints import SegmenterWeights, recognise
from medlore.models.segmenter.network import PUBLISHED_ACTIVATION
from medlore.models.segmenter.vocabulary import Entry, canonical_modality, default_vocabulary
from medlore.models.statefile import State, read_state

Facts = dict[str, Any]
_IMAGE_LISTS = (".zip", ".npz", ".csv", ".tsv", ".txt")
_WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


def describe(path: str | Path, *, lora_alpha: float | None = None) -> Facts:
    """What a file or folder is, ready for JSON; the first describer that knows it speaks.

    Args:
        path: file or folder.
        lora_alpha: alpha of a published file with equal ranks.

    Raises:
        InputError: nothing is there.
        CheckpointError: weights that are broken, foreign in part, or fit only in part.
    """
    path = asset_path(str(path)) if str(path).startswith(PREFIX) else Path(path)
    existing_path(path, "a weights file, a pack, a plan, images")
    for describer in _DESCRIBERS:
        facts = describer(path, lora_alpha)
        if facts is not None:
            return {"path": str(path), **facts}
    raise InputError(str(path), "is of no kind that is known here", "weights, a pack, a plan, an adapter, images", "name another")


def count_faults(facts: Facts) -> int:
    """How many things of a description cannot be used: broken images, missing files, unknown labels, lists with problems."""
    listed = sum(len(facts.get(name) or ()) for name in ("faults", "missing_images", "unknown_labels"))
    lists = facts.get("lists") or {}
    # A published list that one has not fetched is no fault of the folder; a list that is there and cannot be read is one.
    return listed + sum(entry["problem"] not in (None, "not there") for entry in lists.values())


def describe_labels(*, modality: str | None = None, region: str | None = None, pack: str | Path | None = None) -> Facts:
    """Labels of the vocabulary, or those that a pack has prompts for.

    Raises:
        UnknownNameError: no such modality or region.
        InputError: a pack without prompts.
    """
    entries = default_vocabulary().entries(modality=modality, region=region)
    if pack is not None:
        bundle = load_segmenter(pack)
        if bundle.prompts is None:
            raise InputError(str(pack), "has no prompts inside", "a pack that was exported with --text", "export it again")
        known = {e.key: e for e in default_vocabulary().entries()}
        wanted = None if modality is None else canonical_modality(modality)
        region = None if region is None else default_vocabulary().checked_region(region)
        entries = [known.get(key, _stranger(key)) for key in bundle.prompts.keys]
        entries = [e for e in entries if wanted in (None, e.modality) and region in (None, e.region)]
    by_label: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        by_label.setdefault((entry.region, entry.label), []).append(entry)
    rows = [
        {
            "label": label,
            "region": where,
            "modalities": [e.modality for e in group],
            "published": [e.modality for e in group if e.published],
            "synonyms": list(group[0].synonyms),
        }
        for (where, label), group in by_label.items()
    ]
    return {"kind": "labels", "count": len(rows), "pairs_with_modality": len(entries), "labels": rows}


def _describe_pack(path: Path, lora_alpha: float | None) -> Facts | None:
    if not packs.is_pack(path):
        return None
    manifest = packs.read_manifest(path)
    if manifest.get("kind") == KIND:
        return _segmenter_pack(path, manifest, lora_alpha)
    from medlore.models.classifier_pack import read_classifier_manifest

    if lora_alpha is not None:
        raise InputError("--lora-alpha", "given for a pack", "no alpha: a pack knows its scalings", "leave it out")
    return _classifier_pack(path, read_classifier_manifest(path))


def _unread(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """A note on weights in the folder that no reader of the pack looks at."""
    names = packs.strangers(path, manifest)
    return [f"not of this pack, and never read: {', '.join(names)}"] if names else []


def _classifier_pack(path: Path, manifest: Mapping[str, Any]) -> Facts:
    shown = ("name", "parameters", "student", "teacher", "preprocessing", "layout", "weights")
    experts = [_classifier_expert(name, entry) for name, entry in manifest["experts"].items()]
    facts = {"kind": "classifier pack", **{key: manifest.get(key) for key in shown}, "experts": experts, "files": manifest["files"]}
    return facts | {"notes": _unread(path, manifest)}


def _classifier_expert(name: str, entry: Mapping[str, Any]) -> Facts:
    ranks = sorted(set(entry["ranks"].values()))
    lead = next((m for m in ("balanced_accuracy", "macro_auc") if m in entry["metrics"]), None)
    measured = entry["metrics"].get(lead, {}) if lead else {}
    return {
        "expert": name,
        "classes": entry["classes"],
        "labels per image": entry["kind"],
        "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "metric": lead,
        "test": None if measured.get("value") is None else f"{measured['value']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]",
        "licence": entry["licence"],
    }


def _segmenter_pack(path: Path, manifest: Mapping[str, Any], lora_alpha: float | None) -> Facts:
    bundle = load_segmenter(path, lora_alpha=lora_alpha)
    facts = {"kind": "segmenter pack", **_segmenter(bundle.weights, name=bundle.name)}
    prompts = manifest.get("prompts") or {}
    return {
        **facts,
        "prompts": len(prompts.get("keys", ())),
        "text_sha256": prompts.get("text_sha256"),
        "preprocessing": bundle.preprocessing,
        "about": manifest.get("about"),
        "sha256": bundle.sha256,
        "files": manifest["files"],
        "notes": [
            *bundle.notes,
            *_unread(path, manifest),
            *([] if prompts else [f"no {PROMPTS_FILE}: prompts must be given when it is used"]),
        ],
    }


def _describe_weights(path: Path, lora_alpha: float | None) -> Facts | None:
    if not path.is_file() or path.suffix.lower() not in _WEIGHTS:
        return None
    state = read_state(path)
    try:
        kind = recognise(state)
    except CheckpointError as error:
        raise error.at(str(path)) from error
    if kind == "segmenter":
        bundle = load_segmenter(path, lora_alpha=lora_alpha)
        facts = _segmenter(bundle.weights, name=bundle.name)
        return {"kind": "segmenter checkpoint", **facts, "sha256": bundle.sha256, "notes": list(bundle.notes)}
    if kind == "text encoder":
        return _text_encoder(path, state)
    return describe_network_file(path, state)


def _segmenter(weights: SegmenterWeights, *, name: str) -> Facts:
    base = sum(w.numel() for w in weights.base.values())
    deep = sum(w.numel() for n, w in weights.base.items() if n.startswith("mid_mask_embed_proj"))
    config = weights.config
    return {
        "model": name,
        "parameters": weights.parameters(),
        "base_parameters": base,
        "expert_parameters": weights.parameters() - base,
        "training_only_parameters": deep,
        "features": list(config.features),
        "convs_per_stage": config.convs_per_stage,
        "query_width": config.query_width,
        **({"mask_activation": config.mask_activation} if config.mask_activation != PUBLISHED_ACTIVATION else {}),
        "form": weights.form,
        "lora_alpha": weights.lora_alpha,
        "experts": [_expert(weights, region) for region in weights.experts],
    }


def _expert(weights: SegmenterWeights, region: str) -> Facts:
    expert = weights.experts[region]
    ranks = expert.ranks(weights.base)
    decoder = sorted({rank for target, rank in ranks.items() if ".decoder." in target})
    scalings = sorted(set(expert.scaling.values()), reverse=True)
    return {
        "region": region,
        "rank": weights.rank_of(region),
        "decoder_rank": decoder[0] if len(decoder) == 1 else decoder,
        "scaling": scalings[0] if len(scalings) == 1 else scalings,
        "parameters": expert.parameters(),
    }


def _text_encoder(path: Path, state: State) -> Facts:
    from medlore.models.segmenter.text import read_text_encoder

    encoder = read_text_encoder(path)
    return {
        "kind": "text encoder checkpoint",
        "model": "BioLORD (MPNet) with SAT's projection and modality table",
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "tensors": len(state),
        "embedding_width": encoder.width,
        "modalities": ["ct", "mri", "us", "pet"],
        "sha256": encoder.sha256,
    }


def _describe_prompts(path: Path, _: float | None) -> Facts | None:
    from medlore.models.segmenter.prompts import PromptTable, is_prompt_table

    if not is_prompt_table(path):
        return None
    table = PromptTable.read(path)
    counts = {modality: len(table.labels(modality)) for modality in ("ct", "mri", "us", "pet")}
    return {
        "kind": "prompt table",
        "prompts": len(table.keys),
        "by_modality": counts,
        "embedding_width": table.width,
        "text_sha256": table.text_sha256,
        "sha256": sha256_of(path),
    }


def _describe_json(path: Path, _: float | None) -> Facts | None:
    """Plans, reports, vocabularies: whatever carries a schema of ours."""
    if not path.is_file() or path.suffix.lower() != ".json":
        return None
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or not schema.startswith("medlore/"):
        return None
    plain = {k: v for k, v in content.items() if isinstance(v, str | int | float | bool) and k != "schema"}
    sizes = {f"{k}_entries": len(v) for k, v in content.items() if isinstance(v, list | dict)}
    return {"kind": schema, **plain, **sizes}


def _describe_adapter(path: Path, _: float | None) -> Facts | None:
    config = path / "adapter_config.json"
    if not config.is_file():
        return None
    content = read_json(config)
    if not isinstance(content, dict):
        raise CheckpointError(str(config), f"a {type(content).__name__}", "the configuration of a PEFT adapter", "save the adapter again")
    shown = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    facts = {key: content[key] for key in shown if content.get(key) not in (None, {}, [])}
    weights = path / "adapter_model.safetensors"
    total = sum(w.numel() for w in read_state(weights).values()) if weights.is_file() else None
    return {"kind": "PEFT adapter", "parameters": total, **facts}


def _describe_cases(path: Path, _: float | None) -> Facts | None:
    """A jsonl of cases: how many, of what, and what would be refused."""
    if not path.is_file() or path.suffix.lower() != ".jsonl":
        return None
    from medlore.data.volumes.cases import read_cases

    cases = read_cases(path)
    labels = Counter(label for case in cases for label in case.labels)
    regions: Counter[str] = Counter()
    refused = []
    for case in cases:
        for label in case.labels:
            try:
                regions[default_vocabulary().lookup(label, case.modality).region] += 1
            except UnknownNameError as error:
                refused.append(f"line {case.line}: {error.came}")
    return {
        "kind": "cases",
        "cases": len(cases),
        "modalities": dict(Counter(case.modality for case in cases)),
        "labels": dict(labels.most_common()),
        "regions": dict(regions),
        "missing_images": [str(case.image) for case in cases if not case.image.exists()],
        "unknown_labels": refused,
    }


def _describe_volume(path: Path, _: float | None) -> Facts | None:
    """A volume in one file: its grid, its values, and what is odd about it."""
    if not path.is_file() or not is_volume_name(path.name):
        return None
    import nibabel
    import numpy as np

    from medlore.data.volumes.preparation import read_volume

    volume = read_volume(path)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    return {
        "kind": "volume",
        "shape": list(volume.shape),
        "file_shape": list(volume.file_shape),
        "spacing_mm": [round(float(side), 4) for side in spacing],
        "orientation": "".join(nibabel.aff2axcodes(volume.affine)),
        "dtype": str(volume.array.dtype),
        "values": {"smallest": float(volume.array.min()), "largest": float(volume.array.max())},
        "notes": list(volume.notes),
    }


def _describe_images(path: Path, _: float | None) -> Facts | None:
    if path.is_file() and path.suffix.lower() not in _IMAGE_LISTS:
        return None
    from medlore.data.images.inspect import describe_images

    facts = describe_images(path, pixels="sample")
    return {"kind": "images", **facts}


def _describe_folder(path: Path, _: float | None) -> Facts | None:
    return describe_run(path) or describe_case(path) or describe_network_folder(path)


_DESCRIBERS: tuple[Callable[[Path, float | None], Facts | None], ...] = (
    _describe_pack,
    _describe_adapter,
    _describe_prompts,
    _describe_weights,
    _describe_folder,
    _describe_json,
    _describe_cases,
    _describe_volume,
    _describe_images,
)


def _stranger(key: str) -> Entry:
    modality, label = key.split("/", 1)
    return Entry(label, modality, "not in the vocabulary", known=False)
