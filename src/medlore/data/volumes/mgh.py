"""FreeSurfer's .mgz and .mgh in; nibabel reads the header."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader

from medlore.data.volumes.geometry import Array, Shape, check_affine
from medlore.data.volumes.nifti import Volume, header_for
from medlore.data.volumes.voxel_bytes import VoxelRange, as_voxels, check_end, check_promise, is_gzip, part_of, read_part, unpacked
from medlore.errors import DataError
from medlore.files import existing_file

_HEAD = 284  # bytes before the voxels
_GOOD_RAS = slice(28, 30)
_VERSION = b"\0\0\0\x01"
_TYPES = {0: "u1", 1: "i4", 3: "f4", 4: "i2", 10: "u2"}


def is_mgh(head: bytes) -> bool:
    """Whether these are the first (unpacked) bytes of an MGH file: version 1, and axes from 1."""
    return head[:4] == _VERSION and len(head) >= 20 and all(int.from_bytes(head[i : i + 4], "big", signed=True) > 0 for i in (4, 8, 12, 16))


def read_mgh(path: str | Path, *, frame: int | None = None, most_bytes: int | None = None) -> Volume:
    """Read a .mgz or .mgh file.

    Args:
        path: the file; compression is recognised by its first bytes, not by its name.
        frame: which volume, from 0, where there are several.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        DataError: not MGH, damaged, without orientation, or several volumes without a number of one.
    """
    path = existing_file(path)
    with unpacked(path) as stream:
        head = stream.read(_HEAD)
        kind, part, whole, affine = _header_of(head, frame, path)
        check_promise(_HEAD + whole, f"shape {part.file_shape}, {kind}", path, packed=is_gzip(path), most_bytes=most_bytes, held=part.size)
        array = as_voxels(read_part(stream, part, path, begun=head), kind, part.shape)
        check_end(stream)
    return Volume(array, affine, header_for(affine, part.shape), part.shape, path)


def read_mgh_grid(path: str | Path) -> tuple[Shape, Array]:
    """Shape and affine, from the header alone.

    Raises:
        DataError: as `read_mgh`, as far as the header shows.
    """
    path = existing_file(path)
    with unpacked(path) as stream:
        _, part, _, affine = _header_of(stream.read(_HEAD), 0, path)
    return part.shape, affine


def _header_of(head: bytes, frame: int | None, path: Path) -> tuple[np.dtype[Any], VoxelRange, int, Array]:
    """Type of the voxels, which are meant, bytes of all of them, and the affine."""
    if len(head) < _HEAD or not is_mgh(head):
        raise DataError(str(path), "not MGH", "a .mgz or .mgh file of FreeSurfer", "name an image, or convert it")
    header = MGHHeader(head, check=False)
    number = int(header["type"])
    if number not in _TYPES:
        raise DataError(str(path), f"voxels of type {number}", f"one of {', '.join(map(str, _TYPES))}", "convert it to NIfTI")
    if int.from_bytes(head[_GOOD_RAS], "big") != 1:  # nibabel would take a coronal default
        accepted, fix = "a header with an orientation", "convert it with mri_convert, naming the orientation; sides cannot be guessed"
        raise DataError(str(path), "no orientation: left and right are not known", accepted, fix)
    kind = np.dtype(">" + _TYPES[number])
    dims = tuple(int(n) for n in header["dims"])
    part = part_of(dims, frame, start=_HEAD, itemsize=kind.itemsize, path=path)
    affine = np.asarray(header.get_affine(), float)
    check_affine(affine, str(path))
    return kind, part, math.prod(dims) * kind.itemsize, affine
