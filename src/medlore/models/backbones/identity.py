"""Which backbone a tuned network belongs to: a hash of the files that decide its answers, its documents left out."""

from __future__ import annotations

from pathlib import Path

from medlore.assets import EARLIER_HASHES
from medlore.files import sha256_of

_DOCUMENTS = (".md", ".gitattributes")


def backbone_hash(path: Path) -> str:
    """Hex SHA-256 of a weights file, or of a folder without model card, licence and the like: their words may change."""
    return sha256_of(path, leave_out=_is_document)


def is_hash_of(digest: str, path: Path, source: str) -> bool:
    """Whether a hash that a tuned network keeps belongs to a backbone.

    Args:
        digest: what the card of the tuned network says. Earlier versions kept the hash of the whole folder, documents included.
        path: the weights file or folder.
        source: where it came from, as it was asked for; shipped backbones know the hashes that they had with earlier documents.
    """
    return digest in EARLIER_HASHES.get(source, ()) or digest in (backbone_hash(path), sha256_of(path))


def _is_document(path: Path) -> bool:
    return path.suffix.lower() in _DOCUMENTS or path.name.upper().startswith(("LICENSE", "LICENCE", ".GITATTRIBUTES"))
