"""A job that other processes can find by name: it answers, or kills its own process."""

from __future__ import annotations

import os
from typing import Any


def answer(index: int, *, dies: bool) -> dict[str, Any]:
    return {"index": index, "process": os._exit(9) if dies else os.getpid()}


def job(index: int, dies: int) -> dict[str, Any]:
    return answer(index, dies=bool(dies))


def lost(item: tuple[Any, ...], reason: str) -> dict[str, Any]:
    return {"index": item[0], "lost": reason}
