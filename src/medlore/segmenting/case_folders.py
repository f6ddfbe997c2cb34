"""Whose folder: the results of one image are never replaced by those of another that has its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medlore.data.formats import content_hash
from medlore.data.volumes.cases import Case
from medlore.errors import DataError, InputError
from medlore.files import read_json


def folder_for(out: Path, name: str, case: Case, digest: str) -> tuple[str, str | None]:
    """The folder of a case's results below `out`, and a note where it is not `name`, since that speaks of another image.

    Args:
        out: folder of a run.
        name: from `folder_names`.
        case: what is segmented.
        digest: `content_hash` of its image.
    """
    record = _record_below(out / name)
    if record is None or speaks_of(record, case, digest):
        return name, None
    own = name_apart(name, case, digest)
    return own, f"{name} holds the results of another image ({record.get('image')}), so this one's are in {own}"


def folder_found(pred: Path, name: str, case: Case) -> Path:
    """The folder in which the results of a case lie; the one of its name if there is no other."""
    record = _record_below(pred / name)
    if record is not None and case.image.exists():
        digest = content_hash(case.image)
        apart = pred / name_apart(name, case, digest)
        if not speaks_of(record, case, digest) and apart.is_dir():
            return apart
    return pred / name


def name_apart(name: str, case: Case, digest: str) -> str:
    """A name that belongs to this image alone: the same one in every run."""
    part = f"{digest} {case.frame or 0} {case.series or ''}"
    return f"{name}_{hashlib.sha256(part.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def speaks_of(record: Mapping[str, Any], case: Case, digest: str | None) -> bool:
    """Whether a `case.json` is about the image of a case.

    The content decides where `case.json` has its hash, else the path, of which a relative one may be the end of the other.

    Args:
        record: the content of `case.json`; one that names no image speaks of any.
        case: the case.
        digest: `content_hash` of its image; None where that is not there.
    """
    if not isinstance(record.get("image"), str):
        return True
    recorded, held = Path(record["image"]), record.get("image_sha256")
    if isinstance(held, str) and digest is not None:
        same = held == digest
    else:
        same = recorded.resolve() == case.image.resolve() or _is_end_of(recorded, case.image) or _is_end_of(case.image, recorded)
    part = record.get("case")
    frame = part.get("frame") if isinstance(part, Mapping) else None
    return same and (frame or 0) == (case.frame or 0)


def _record_below(folder: Path) -> Mapping[str, Any] | None:
    try:
        record = read_json(folder / "case.json")
    except (InputError, DataError):
        return None
    return record if isinstance(record, Mapping) else None


def _is_end_of(end: Path, path: Path) -> bool:
    return not end.is_absolute() and path.parts[-len(end.parts) :] == end.parts
