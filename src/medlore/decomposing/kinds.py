"""Which recipe a study file is for: `kind: segmenter` or, without a word of it, a classifier."""

from __future__ import annotations

from pathlib import Path

import yaml

from medlore.errors import UnknownNameError
from medlore.files import existing_file

KINDS = ("classifier", "segmenter")


def is_segmentation_study(path: str | Path) -> bool:
    """Whether a study says `kind: segmenter`; a file that is no YAML mapping is left to the reader of settings.

    Raises:
        UnknownNameError: a kind that is none.
    """
    try:
        content = yaml.safe_load(existing_file(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    kind = content.get("kind", "classifier") if isinstance(content, dict) else "classifier"
    if kind not in KINDS:
        raise UnknownNameError(f"{path}: kind", str(kind), KINDS)
    return bool(kind == "segmenter")
