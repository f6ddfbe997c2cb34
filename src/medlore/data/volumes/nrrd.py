"""NRRD in: one file or .nhdr with a data file, raw or gzip, three space axes, read into the RAS+ frame.

The fields are those of the NRRD standard as Teem and ITK read them: `line skip` counts lines before unpacking, `byte skip`
bytes after it, -1 means that the voxels end the file. What is not read here is refused by name of the field.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip

from medlore.data.volumes.geometry import Array, Shape, check_affine
from medlore.data.volumes.nifti import Volume, header_for
from medlore.data.volumes.voxel_bytes import (
    GZIP_FAULTS,
    as_voxels,
    beside,
    check_end,
    check_frame,
    check_promise,
    damaged,
    read_exactly,
    read_last,
    skip,
    skip_lines,
)
from medlore.errors import DataError
from medlore.files import existing_file

_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4",
    "uint32_t": "u4", "longlong": "i8", "long long": "i8", "long long int": "i8", "signed long long": "i8",
    "signed long long int": "i8", "int64": "i8", "int64_t": "i8", "ulonglong": "u8", "unsigned long long": "u8",
    "unsigned long long int": "u8", "uint64": "u8", "uint64_t": "u8", "float": "f4", "double": "f8",
}  # fmt: skip
_TO_RAS = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
_MM = {"": 1.0, "mm": 1.0, "millimeter": 1.0, "um": 1e-3, "µm": 1e-3, "micron": 1e-3, "microns": 1e-3, "cm": 10.0, "m": 1000.0}
_PACKED = ("gzip", "gz")
_KINDS_OF_SPACE = ("domain", "space", "???", "none")
_FIELDS = frozenset({
    "number", "type", "block size", "dimension", "space", "space dimension", "sizes", "spacings", "thicknesses", "axis mins", "axis maxs",
    "centers", "centerings", "labels", "units", "min", "max", "old min", "old max", "data file", "endian", "encoding", "content", "kinds",
    "sample units", "space units", "space origin", "space directions", "measurement frame", "line skip", "byte skip",
})  # fmt: skip
_SPELLINGS = {name.replace(" ", ""): name for name in _FIELDS if name.count(" ") == 1}  # `datafile` and `data file` are one
_AFTER = {
    "sizes": "dimension", "kinds": "dimension", "space directions": "space", "space origin": "space", "space units": "space",
}  # fmt: skip
_MOST_HEADER = 16 << 20
_MENDED = "convert it to NIfTI"


@dataclass(frozen=True)
class NrrdHeader:
    """The text of a NRRD file.

    Args:
        path: the file.
        fields: name in small letters -> value.
        keys: key/value pairs (`KEY:=VALUE`), as Slicer writes segments.
        end: where the header ends, in bytes.
    """

    path: Path
    fields: dict[str, str]
    keys: dict[str, str] = field(default_factory=dict)
    end: int = 0

    def refuse(self, came: str, accepted: str, fix: str = _MENDED) -> DataError:
        """The error that names this file."""
        return DataError(str(self.path), came, accepted, fix)

    def numbers(self, name: str, of: type = float) -> list[Any]:
        """The numbers of a field; none where it is absent.

        Raises:
            DataError: it holds something else.
        """
        try:
            found = [of(part) for part in self.fields.get(name, "").split()]
            if not all(math.isfinite(number) for number in found):
                raise ValueError(name)
        except (ValueError, OverflowError) as error:
            raise self.refuse(f"{name}: {self.fields[name][:60]!r}", "numbers", "export it again") from error
        return found


def is_nrrd(head: bytes) -> bool:
    """Whether these are the first bytes of a NRRD file, of whatever version."""
    return head.startswith(b"NRRD000")


def read_nrrd(path: str | Path, *, frame: int | None = None, most_bytes: int | None = None) -> Volume:
    """Read a .nrrd or .nhdr file.

    Args:
        path: the file; the data file of a .nhdr must lie in the same folder or below it.
        frame: None or 0: the file holds one volume.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        DataError: not NRRD, damaged, or of a kind that is not read here; the message says which field.
    """
    header = read_header(existing_file(path))
    check_frame(frame, header.path)
    shape, affine, notes = grid_of(header)
    array = read_voxels(header, shape, most_bytes=most_bytes)
    return Volume(array, affine, header_for(affine, shape), shape, header.path, notes)


def read_nrrd_grid(path: str | Path) -> tuple[Shape, Array]:
    """Shape and affine, from the header alone.

    Raises:
        DataError: as `read_nrrd`, as far as the header shows.
    """
    shape, affine, _ = grid_of(read_header(existing_file(path)))
    return shape, affine


def read_header(path: Path) -> NrrdHeader:
    """The fields of a NRRD file.

    Raises:
        DataError: not NRRD, no end of the header, or a field twice.
    """
    with path.open("rb") as stream:
        content = stream.read(_MOST_HEADER)
    if not re.match(rb"NRRD000[1-5]\r?\n", content):
        raise DataError(str(path), "not NRRD", "a file that starts with NRRD0001 to NRRD0005", "name an image, or convert it")
    blank = re.search(rb"\r?\n\r?\n", content)
    if blank is None and len(content) == _MOST_HEADER:
        raise DataError(str(path), f"a header of more than {_MOST_HEADER:,} bytes", "a header that ends with an empty line", _MENDED)
    text = content[: blank.start() if blank else len(content)].decode("utf-8", errors="replace")
    header = NrrdHeader(path, {}, {}, blank.end() if blank else len(content))
    for line in text.split("\n")[1:]:
        line = line.rstrip("\r")  # noqa: PLW2901 - the end of a line of Windows
        key, is_key, value = line.partition(":=")
        name, is_field, entry = line.partition(": ")
        if line.startswith("#") or not line:
            continue
        if is_key and ": " not in key:
            header.keys[key.strip()] = value.strip()
        elif is_field:
            _take_field(header, _spelling(name), entry.strip())
        else:
            raise header.refuse(f"the line {line[:40]!r}", "FIELD: VALUE, KEY:=VALUE, or # and a remark", "correct the header")
    return header


def _take_field(header: NrrdHeader, name: str, entry: str) -> None:
    """Add one field, if the standard has it and it stands in its place."""
    if name not in _FIELDS:
        raise header.refuse(f"the field {name[:40]!r}", "the fields of the NRRD standard, and KEY:=VALUE", "correct the header")
    if name in header.fields:
        raise header.refuse(f"the field {name!r} twice", "every field once", "correct the header")
    for later, first in _AFTER.items():
        if name == first and later in header.fields:
            raise header.refuse(f"the field {later!r} before {first!r}", f"{first!r} first, as the standard asks", "correct the header")
    header.fields[name] = entry


def _spelling(name: str) -> str:
    plain = " ".join(name.split()).casefold()
    return _SPELLINGS.get(plain, plain)


def grid_of(header: NrrdHeader) -> tuple[Shape, Array, tuple[str, ...]]:
    """Shape, affine, and what was odd.

    Raises:
        DataError: not three axes with a position in space.
    """
    sizes = sizes_of(header)
    vectors = directions_of(header)
    if len(sizes) != 3 or len(vectors) != 3 or any(v is None for v in vectors):
        known = sum(v is not None for v in vectors)
        came = f"sizes {sizes}, space {header.fields.get('space', 'none')!r}, {known} space directions"
        raise header.refuse(came, "three axes in space left-posterior-superior (or RAS, LAS) with space directions")
    kinds = header.fields.get("kinds", "").casefold().split()
    if any(kind not in _KINDS_OF_SPACE for kind in kinds) or len(kinds) not in (0, 3):
        raise header.refuse(f"kinds {header.fields['kinds']!r}", "three axes of kind domain or space", "export one grey value a voxel")
    affine, notes = affine_of(header, [v for v in vectors if v is not None])
    return (sizes[0], sizes[1], sizes[2]), affine, notes


def data_file_of(path: Path) -> Path | None:
    """The file beside a .nhdr that holds its voxels; None where the header's own file does.

    Raises:
        DataError: not NRRD, or the file is not there.
    """
    file, _ = _data_file(read_header(path))
    return None if file == path else file


def sizes_of(header: NrrdHeader) -> list[int]:
    """Voxels along every axis, the fastest first.

    Raises:
        DataError: no numbers from 1, or not as many as `dimension` says.
    """
    sizes = header.numbers("sizes", int)
    if not sizes or min(sizes) < 1 or header.numbers("dimension", int) != [len(sizes)]:
        came = f"sizes {header.fields.get('sizes', '')!r} of dimension {header.fields.get('dimension', '')!r}"
        raise header.refuse(came, "as many whole numbers from 1 as there are axes", "export it again")
    return sizes


def directions_of(header: NrrdHeader) -> list[Array | None]:
    """The step along every axis in the file's own space; None for an axis that is none of space.

    Raises:
        DataError: something else than vectors of three numbers.
    """
    text = header.fields.get("space directions", "")
    parts = re.findall(r"\([^()]*\)|[^\s()]+", text)
    return [None if part.casefold() == "none" else _vector(part, header, "space directions") for part in parts]


def affine_of(header: NrrdHeader, vectors: list[Array]) -> tuple[Array, tuple[str, ...]]:
    """Voxel index -> RAS+ mm of three space axes, and what was odd.

    Raises:
        DataError: a space without sides, or units that are not known.
    """
    signs = _TO_RAS.get(header.fields.get("space", "").casefold())
    if signs is None:
        came = f"space {header.fields.get('space', 'none')!r}: left and right are not known"
        raise header.refuse(came, "three axes in space left-posterior-superior (or RAS, LAS) with space directions")
    units = [unit.strip().casefold() for unit in re.findall(r'"([^"]*)"', header.fields.get("space units", ""))] or [""]
    if len(set(units)) > 1 or units[0] not in _MM:
        raise header.refuse(f"space units {header.fields['space units']!r}", '"mm", "cm", "um" or "m", the same along all axes')
    origin = header.fields.get("space origin")
    affine = np.eye(4)
    affine[:3, :3] = np.array(vectors).T
    affine[:3, 3] = 0 if origin is None else _vector(origin, header, "space origin")
    affine = np.diag([*signs, 1.0]) @ affine
    affine[:3] *= _MM[units[0]]
    check_affine(affine, str(header.path))
    return affine, (f"lengths are given in {units[0]}, and were taken so",) if _MM[units[0]] != 1 else ()


def read_voxels(header: NrrdHeader, shape: tuple[int, ...], *, most_bytes: int | None = None) -> Array:
    """The numbers of all axes, the first axis fastest.

    Raises:
        DataError: another kind of numbers or encoding, a damaged file, or too few of them.
    """
    kind, encoding = _kind_of(header)
    size = math.prod(shape) * kind.itemsize
    lines, count = _skips(header)
    path, start = _data_file(header)
    packed = encoding in _PACKED
    check_promise(size, f"sizes {shape}, {kind}", path, packed=packed, most_bytes=most_bytes)
    try:
        with ExitStack() as closing:
            stream: IO[bytes] = closing.enter_context(path.open("rb"))
            stream.seek(start)
            skip_lines(stream, lines, path)
            if packed:
                stream = closing.enter_context(igzip.open(stream, "rb"))
            if count < 0:
                content = read_last(stream, size, path)
                if packed and stream.tell() % (1 << 32) != _stated_length(path):
                    raise header.refuse("byte skip -1, and bytes behind the packed voxels", "voxels that end the file", "write it again")
            else:
                skip(stream, count, path)
                content = read_exactly(stream, size, path)
                check_end(stream)
    except GZIP_FAULTS as error:
        raise damaged(path, error) from error
    return as_voxels(content, kind, shape)


def _stated_length(path: Path) -> int:
    """What the last four bytes of a gzip file say of its length when it is unpacked, modulo 2^32."""
    with path.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def _kind_of(header: NrrdHeader) -> tuple[np.dtype[Any], str]:
    named, encoding = header.fields.get("type", ""), header.fields.get("encoding", "").casefold()
    kind = _TYPES.get(" ".join(named.split()).casefold())
    if kind is None or encoding not in ("raw", *_PACKED):
        raise header.refuse(f"type {named!r} with encoding {encoding!r}", "numbers, raw or gzip")
    order = {"little": "<", "big": ">", "": ""}.get(header.fields.get("endian", "").casefold())
    if order is None or (order == "" and kind[1] != "1"):
        raise header.refuse(f"endian {header.fields.get('endian', 'not said')!r}", "little or big", "write the field endian")
    return np.dtype(order + kind), encoding


def _skips(header: NrrdHeader) -> tuple[int, int]:
    """Lines and bytes to read over."""
    lines, count = ((header.numbers(name, int) or [0])[0] for name in ("line skip", "byte skip"))
    if lines < 0 or count < -1:
        raise header.refuse(f"line skip {lines}, byte skip {count}", "numbers from 0, or byte skip -1", "correct the header")
    return lines, count


def _data_file(header: NrrdHeader) -> tuple[Path, int]:
    """The file that holds the voxels, and where they may begin in it."""
    name = header.fields.get("data file")
    if name is None:
        return header.path, header.end
    if name.startswith("LIST") or "%" in name:
        raise header.refuse(f"data file {name!r}: several files", "one data file", "join them, e.g. with SimpleITK or unu")
    return beside(header.path, name), 0


def _vector(text: str, header: NrrdHeader, name: str) -> Array:
    inside = re.fullmatch(r"\(([^()_]*)\)", text.strip())
    try:
        values = np.array([float(part) for part in inside[1].split(",")] if inside else [])
    except ValueError:
        values = np.array([])
    if values.shape != (3,):
        raise header.refuse(f"{name}: {text[:60]!r}", "vectors of three numbers, (x,y,z)", "export it again")
    return values
