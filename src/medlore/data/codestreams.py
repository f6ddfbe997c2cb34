"""How large a compressed image is, before a decoder takes memory for it."""

from __future__ import annotations

import zlib
from typing import Any

from medlore.errors import DataError, reason_of

_J2K = b"\xff\x4f\xff\x51"
_JPEG = b"\xff\xd8"
_NO_SIZE = {0xC4, 0xC8, 0xCC}  # markers in the range of frame headers that are none
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MOST_UNPACKED = 64 << 20
_MOST_LOOKED_AT = 1 << 20


def size_in(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG, JPEG-LS or JPEG 2000 code stream; None where none is found.

    Example:
        >>> size_in(bytes.fromhex("ffd8ffc0000b080010002001011100"))
        (16, 32)
    """
    if (at := frame[:4096].find(_J2K)) >= 0:  # bare, or in the boxes of a JP2 file
        side = [int.from_bytes(frame[at + 8 + 4 * k : at + 12 + 4 * k], "big") for k in range(4)]
        return side[1] - side[3], side[0] - side[2]
    if frame[:2] != _JPEG:
        return None
    at = 2
    while at + 9 <= min(len(frame), _MOST_LOOKED_AT) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:
            at += 1
        elif (0xC0 <= marker <= 0xCF and marker not in _NO_SIZE) or marker == 0xF7:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def is_deflated(content: bytes) -> bool:
    """Whether the first bytes of a DICOM file say that the rest is deflated."""
    return _DEFLATED in content[:4096]


def check_deflated(content: bytes, source: object) -> None:
    """Refuse a deflated DICOM file that unpacks to far more than it holds: pydicom unpacks it whole.

    Raises:
        DataError: it unpacks to more than 64 MiB and 64 times its size, or cannot be unpacked.
    """
    if not is_deflated(content):
        return
    length = int.from_bytes(content[140:144], "little")  # (0002,0000): the length of the file's meta group
    rest, size, most = content[144 + length :], 0, max(_MOST_UNPACKED, 64 * len(content))
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while rest and not unpacker.eof and size <= most:
            size += len(unpacker.decompress(rest, 1 << 20))
            rest = unpacker.unconsumed_tail
    except zlib.error as error:
        raise DataError(str(source), f"a damaged DICOM file ({error})", "a complete DICOM file", "copy or export it again") from error
    if size > most:
        came = f"a deflated file of {len(content):,} bytes that unpacks to more than {most:,}"
        raise DataError(str(source), came, "a DICOM file", "decompress it yourself, if you trust it")


def check_codestream(dataset: Any, source: object, frame: int | None = None) -> None:
    """Refuse an image whose code stream is larger than its DICOM header: the decoder would believe the stream.

    Args:
        dataset: with its pixels.
        source: for the message.
        frame: of a multi-frame object, from 0.

    Raises:
        DataError: the sizes differ.
    """
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_encapsulated or "PixelData" not in dataset:
        return
    wanted = int(dataset.Rows), int(dataset.Columns)
    # the frame's first fragment follows the offset table; its header is looked for in the first bytes
    if frame is None:
        content = dataset.PixelData
        table = int.from_bytes(content[4:8], "little")
        stream = content[8 + table + 8 :]
    else:
        stream = _stream_of(dataset, frame, source)
    found = size_in(stream[:_MOST_LOOKED_AT])
    if found is not None and found != wanted:
        came = f"a compressed image of {found[0]} x {found[1]} in a header of {wanted[0]} x {wanted[1]}"
        raise DataError(str(source), came, "one size", "export it again")


def _stream_of(dataset: Any, frame: int, source: object) -> bytes:
    from pydicom.encaps import get_frame

    try:
        return bytes(get_frame(dataset.PixelData, frame, number_of_frames=int(dataset.NumberOfFrames)))
    except Exception as error:  # of pydicom, for damaged offsets and fragments
        came = f"frame {frame + 1} that cannot be found ({reason_of(error)})"
        raise DataError(str(source), came, "a complete DICOM file", "copy or export it again") from error
