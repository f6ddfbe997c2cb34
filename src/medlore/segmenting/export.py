"""Published files -> packs: once, checked, with hashes, and with the embeddings of the whole vocabulary inside."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.errors import InputError, UnknownNameError
from medlore.files import sha256_of
from medlore.models import packs
from medlore.models.segmenter.bundle import SegmenterBundle, UnboundPairWarning, load_segmenter, write_segmenter_pack
from medlore.models.segmenter.checkpoints import recognise
from medlore.models.segmenter.prompts import PromptTable, table_of
from medlore.models.segmenter.text import TextEncoder, read_text_encoder
from medlore.models.segmenter.vocabulary import Vocabulary, default_vocabulary
from medlore.models.statefile import read_state

_LICENCE = "that of the source file; see docs/weights.md of MedLoRE"


def export(
    source: str | Path,
    out: str | Path,
    *,
    expert: str | None = None,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prompt_embeddings: str | Path | None = None,
    lora_alpha: float | None = None,
) -> dict[str, Any]:
    """Convert a segmenter (published file or pack) into a pack, or a text encoder into a table of prompts.

    Args:
        source: .pth, .safetensors or pack folder.
        out: folder of the pack; for a text encoder the `.safetensors` file of the table.
        expert: write only this region's expert, merged into the base: a plain network that needs no factors.
        text: the text encoder's file; the whole vocabulary is embedded and stored.
        tokenizer: wordpiece list of the text encoder.
        prompt_embeddings: a ready table instead.
        lora_alpha: alpha of a file with equal ranks.

    Returns:
        What was written: kind, path, name, parameters, experts, prompts, hashes, notes.

    Raises:
        InputError: missing or clashing arguments, or a folder in the way that is no pack.
        CheckpointError: broken, foreign or partial files.
    """
    source, out = Path(source), Path(out)
    if text is not None and prompt_embeddings is not None:
        raise InputError("--text, --prompt-embeddings", "both", "one of them", "leave one out")
    if source.is_file() and recognise(read_state(source)) == "text encoder":
        return _export_table(source, out, tokenizer)
    _refuse_to_replace(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnboundPairWarning)  # exporting is what binds a pair
        bundle = load_segmenter(source, text=text, tokenizer=tokenizer, prompt_embeddings=prompt_embeddings, lora_alpha=lora_alpha)
    if expert is not None and expert not in bundle.weights.experts:
        fix = "use one of them" if bundle.weights.experts else "leave it out: this model has no experts"
        raise UnknownNameError(f"{source}: --expert", expert, bundle.weights.experts, fix)
    prompts = embed_vocabulary(bundle.text) if bundle.text is not None else bundle.prompts
    weights, region = bundle.weights, bundle.region
    if expert is not None:
        weights, region = weights.only(expert), expert
        prompts = prompts and _of_region(prompts, expert, bundle.preprocessing.get("label_regions", {}))
    about = _about(bundle, source, text or prompt_embeddings)
    write_segmenter_pack(out, weights, prompts=prompts, preprocessing=bundle.preprocessing, region=region, about=about)
    return _summary(out, bundle, prompts, bound_now=text is not None or prompt_embeddings is not None)


def embed_vocabulary(encoder: TextEncoder, vocabulary: Vocabulary | None = None) -> PromptTable:
    """Embeddings of every label in every modality of the vocabulary."""
    words = vocabulary or default_vocabulary()
    rows = []
    for modality in ("ct", "mri", "us", "pet"):
        entries = words.entries(modality=modality)
        rows += list(zip((e.key for e in entries), encoder.embed([e.label for e in entries], modality), strict=True))
    return table_of(rows, text_sha256=encoder.sha256)


def _export_table(source: Path, out: Path, tokenizer: str | Path | None) -> dict[str, Any]:
    if out.suffix != ".safetensors":
        raise InputError("--out", str(out), "a .safetensors file for a table of prompts", "name the file, or give the vision file as FILE")
    encoder = read_text_encoder(source, tokenizer=tokenizer)
    table = embed_vocabulary(encoder)
    table.write(out)
    return {
        "kind": "prompt table",
        "out": str(out),
        "name": "prompt table",
        "prompts": len(table.keys),
        "text_sha256": encoder.sha256,
        "sha256": sha256_of(out),
        "notes": [],
    }


def _refuse_to_replace(out: Path) -> None:
    """A pack may be written again; any other folder with content is somebody's."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not packs.is_pack(out)):
        raise InputError("--out", f"{out} is there and is no pack", "a new folder, or a pack to replace", "name another folder")


def _of_region(prompts: PromptTable, region: str, own: Mapping[str, str]) -> PromptTable | None:
    """The prompts that this region's expert was made for; labels that neither the pack (`own`) nor the vocabulary places stay."""
    regions: dict[str, str] = {e.key: e.region for e in default_vocabulary().entries()}
    regions |= own
    kept = [row for row, key in enumerate(prompts.keys) if regions.get(key, region) == region]
    if not kept:
        return None
    return PromptTable(tuple(prompts.keys[row] for row in kept), prompts.embeddings[kept], prompts.text_sha256)


def _about(bundle: SegmenterBundle, source: Path, prompts: str | Path | None) -> dict[str, Any]:
    about: dict[str, Any] = {"source": source.name, "source_sha256": bundle.sha256, "licence": _LICENCE}
    if prompts is not None:
        about |= {"prompts_source": Path(prompts).name, "prompts_source_sha256": sha256_of(prompts)}
    return about


def _summary(out: Path, bundle: SegmenterBundle, prompts: PromptTable | None, *, bound_now: bool) -> dict[str, Any]:
    manifest = packs.read_manifest(out, kind="segmenter")
    notes: Sequence[str] = [note for note in bundle.notes if "never bound" not in note]
    if prompts is None:
        notes = [*notes, "no prompt embeddings inside: `medlore segment` will need --text or --prompt-embeddings"]
    elif bound_now:
        notes = [*notes, "vision weights and prompts are bound from now on: that they belong together is your word, no file says it"]
    return {
        "kind": "segmenter pack",
        "out": str(out),
        "name": manifest["name"] + (f" merged for {manifest['region']}" if manifest["region"] else ""),
        "parameters": manifest["parameters"],
        "experts": {name: entry["rank"] for name, entry in manifest["experts"].items()},
        "prompts": len(prompts.keys) if prompts is not None else 0,
        "files": manifest["files"],
        "notes": list(notes),
    }
