"""What a label is called and how it is shown in a hospital: SNOMED CT codes, sides and colours, from the shipped table.

The table (`assets/structures.json`) is ours. It holds codes that the dictionary of pydicom knows, so that none is invented: what has
no code of its own is a body structure (SNOMED CT 123037004) at the site that it is a part of, and keeps its name as its label.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from medlore.assets import asset_path
from medlore.files import read_json

Colour = tuple[int, int, int]


class Code(NamedTuple):
    """A SNOMED CT code and what it means."""

    value: str
    meaning: str


KINDS = {  # the categories of segments, CID 7150 of the DICOM standard
    "anatomy": Code("91723000", "Anatomical Structure"),
    "tissue": Code("85756007", "Tissue"),
    "substance": Code("91720002", "Body Substance"),
    "abnormal": Code("49755003", "Morphologically Abnormal Structure"),
}
SIDES = {"left": Code("7771000", "Left"), "right": Code("24028007", "Right")}
GENERIC = Code("123037004", "Body structure (body structure)")

_SIDE = re.compile(r"\b(left|right) ")
_LIGHTER = 0.25  # share of white in the colour of what lies on the left, so that both sides are told apart
_HUE = 0.61803398875


@dataclass(frozen=True)
class CodedStructure:
    """A label as segmentations of a hospital name it.

    Args:
        label: in our words.
        kind: category of the property: anatomical structure, tissue, body substance, or something abnormal.
        code: what it is.
        side: left or right; None for neither, or where the code says it.
        site: what it is a part of, or lies in; None where the code says enough.
        colour: red, green and blue from 0 to 255.
    """

    label: str
    kind: Code
    code: Code
    side: Code | None
    site: Code | None
    colour: Colour


def structure_of(label: str) -> CodedStructure:
    """Codes and colour of a label; one that the table does not know is a generic structure in a colour made from its name.

    Examples:
        >>> found = structure_of("left kidney")
        >>> found.code, found.side.meaning, found.colour
        (Code(value='64033007', meaning='Kidney'), 'Left', (202, 127, 110))
        >>> structure_of("something else").code.meaning
        'Body structure (body structure)'
    """
    table = structures()
    plain = " ".join(label.casefold().split())
    found = _SIDE.search(plain)
    bare = plain if found is None or plain in table else plain.replace(found[0], "", 1)
    side = None if found is None or plain in table else SIDES[found[1]]
    entry = table.get(bare)
    if entry is None:
        return CodedStructure(label, KINDS["anatomy"], GENERIC, None if found is None else SIDES[found[1]], None, _colour_of_name(bare))
    code, site = (None if entry[name] is None else Code(*entry[name]) for name in ("code", "site"))
    colour = _rgb(entry["colour"])
    return CodedStructure(label, KINDS[entry["kind"]], code or GENERIC, side, site, _lighter(colour) if side == SIDES["left"] else colour)


@functools.cache
def structures() -> Mapping[str, Mapping[str, Any]]:
    """The shipped table: label without its side -> code, site, kind and colour."""
    return dict(read_json(asset_path("structures.json"))["structures"])


def _rgb(text: str) -> Colour:
    red, green, blue = (int(text[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def _lighter(colour: Colour) -> Colour:
    red, green, blue = (round(part + (255 - part) * _LIGHTER) for part in colour)
    return red, green, blue


def _colour_of_name(name: str) -> Colour:
    """The same colour for a name in every file."""
    import colorsys
    import zlib

    red, green, blue = colorsys.hsv_to_rgb((zlib.crc32(name.encode()) * _HUE) % 1.0, 0.6, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
