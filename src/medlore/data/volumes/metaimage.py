"""MetaImage (.mha, .mhd) in, as ITK and elastix write it: binary, plain or zlib, three axes, read into the RAS+ frame.

SimpleITK reads it too; a header of one page does not need a second imaging library, and here the sizes are checked before
memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array, Shape, check_affine
from medlore.data.volumes.nifti import Volume, header_for
from medlore.data.volumes.voxel_bytes import as_voxels, beside, check_frame, check_promise, inflate, read_exactly, read_last, skip
from medlore.errors import DataError
from medlore.files import existing_file

_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_SAME = {  # other names of one field -> the name that is asked for here
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB", "Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix", "ElementSize": "ElementSpacing",
}  # fmt: skip
_MOST_HEADER = 1 << 20
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class _Header:
    path: Path
    fields: Mapping[str, str]
    end: int

    def refuse(self, came: str, accepted: str, fix: str = "convert it to NIfTI") -> DataError:
        return DataError(str(self.path), came, accepted, fix)

    def numbers(self, name: str, count: int, of: type = float) -> list[Any]:
        """So many numbers, or a DataError."""
        text = self.fields.get(name, "")
        try:
            found = [of(part) for part in text.split()]
        except (ValueError, OverflowError):
            found = []
        if len(found) != count or not all(math.isfinite(number) for number in found):
            raise self.refuse(f"{name} = {text[:60]!r}", f"{count} finite numbers", "export it again; they cannot be guessed")
        return found

    def flag(self, name: str, default: str = "False") -> bool:
        """True or False, or a DataError."""
        value = self.fields.get(name, default)
        if value[:1] not in ("T", "F", "t", "f", "1", "0"):
            raise self.refuse(f"{name} = {value[:60]!r}", "True or False", "correct the header")
        return value[:1] in ("T", "t", "1")


def is_metaimage(head: bytes) -> bool:
    """Whether these are the first bytes of a MetaImage."""
    return head.lstrip().startswith((b"ObjectType", b"NDims", b"Comment"))


def read_metaimage(path: str | Path, *, frame: int | None = None, most_bytes: int | None = None) -> Volume:
    """Read a .mha file, or a .mhd file whose data file lies beside it.

    Args:
        path: the file.
        frame: None or 0: the file holds one volume.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        DataError: not MetaImage, damaged, without spacing or orientation, or of a kind that is not read here.
    """
    header = _read_header(existing_file(path))
    check_frame(frame, header.path)
    shape, affine = _grid_of(header)
    array = _voxels(header, shape, most_bytes)
    return Volume(array, affine, header_for(affine, shape), shape, header.path)


def read_metaimage_grid(path: str | Path) -> tuple[Shape, Array]:
    """Shape and affine, from the header alone.

    Raises:
        DataError: as `read_metaimage`, as far as the header shows.
    """
    return _grid_of(_read_header(existing_file(path)))


def data_file_of(path: Path) -> Path | None:
    """The file beside a .mhd that holds its voxels; None where the header's own file does.

    Raises:
        DataError: not MetaImage, or the file is not there.
    """
    file, _ = _data_file(_read_header(path))
    return None if file == path else file


def _read_header(path: Path) -> _Header:
    with path.open("rb") as stream:
        content = stream.read(_MOST_HEADER)
    fields: dict[str, str] = {}
    end = 0
    while "ElementDataFile" not in fields:
        newline = content.find(b"\n", end)
        if newline < 0:
            newline = len(content)
        line = content[end:newline].decode("latin-1")
        name, equals, value = line.partition("=")
        name = _SAME.get(name.strip(), name.strip())
        if end >= len(content) or (line.strip() and not equals):
            raise DataError(str(path), "not MetaImage, or no ElementDataFile", "a .mha or .mhd file", "name an image, or convert it")
        if line.strip() and not name.replace("_", "").isalnum():
            raise DataError(str(path), f"the field name {name[:40]!r}", "letters and digits", "the header is damaged; export it again")
        if name in fields:
            raise DataError(str(path), f"the field {name!r} twice", "every field once", "correct the header")
        if line.strip():
            fields[name] = value.strip()
        end = newline + 1
    return _Header(path, fields, min(end, len(content)))


def _grid_of(header: _Header) -> tuple[Shape, Array]:
    if header.fields.get("ObjectType", "Image") != "Image" or header.numbers("NDims", 1, int) != [3]:
        came = f"an object {header.fields.get('ObjectType')!r} of {header.fields.get('NDims')} axes"
        raise header.refuse(came, "an Image of three axes", "split the file, or convert it to NIfTI")
    x, y, z = header.numbers("DimSize", 3, int)
    if min(x, y, z) < 1:
        raise header.refuse(f"an empty volume (DimSize {x} {y} {z})", "at least one voxel along every axis", "export it again")
    affine = np.eye(4)
    # each row of the text is the direction of one axis
    affine[:3, :3] = np.array(header.numbers("TransformMatrix", 9)).reshape(3, 3).T * header.numbers("ElementSpacing", 3)
    affine[:3, 3] = header.numbers("Offset", 3)
    affine = _TO_RAS @ affine
    check_affine(affine, str(header.path))
    return (x, y, z), affine


def _voxels(header: _Header, shape: Shape, most_bytes: int | None) -> Array:
    kind = _kind_of(header)
    size = math.prod(shape) * kind.itemsize
    path, start = _data_file(header)
    packed = header.flag("CompressedData")
    check_promise(size, f"DimSize {shape}, {kind}", path, packed=packed, most_bytes=most_bytes)
    lead = header.numbers("HeaderSize", 1, int)[0] if "HeaderSize" in header.fields else 0
    if lead < -1 or (lead == -1 and packed):
        raise header.refuse(f"HeaderSize = {lead}", "bytes from 0, or -1 for plain voxels that end the file", "correct the header")
    with path.open("rb") as stream:
        stream.seek(start)
        skip(stream, lead, path)
        if lead == -1:
            content = read_last(stream, size, path)
        else:
            content = inflate(stream, size, path) if packed else read_exactly(stream, size, path)
    return as_voxels(content, kind, shape)


def _data_file(header: _Header) -> tuple[Path, int]:
    """The file that holds the voxels, and where they may begin in it."""
    name = header.fields["ElementDataFile"]
    if name.startswith("LIST") or "%" in name:
        raise header.refuse(f"ElementDataFile {name!r}: several files", "one data file", "join them, e.g. with SimpleITK")
    return (header.path, header.end) if name.casefold() == "local" else (beside(header.path, name), 0)


def _kind_of(header: _Header) -> np.dtype[Any]:
    named = header.fields.get("ElementType", "")
    channels = header.fields.get("ElementNumberOfChannels", "1")
    if named not in _TYPES or channels != "1":
        raise header.refuse(f"ElementType {named!r} of {channels} channels", f"one number a voxel: {', '.join(_TYPES)}")
    if not header.flag("BinaryData"):
        raise header.refuse("voxels in letters (BinaryData is not True)", "binary voxels", "write it again with SimpleITK")
    if any(float(header.numbers(name, 1)[0]) != usual for name, usual in _PLAIN.items() if name in header.fields):
        raise header.refuse("a function from voxels to intensities", "voxels that are the intensities", "write it again with SimpleITK")
    return np.dtype((">" if header.flag("BinaryDataByteOrderMSB") else "<") + _TYPES[named])


_PLAIN = {"ElementToIntensityFunctionSlope": 1.0, "ElementToIntensityFunctionOffset": 0.0}
