"""What is written is an ordinary gzip file of the same bytes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
from isal import igzip

from medlore.data.volumes.gzip_writer import GzipWriter


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("side", [10, 100])
def test_planes_come_back(tmp_path: Path, kind: type, side: int) -> None:
    rng = np.random.default_rng(0)
    full = (rng.random((9, side, side)) * 2).astype(kind)
    full[[0, 1, 4, 5, 8]] = 0  # zeros first, last, alone and side by side
    head = b"a header" * 5
    with GzipWriter(tmp_path / "a.gz") as stream:
        stream.write(head)
        for plane in full:
            stream.write_plane(plane)
        stream.write(b"the end")
    wanted = head + full.tobytes() + b"the end"
    packed = (tmp_path / "a.gz").read_bytes()
    assert gzip.decompress(packed) == wanted
    assert igzip.decompress(packed) == wanted
    unpacker = zlib.decompressobj(31)
    assert unpacker.decompress(packed) == wanted
    assert unpacker.eof
    assert unpacker.unused_data == b""  # one member: readers that stop after the first one lose nothing


def test_zeros_cost_next_to_nothing_and_sizes_may_change(tmp_path: Path) -> None:
    planes = [np.zeros((512, 512), np.uint8)] * 50 + [np.zeros((300, 300), np.uint8), np.ones((300, 300), np.uint8)]
    with GzipWriter(tmp_path / "a.gz") as stream:
        for plane in planes:
            stream.write_plane(plane)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"".join(p.tobytes() for p in planes)
    assert (tmp_path / "a.gz").stat().st_size < 512 * 512 * 52 / 150


def test_negative_numbers_are_no_zeros(tmp_path: Path) -> None:
    plane = np.zeros((100, 100), np.int16)
    plane[3, 4] = -3
    with GzipWriter(tmp_path / "a.gz") as stream:
        stream.write_plane(plane)
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == plane.tobytes()
