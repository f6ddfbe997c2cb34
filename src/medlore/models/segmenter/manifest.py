"""What the manifest of a segmenter's pack may say: every entry that a reader relies on, checked before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from medlore.linalg.matricize import LAYOUTS

_FORMS = ("plain", "balanced", "imbalanced")
_FIRST_PASS_NUMBERS = ("margin_mm", "least_mm", "least_ml", "stripped_ml")
_AXES = ("RL", "AP", "SI")
# What a pack may set of the limits beyond which a check speaks up; `medlore.segmenting.expectations` says what they mean.
CHECK_LIMITS = ("apart_ml", "apart_share", "smaller_side", "outside_share", "dropped_share", "border_entropy", "agreement")


def segmenter_faults(manifest: Mapping[str, Any]) -> list[str]:
    """One line for each entry with a wrong value; sizes (`config`) are judged by `SegmenterConfig` itself.

    Args:
        manifest: whose entries `config`, `experts`, `files` and `preprocessing` are mappings.
    """
    faults = [] if manifest["form"] in _FORMS else [f"form: {manifest['form']!r} is none of {', '.join(_FORMS)}"]
    alpha, region, about = (manifest.get(name) for name in ("lora_alpha", "region", "about"))
    faults += [] if alpha is None or _is_number(alpha) else [f"lora_alpha: {alpha!r} is no number"]
    faults += [] if region is None or isinstance(region, str) else [f"region: {region!r} is no name"]
    faults += [] if about is None or isinstance(about, dict) else ["about: not a mapping"]
    for name, entry in manifest["experts"].items():
        faults += _expert_faults(f"experts.{name}", entry, manifest["files"])
    return [*faults, *_prompt_faults(manifest.get("prompts")), *preprocessing_faults(manifest["preprocessing"], "preprocessing")]


def preprocessing_faults(rules: Mapping[str, Any], where: str) -> list[str]:
    """One line for each constant of a training that no volume could be prepared with; those left out are the published ones.

    Examples:
        >>> preprocessing_faults({"roi_size": [96, 96], "overlap": 1.5}, "preprocessing")
        ['preprocessing.roi_size: [96, 96] is no three whole numbers from 1', 'preprocessing.overlap: 1.5 is no number from 0 below 1']
    """
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "orientation": (_is_orientation, "code such as RAS"),
        "spacing_mm": (_is_spacing, "three lengths in mm, or a mapping from modalities to them"),
        "roi_size": (_are_sides, "three whole numbers from 1"),
        "overlap": (lambda v: _is_number(v) and 0 <= v < 1, "number from 0 below 1"),
        "foreground_above": (_is_number, "number"),
        "gaussian_sigma": (lambda v: _is_number(v) and v > 0, "number above 0"),
        "threshold": (lambda v: _is_number(v) and 0 < v < 1, "number between 0 and 1"),
        "intensity": (_is_intensity, "mapping with `ct: {clip: [low, high]}` and `other: {clip_percentiles: [low, high]}`"),
        "tissues": (_are_tissues, "mapping from mri, pet or us to two labels or more that exclude each other"),
        "parts": (_are_parts, "mapping from modality to label to a share above 0 and up to 1"),
        "first_pass": (_is_first_pass, "mapping with a shipped `pack` (medlore:NAME), its label of the `brain`, and of the `halves`"),
        "checks": (
            _are_checks,
            "mapping from modality to `structures`: label -> `ml: [low, high]`, `pieces`, `paired` (see docs/weights.md)",
        ),
        "label_regions": (_is_text_to_text, "mapping from modality/label to region"),
    }
    return [
        f"{where}.{name}: {rules[name]!r} is no {wanted}"
        for name, (fits, wanted) in checks.items()
        if name in rules and not fits(rules[name])
    ]


def _expert_faults(place: str, entry: Any, files: Mapping[str, Any]) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{place}: not a mapping"]
    file, scaling = entry.get("file"), entry.get("scaling")
    faults = [] if isinstance(file, str) and file in files else [f"{place}.file: {file!r} is not among the files"]
    if isinstance(file, str) and PurePosixPath(file).suffix != ".safetensors":
        faults.append(f"{place}.file: {file!r} is no .safetensors file")
    faults += [] if entry.get("layout") in LAYOUTS else [f"{place}.layout: {entry.get('layout')!r} is none of {', '.join(LAYOUTS)}"]
    if not isinstance(scaling, dict) or not all(_is_number(v) for v in scaling.values()):
        faults.append(f"{place}.scaling: not layer -> number")
    return faults


def _prompt_faults(prompts: Any) -> list[str]:
    if prompts is None:
        return []
    keys = prompts.get("keys") if isinstance(prompts, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return ["prompts: no mapping with `keys`, a list of modality/label"]
    sha256 = prompts.get("text_sha256")
    return [] if sha256 is None or isinstance(sha256, str) else [f"prompts.text_sha256: {sha256!r} is no hash"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any, lowest: float, highest: float) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)) and lowest <= value[0] < value[1] <= highest


def _are_sides(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(type(side) is int and side >= 1 for side in value)


def _is_spacing(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(name, str) and not isinstance(v, dict) and _is_spacing(v) for name, v in value.items())
    return isinstance(value, list | tuple) and len(value) == 3 and all(_is_number(length) and length > 0 for length in value)


def _is_orientation(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 3 and all(sum(letter in axis for letter in value.upper()) == 1 for axis in _AXES)


def _is_intensity(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    ct, other = value.get("ct", {}), value.get("other", {})
    if not isinstance(ct, dict) or not isinstance(other, dict):
        return False
    clips = "clip" not in ct or _is_pair(ct["clip"], -math.inf, math.inf)
    return clips and ("clip_percentiles" not in other or _is_pair(other["clip_percentiles"], 0, 100))


def _are_tissues(value: Any) -> bool:
    return isinstance(value, dict) and all(
        modality in ("mri", "pet", "us")
        and isinstance(labels, list | tuple)
        and len(set(map(str, labels))) == len(labels) >= 2
        and all(isinstance(label, str) for label in labels)
        for modality, labels in value.items()
    )


def _are_parts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(parts, dict) and all(isinstance(label, str) and _is_number(share) and 0 < share <= 1 for label, share in parts.items())
        for parts in value.values()
    )


def _is_first_pass(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= {"pack", "brain", "halves", *_FIRST_PASS_NUMBERS}:
        return False
    pack, brain, halves = (value.get(name) for name in ("pack", "brain", "halves"))
    numbers = [value[name] for name in _FIRST_PASS_NUMBERS if name in value]
    named = isinstance(pack, str) and pack.startswith("medlore:") and isinstance(brain, str)
    both = isinstance(halves, dict) and set(halves) == {"left", "right"} and all(isinstance(label, str) for label in halves.values())
    return named and both and all(_is_number(number) and number >= 0 for number in numbers)


def _are_checks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(told, dict)
        and set(told) <= {"structures", "inside", "least_mm", "limits", "sources"}
        and isinstance(told.get("structures"), dict)
        and all(isinstance(label, str) and _is_expectation(entry) for label, entry in told["structures"].items())
        and (told.get("inside") is None or isinstance(told["inside"], str))
        and _is_number(told.get("least_mm", 0))
        and isinstance(told.get("limits", {}), dict)
        and all(name in CHECK_LIMITS and _is_number(limit) and limit >= 0 for name, limit in told.get("limits", {}).items())
        and isinstance(told.get("sources", []), list | tuple)
        and all(isinstance(line, str) for line in told.get("sources", []))
        for told in value.values()
    )


def _is_expectation(entry: Any) -> bool:
    if not isinstance(entry, dict) or not set(entry) <= {"ml", "pieces", "paired"}:
        return False
    pieces = entry.get("pieces")
    ranged = "ml" not in entry or (_is_pair(entry["ml"], 0, math.inf) and entry["ml"][0] >= 0)
    return ranged and (pieces is None or (type(pieces) is int and pieces >= 1)) and isinstance(entry.get("paired", False), bool)


def _is_text_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
