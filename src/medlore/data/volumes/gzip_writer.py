"""Gzip files of masks, written fast: a plane of zeros is compressed once and repeated.

Every plane ends with a full flush, so that what is compressed stands for itself wherever it stands in the file; the result is
one ordinary gzip member. Most planes of most masks are empty, and their cost falls to that of a checksum.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from isal import isal_zlib

from medlore.data.volumes.geometry import Array

_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # deflate, no name, no time: equal content gives equal files
_RAW = -15  # deflate without a header of its own
_SMALLEST = 1 << 12  # shorter pieces are not worth a flush


class GzipWriter:
    """A gzip file that takes bytes and planes, one after the other.

    Args:
        path: is overwritten.
        level: of isal, 0 to 3.
        before: bytes that stand unpacked at the beginning of the file.

    Examples:
        >>> import gzip, tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with GzipWriter(Path(folder) / "a.gz") as stream:
        ...         stream.write(b"head")
        ...         stream.write_plane(np.zeros((100, 100), np.uint8))
        ...     len(gzip.decompress((Path(folder) / "a.gz").read_bytes()))
        10004
    """

    def __init__(self, path: Path, *, level: int = 2, before: bytes = b"") -> None:
        self._stream = path.open("wb")
        self._stream.write(before + _HEADER)
        self._level = level
        self._packer = self._new_packer()
        self._checksum = self._size = 0
        self._zeros: tuple[int, bytes] = (0, b"")  # length and compressed form of a plane of zeros

    def write(self, data: Any) -> None:
        """Bytes, or anything that lies in memory as bytes."""
        self._count(data)
        self._stream.write(self._packer.compress(data))

    def write_plane(self, plane: Array) -> None:
        """A plane in the order of its memory (C)."""
        data = plane.data
        if plane.nbytes < _SMALLEST or plane.dtype.kind not in "bu" or plane.max():
            self.write(data)
            return
        self._count(data)
        if self._zeros[0] != plane.nbytes:
            packer = self._new_packer()
            self._zeros = plane.nbytes, packer.compress(data) + packer.flush(isal_zlib.Z_FULL_FLUSH)
        self._stream.write(self._packer.flush(isal_zlib.Z_FULL_FLUSH))
        self._stream.write(self._zeros[1])

    def close(self) -> None:
        """Finish the file."""
        self._stream.write(self._packer.flush())
        self._stream.write(struct.pack("<II", self._checksum, self._size & 0xFFFFFFFF))
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._stream.close()

    def _new_packer(self) -> Any:
        return isal_zlib.compressobj(self._level, isal_zlib.DEFLATED, _RAW)

    def _count(self, data: Any) -> None:
        self._checksum = isal_zlib.crc32(data, self._checksum)
        self._size += memoryview(data).nbytes
