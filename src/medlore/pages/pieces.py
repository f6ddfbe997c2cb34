"""What a page is made of: plain values, no HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from medlore.errors import DataError
from medlore.files import existing_file
from medlore.pages.slices import Slices

_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Interval:
    """A number and the interval around it, if there is one; drawn as a dot with a line."""

    value: float | None
    low: float | None = None
    high: float | None = None


Cell: TypeAlias = str | int | float | bool | Interval | None


@dataclass(frozen=True)
class Facts:
    """Names and values beside each other.

    Args:
        rows: name -> value.
        title: over them.
        folded: shown as one line that opens.
    """

    rows: Mapping[str, Cell]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under column heads; numbers stand right, a click on a head sorts.

    Args:
        columns: heads.
        rows: one value for each column.
        title: over it.
        note: under it.
        folded: shown as one line that opens.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture that is carried in the page.

    Args:
        content: bytes of a PNG or JPEG file.
        text: what it shows, in words.
        dark: its own background is black; it is not laid on white.
    """

    content: bytes = field(repr=False)
    text: str
    dark: bool = False

    @classmethod
    def from_file(cls, path: str | Path, text: str, *, dark: bool = False) -> Picture:
        """Read it.

        Raises:
            InputError: no such file.
            DataError: neither PNG nor JPEG.
        """
        path = existing_file(path)
        content = path.read_bytes()
        if _kind_of(content) is None:
            raise DataError(str(path), "neither PNG nor JPEG", "a picture of one of these kinds", "make it again")
        return cls(content, text, dark)

    @property
    def address(self) -> str:
        """The picture as a data URI."""
        return f"data:{_kind_of(self.content)};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Notes:
    """Sentences: what a reader should know, or (as a warning) what went wrong."""

    lines: Sequence[str]
    warning: bool = False


Piece: TypeAlias = Facts | Table | Picture | Notes | Slices


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Args:
        title: its heading, and the name of the browser's tab.
        sections: from top to bottom; those without pieces are left out.
        subtitle: one line under the heading.
        facts: short facts in the head of the page.
    """

    title: str
    sections: Sequence[Section]
    subtitle: str = ""
    facts: Mapping[str, Cell] = field(default_factory=dict)


def _kind_of(content: bytes) -> str | None:
    return next((kind for start, kind in _KINDS.items() if content.startswith(start)), None)
