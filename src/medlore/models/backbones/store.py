"""Backbones that one process reads, checks and resizes once, however many runs it tunes on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from medlore.assets import PREFIX, asset_path
from medlore.errors import InputError
from medlore.models.backbones.families import Triple
from medlore.models.backbones.reading import Backbone, read_backbone, with_fresh_head

Answer = TypeVar("Answer")


@dataclass
class _Kept:
    """A backbone as it was read, which nobody trains, and what was found out about it."""

    stored: Backbone
    facts: dict[Hashable, Any] = field(default_factory=dict)


class BackboneStore:
    """The last few backbones of a process, untouched; every caller gets a copy of its own with a fresh head.

    What comes out is, to the bit, what `load_backbone` gives. A file that has changed on disk is read again.

    Args:
        most: backbones that are kept; each costs its weights once more in memory.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._last: tuple[Backbone, _Kept] | None = None
        self.memory: dict[str, Any] = {}  # what others computed with its backbones and share like them

    def load(
        self,
        source: str | Path,
        *,
        classes: int,
        image_size: int | None = None,
        heads: int | None = None,
        seed: int = 0,
        mean: Triple | None = None,
        std: Triple | None = None,
    ) -> Backbone:
        """A backbone of the caller's own; arguments and errors of `load_backbone`."""
        if classes < 1:
            raise InputError("classes", f"got {classes}", "a whole number from 1", "give the number of classes")
        key = (str(source), image_size, heads, mean, std, _state_of(source))
        if key not in self._kept:
            self._kept[key] = _Kept(read_backbone(source, image_size=image_size, heads=heads, mean=mean, std=std))
        self._kept.move_to_end(key)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        own = with_fresh_head(self._kept[key].stored, classes=classes, seed=seed)
        self._last = (own, self._kept[key])
        return own

    def once(self, backbone: Backbone, key: Hashable, find: Callable[[], Answer]) -> Answer:
        """What `find()` says about the weights of `backbone`, asked once for each `key`.

        Args:
            backbone: the one that `load` gave last, before it was changed; about any other one `find` is asked anew.
            key: everything besides the weights that the answer depends on.
            find: the question; its answer must not be changed by those who get it.
        """
        if self._last is None or self._last[0] is not backbone:
            return find()
        facts = self._last[1].facts
        self._last = None  # the caller changes it from here on, and it is not kept alive
        if key not in facts:
            facts[key] = find()
        return cast("Answer", facts[key])


def _state_of(source: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the files, empty for a name of the hub."""
    path = asset_path(str(source)) if str(source).startswith(PREFIX) else Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
