"""The bytes of voxels, out of plain and packed files: what a header promises is checked first, and no more than that is read.

A header is written by anyone. Before memory is taken, its promise is held against the size of the file (deflate packs no more
than 1032 bytes into one), against the memory of the machine, and against the limit of the caller.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from isal import igzip, isal_zlib

from medlore.data.volumes.geometry import Array, Shape
from medlore.errors import DataError

GZIP = b"\x1f\x8b"
GZIP_FAULTS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, cast("type[Exception]", isal_zlib.error))

_MOST_PACKED = 1032  # deflate packs no more than this into one byte
_BLOCK = 1 << 20
_WHOLE, _AGAIN = "a whole file", "copy or export it again"


class VoxelRange(NamedTuple):
    """The bytes that hold one volume.

    Args:
        start: of the first voxel, in the unpacked file.
        size: bytes.
        shape: of the volume.
        file_shape: of a file that holds this volume alone: the file's own, unless it is one of several.
    """

    start: int
    size: int
    shape: Shape
    file_shape: tuple[int, ...]


def part_of(shape: Sequence[int], frame: int | None, *, start: int, itemsize: int, path: Path) -> VoxelRange:
    """Which bytes of a file are the volume that is meant; trailing axes of one voxel do not count.

    Args:
        shape: of the whole file, the fastest axis first.
        frame: which volume, from 0, where there are several.
        start: of the first voxel of the file.
        itemsize: bytes of a voxel.
        path: for the message.

    Raises:
        DataError: an empty file, more than four axes, or several volumes without the number of one.
    """
    axes = list(shape)
    if len(axes) < 2 or min(axes, default=0) < 1:
        raise DataError(str(path), f"an empty volume (shape {tuple(shape)})", "at least one voxel along every axis", "export it again")
    while len(axes) > 3 and axes[-1] == 1:
        axes.pop()
    if len(axes) > 4:
        raise DataError(str(path), f"{len(axes)}D of shape {tuple(shape)}", "one grey volume", "this looks like a vector field or a series")
    frames = axes[3] if len(axes) == 4 else 1
    if (frames > 1 and frame is None) or not 0 <= (frame or 0) < frames:
        asked = "" if frame is None else f", of which frame {frame} was asked for"
        came = f"4D, {frames} volumes{asked}" if frames > 1 else f"one volume{asked}"
        raise DataError(str(path), came, "one volume", f'name one with "frame": 0 to {frames - 1}, or split the file')
    x, y, z = (*axes, 1)[:3]
    size = x * y * z * itemsize
    return VoxelRange(start + (frame or 0) * size, size, (x, y, z), tuple(shape) if len(axes) < 4 else (x, y, z))


def check_frame(frame: int | None, path: Path) -> None:
    """Refuse the number of a volume where a file holds one.

    Raises:
        DataError: another number than 0.
    """
    if frame not in (None, 0):
        came = f"one volume, of which frame {frame} was asked for"
        raise DataError(str(path), came, "one volume", 'leave "frame" out')


def read_part(stream: IO[bytes], part: VoxelRange, path: Path, *, begun: bytes = b"") -> Array:
    """The bytes of a volume, from a stream whose first bytes `begun` were read before.

    Raises:
        DataError: the file ends earlier.
    """
    skip(stream, part.start - len(begun), path)
    return read_exactly(stream, part.size, path, begun=begun[part.start :])


def check_end(stream: IO[bytes]) -> None:
    """Read a little beyond the voxels: a compressed file that ends with its voxels shows now whether its checksum is right.

    Raises:
        OSError, EOFError or the unpacker's own: it is not.
    """
    stream.read(_BLOCK)


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(2) == GZIP


@contextmanager
def unpacked(path: Path) -> Iterator[Any]:
    """The file as a stream of bytes, unpacked where it is gzip; a damaged one is a DataError wherever it is read."""
    try:
        with igzip.open(path, "rb") if is_gzip(path) else path.open("rb") as stream:
            yield stream
    except GZIP_FAULTS as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """What is said of a file that cannot be unpacked."""
    return DataError(str(path), f"a damaged or cut-off file ({error or type(error).__name__})", _WHOLE, _AGAIN)


def check_promise(size: int, of_what: str, path: Path, *, packed: bool, most_bytes: int | None = None, held: int | None = None) -> None:
    """Refuse a header whose voxels cannot be in the file, or cannot be held.

    Args:
        size: bytes of the unpacked file, as the header says.
        of_what: shape and type, for the message.
        path: the file that holds the voxels.
        packed: whether it is compressed.
        most_bytes: the most that may be held; the memory of the machine unless given.
        held: bytes that will be held at once, where that is not `size`.

    Raises:
        DataError: it does not fit the file, or the memory.
    """
    there = path.stat().st_size
    came = f"a header that promises {size:,} bytes ({of_what})"
    if size > there and not packed:
        raise DataError(str(path), f"ends after {there:,} of {size:,} bytes", _WHOLE, _AGAIN)
    if size > there * _MOST_PACKED:
        raise DataError(str(path), f"{came}, more than a file of {there:,} bytes can hold", "a sound header", _AGAIN)
    check_memory(size if held is None else held, came, path, most_bytes=most_bytes)


def check_memory(size: int, came: str, path: Path, *, most_bytes: int | None = None) -> None:
    """Refuse what cannot be held.

    Raises:
        DataError: more bytes than the machine has, or than the caller allows.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        accepted, fix = f"a volume that fits the memory of {memory:,} bytes", "crop it, or store it in a smaller type"
        raise DataError(str(path), came, accepted, fix)
    if most_bytes is not None and size > most_bytes:
        raise DataError(str(path), came, f"at most {most_bytes:,} bytes", "allow more memory, crop the volume, or store a smaller type")


def read_exactly(stream: IO[bytes], size: int, path: Path, *, begun: bytes = b"") -> Array:
    """So many bytes as an array; `begun` are the first of them, read before.

    Raises:
        DataError: the file ends earlier.
    """
    content = np.empty(size, np.uint8)  # in large pages, where the system has them, and not cleared first
    filled = min(len(begun), size)
    content[:filled] = np.frombuffer(begun, np.uint8, filled)
    while filled < size and (count := stream.readinto(content.data[filled:])):  # type: ignore[attr-defined]
        filled += count
    if filled < size:
        raise DataError(str(path), f"ends after {filled:,} of {size:,} bytes", _WHOLE, _AGAIN)
    return content


def skip(stream: IO[bytes], count: int, path: Path) -> None:
    """Read over so many bytes.

    Raises:
        DataError: the file ends earlier.
    """
    while count > 0:
        block = stream.read(min(_BLOCK, count))
        if not block:
            raise DataError(str(path), f"ends {count:,} bytes before its voxels", _WHOLE, _AGAIN)
        count -= len(block)


def skip_lines(stream: IO[bytes], count: int, path: Path) -> None:
    """Read over so many lines, of any length, without holding one.

    Raises:
        DataError: the file ends earlier.
    """
    while count > 0:
        line = stream.readline(_BLOCK)
        if not line:
            raise DataError(str(path), f"ends {count:,} lines before its voxels", _WHOLE, _AGAIN)
        count -= line.endswith(b"\n")


def read_last(stream: IO[bytes], size: int, path: Path) -> Array:
    """The last `size` bytes of a stream that cannot be sought; no more than these and two blocks are held.

    Raises:
        DataError: there are fewer.
    """
    tail = bytearray()
    while block := stream.read(max(size, _BLOCK)):
        tail += block
        del tail[: max(len(tail) - size, 0)]
    if len(tail) < size:
        raise DataError(str(path), f"ends after {len(tail):,} of {size:,} bytes", _WHOLE, _AGAIN)
    return np.frombuffer(tail, np.uint8)


def inflate(stream: IO[bytes], size: int, path: Path) -> Array:
    """So many bytes out of a zlib stream, whatever more it would unpack to.

    Raises:
        DataError: damaged, or fewer bytes.
    """
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with a header of zlib or of gzip
    content = np.empty(size, np.uint8)
    filled = 0
    try:
        while filled < size and not unpacker.eof:
            packed = unpacker.unconsumed_tail or stream.read(_BLOCK)
            part = unpacker.decompress(packed, size - filled)
            content[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
            filled += len(part)
            if not packed and not part:
                break
    except zlib.error as error:
        raise damaged(path, error) from error
    if filled < size:
        raise DataError(str(path), f"ends after {filled:,} of {size:,} bytes of voxels", _WHOLE, _AGAIN)
    return content


def as_voxels(content: Array, kind: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Bytes as voxels, the first axis fastest, in the byte order of the machine."""
    array = np.frombuffer(content, kind).reshape(shape, order="F")
    return array if kind.isnative else array.astype(kind.newbyteorder("="))


def beside(header: Path, name: str) -> Path:
    """A file that a header names, in its own folder or below it: a header may not lead anywhere else.

    Raises:
        DataError: it leads out of the folder, or is not there.
    """
    path = header.parent / name
    # by the words alone: a link in the folder was laid by its owner
    if "\0" in name or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(header.parent)):  # noqa: PTH100
        raise DataError(str(header), f"a data file in another folder ({name!r})", "one beside the header", "put them side by side")
    if not path.is_file():
        raise DataError(str(header), f"its data file {name!r} is not there", "the file beside the header", "copy both files")
    return path
