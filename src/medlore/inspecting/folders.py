"""What `medlore info` says of folders and files beyond packs: networks of transformers and timm, runs, segmented cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.errors import CheckpointError, InputError, MedloreError
from medlore.files import read_json, sha256_of
from medlore.models.statefile import State
from medlore.runs.report import REPORT_SCHEMA

Facts = dict[str, Any]
CONFIG_FILE = "config.json"
_SHOWN = (
    "hidden_size", "embed_dim", "num_hidden_layers", "depths", "num_attention_heads", "num_heads", "image_size", "patch_size",
    "num_channels", "window_size",
)  # fmt: skip


def describe_network_folder(path: Path) -> Facts | None:
    """A transformers folder: its architecture and sizes by `config.json`, its parameters by the weights beside it."""
    config = _config(path / CONFIG_FILE)
    if config is None:
        return None
    from medlore.ranks.sources import open_source

    facts: Facts = {"kind": "transformers folder", **_architecture(config)}
    try:
        source = open_source(path)
    except InputError:
        return {**facts, "parameters": None, "notes": ["no weights in it, or in a form that is not read here"]}
    return {**facts, "parameters": source.parameters, "tensors": len(source.shapes), **_attention(source.shapes)}


def describe_network_file(path: Path, state: State) -> Facts:
    """Weights that are no segmenter: the family of networks by their names, else what can be counted."""
    from medlore.models.backbones.families import FAMILIES
    from medlore.models.backbones.keymaps import convert_state_dict, read_weights

    counted: Facts = {"parameters": sum(w.numel() for w in state.values()), "tensors": len(state)}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    facts: Facts = {"kind": "weights of another family", "first_keys": list(state)[:5]}
    config = _config(path.parent / CONFIG_FILE) if path.stem in ("model", "pytorch_model") else None
    if config is not None:
        facts = {"kind": "weights of a transformers folder", **_architecture(config)}
    else:
        try:
            found = convert_state_dict(read_weights(path), where=str(path))
            family = FAMILIES[found.model_type].caption
            facts = {"kind": "image network", "architecture": family, "naming": found.naming, **_sizes(found.config), "notes": found.notes}
        except CheckpointError:  # no network can be built from it; its attention blocks may still be found
            if attention := _attention(shapes):
                facts = {"kind": "network with attention blocks", "first_keys": list(state)[:5]}
                facts |= {"notes": ["of a form from which no network is built here; `medlore ranks` reads it"]} | attention
    return {**facts, **counted, **_attention(shapes), "sha256": sha256_of(path)}


def describe_run(path: Path) -> Facts | None:
    """The folder of a run, or its `report.json`: which verb, how it ended, what it made."""
    report = path / "report.json" if path.is_dir() else path
    content = _json(report)
    if content is None or content.get("schema") != REPORT_SCHEMA:
        return None
    outputs: Mapping[str, str] = content.get("outputs") or {}
    results = content.get("results") or {}
    facts: Facts = {name: content.get(name) for name in ("verb", "state", "command", "device", "seed", "seconds", "peak_memory_bytes")}
    facts["command"] = " ".join(map(str, facts["command"] or ()))
    facts["results"] = {name: value for name, value in results.items() if isinstance(value, str | int | float | bool)}
    facts["outputs"] = dict(outputs)
    facts["missing_outputs"] = [name for name, place in outputs.items() if not (report.parent / place).exists()]
    if isinstance(cases := results.get("cases"), list):
        facts["cases"] = dict(Counter(entry.get("state", "unknown") for entry in cases))
        facts["failed"] = {entry["name"]: entry["error"] for entry in cases if "error" in entry}
    return {"kind": "run", **facts}


def describe_case(path: Path) -> Facts | None:
    """The folder of a segmented case: its labels, their volumes and who answered for them."""
    content = _json(path / "case.json") if path.is_dir() else None
    if content is None or not str(content.get("schema", "")).startswith("medlore/case/"):
        return None
    shown = ("image", "modality", "grid", "precision", "overlap_rule", "labels", "notes")
    return {"kind": "segmented case", **{name: content.get(name) for name in shown}, "model": (content.get("model") or {}).get("name")}


def _json(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file() or path.suffix.lower() != ".json":
        return None
    content = read_json(path)
    return content if isinstance(content, dict) else None


def _config(path: Path) -> Mapping[str, Any] | None:
    """A configuration of transformers; None for any other file of that name."""
    try:
        content = _json(path)
    except MedloreError:
        return None
    return content if content is not None and isinstance(content.get("model_type"), str) else None


def _architecture(config: Mapping[str, Any]) -> Facts:
    named = config.get("architectures") or [config["model_type"]]
    labels = config.get("id2label")
    classes = list(labels.values()) if isinstance(labels, Mapping) and str(named[0]).endswith("Classification") else None
    tower = config.get("vision_config")
    return {"architecture": str(named[0]), **_sizes(tower if isinstance(tower, Mapping) else config), "classes": classes}


def _sizes(config: Mapping[str, Any]) -> Facts:
    return {name: config[name] for name in _SHOWN if config.get(name) is not None}


def _attention(shapes: Mapping[str, tuple[int, ...]]) -> Facts:
    """How many attention blocks there are, and how their matrices are named."""
    from medlore.ranks.targets import find_targets

    try:
        found = find_targets(shapes)
    except MedloreError:
        return {}
    return {"attention_blocks": len(found.attentions), "layout": found.layout}
