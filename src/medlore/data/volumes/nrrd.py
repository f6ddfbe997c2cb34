"""NRRD in: the plain kind (one file or .nhdr with a data file, raw or gzip, three space axes), read into the RAS+ frame."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from isal import igzip

from medlore.data.volumes.geometry import Array, check_affine
from medlore.data.volumes.nifti import GZIP_FAULTS, Volume, header_for
from medlore.errors import DataError
from medlore.files import existing_file

_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "short int": "i2", "signed short": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4",
    "uint32_t": "u4", "float": "f4", "double": "f8",
}  # fmt: skip
_TO_RAS = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip


def read_nrrd(path: str | Path) -> Volume:
    """Read a .nrrd or .nhdr file.

    Raises:
        DataError: not NRRD, damaged, or of a kind that is not read here; the message says which field.
    """
    path = existing_file(path)
    content = path.read_bytes()
    head, _, body = content.partition(b"\n\n") if b"\r\n\r\n" not in content[: 1 << 16] else content.partition(b"\r\n\r\n")
    if not head.startswith(b"NRRD000"):
        raise DataError(str(path), "not NRRD", "a file that starts with NRRD0001 to NRRD0005", "name an image, or convert it")
    fields = dict(re.findall(r"^([A-Za-z ]+): ?(.*?)\r?$", head.decode("latin-1"), flags=re.MULTILINE))
    if "data file" in fields or "datafile" in fields:
        body = existing_file(path.parent / (fields.get("data file") or fields["datafile"])).read_bytes()
    shape, affine = _grid(fields, path)
    array = _voxels(fields, body, shape, path)
    return Volume(array, affine, header_for(affine, shape), shape, path)


def _grid(fields: dict[str, str], path: Path) -> tuple[tuple[int, int, int], Array]:
    sizes = [int(v) for v in fields.get("sizes", "").split()]
    vectors = [v for v in re.findall(r"\(([^)]*)\)|\bnone\b", fields.get("space directions", "")) if v]
    signs = _TO_RAS.get(fields.get("space", "").strip().casefold())
    if len(sizes) != 3 or len(vectors) != 3 or signs is None:
        came = f"sizes {sizes}, space {fields.get('space', 'none')!r}, {len(vectors)} space directions"
        accepted = "three axes in space left-posterior-superior (or RAS, LAS) with space directions"
        raise DataError(str(path), came, accepted, "convert it to NIfTI")
    affine = np.eye(4)
    affine[:3, :3] = np.array([[float(x) for x in v.split(",")] for v in vectors]).T
    origin = re.search(r"\(([^)]*)\)", fields.get("space origin", ""))
    affine[:3, 3] = [float(x) for x in origin[1].split(",")] if origin else (0, 0, 0)
    affine = np.diag([*signs, 1.0]) @ affine
    check_affine(affine, str(path))
    return (sizes[0], sizes[1], sizes[2]), affine


def _voxels(fields: dict[str, str], body: bytes, shape: tuple[int, int, int], path: Path) -> Array:
    kind, encoding = _TYPES.get(fields.get("type", "").strip().casefold()), fields.get("encoding", "").strip().casefold()
    if kind is None or encoding not in ("raw", "gzip", "gz"):
        came = f"type {fields.get('type')!r} with encoding {fields.get('encoding')!r}"
        raise DataError(str(path), came, "numbers, raw or gzip", "convert it to NIfTI")
    if encoding != "raw":
        try:
            body = igzip.decompress(body)
        except GZIP_FAULTS as error:
            raise DataError(str(path), f"a damaged or cut-off file ({error})", "a whole file", "copy or export it again") from error
    order = ">" if fields.get("endian", "little").strip().casefold() == "big" else "<"
    dtype = np.dtype(order + kind)
    if len(body) < int(np.prod(shape)) * dtype.itemsize:
        raise DataError(str(path), f"ends after {len(body):,} bytes of voxels", f"{np.prod(shape):,} voxels", "copy or export it again")
    array = np.frombuffer(body, dtype, count=int(np.prod(shape))).reshape(shape, order="F")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
