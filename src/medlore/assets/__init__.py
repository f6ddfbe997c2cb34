"""Floor 0: where the shipped files lie (small models that this project trained, rank lists, the vocabulary)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from medlore.errors import UnknownNameError

PREFIX = "medlore:"
# What adapters of earlier versions keep of a shipped backbone: hashes of the same weights beside other words in the model card.
EARLIER_HASHES = {
    "medlore:vit-mini": (
        "0b83abc43c5f00be60ec37b4472e5e0972be860a027a2e0d5353ccc71a5d0b8e",
        "cf42ec9415257851d42add58155f9eb65736a7d4ab6628824a34e817e3196e94",
    )
}


def asset_path(name: str) -> Path:
    """Path of a shipped file or folder; `name` may carry the prefix `medlore:`.

    Raises:
        UnknownNameError: nothing of that name is shipped.

    Examples:
        >>> asset_path("medlore:nothing-like-it")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        medlore.errors.UnknownNameError: ...
    """
    bare = name.removeprefix(PREFIX)
    root = Path(str(resources.files(__name__)))
    path = root / bare
    if not bare or bare.startswith((".", "_")) or "/" in bare or not path.exists():
        raise UnknownNameError("shipped file", bare, shipped_names())
    return path


def shipped_names() -> list[str]:
    """Names of everything that is shipped, sorted."""
    root = Path(str(resources.files(__name__)))
    return sorted(p.name for p in root.iterdir() if not p.name.startswith(("_", ".")) and p.suffix != ".py")
