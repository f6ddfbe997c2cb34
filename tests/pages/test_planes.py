"""Outlines are those of contourpy, and a plane lies in its picture as it lies in the body."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medlore.pages import planes
from medlore.pages.planes import draw_outline, grey_plane, loops_of, outline

contourpy = pytest.importorskip("contourpy")


def blobs(seed: int) -> np.ndarray:
    """Smooth shapes that touch the edge, holes and single voxels."""
    noise = np.random.default_rng(seed).standard_normal((40, 31))
    return sum(np.roll(noise, (i, j), (0, 1)) for i in range(3) for j in range(3)) > 1.5


@pytest.mark.parametrize("seed", range(4))
def test_outlines_are_those_of_contourpy(seed: int) -> None:
    mask = blobs(seed)
    lines = contourpy.contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    expected = {tuple(np.round(point - 1, 6)) for line in lines for point in line}
    length = sum(np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines)
    found = outline(mask)
    assert {tuple(point) for point in found.reshape(-1, 2)} == expected
    assert np.linalg.norm(found[:, 0] - found[:, 1], axis=1).sum() == pytest.approx(length)
    ends, counts = np.unique(found.reshape(-1, 2), axis=0, return_counts=True)
    assert (counts == 2).all(), f"{len(ends)} ends: every line is closed"
    loops = loops_of(found)
    assert all((loop[0] == loop[-1]).all() for loop in loops)
    assert sum(np.linalg.norm(np.diff(loop, axis=0), axis=1).sum() for loop in loops) == pytest.approx(length)


def test_the_first_row_of_a_plane_lies_at_the_bottom() -> None:
    plane = np.zeros((10, 20))
    plane[:5, :10] = 1.0
    plane[9, 19] = np.nan  # shown dark
    picture = np.asarray(grey_plane(plane, (0.0, 1.0), (40, 20)))
    assert picture.shape == (20, 40, 3)
    assert picture[15, 10].tolist() == [255, 255, 255]
    assert picture[5, 10].tolist() == picture[15, 30].tolist() == [0, 0, 0]


def test_an_outline_surrounds_its_mask() -> None:
    picture = Image.new("RGB", (200, 100))
    draw_outline(picture, np.ones((2, 3), bool), start=(1, 5), shape=(10, 20), colour=(255, 0, 0))
    rows, columns = np.nonzero(np.asarray(picture)[..., 0] > 127)
    ends = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    # rows 1 and 2 of ten from below, ten pixels each, and half a line around
    assert np.abs(np.subtract(ends, (69, 91, 49, 81))).max() <= 1
    assert not np.asarray(picture)[76:85, 58:73].any(), "inside nothing is drawn"


def test_names_are_legible_with_either_font(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Müller-Lyer: größer (ñ) µ"
    for path, expected in ((planes._dejavu(), name), (None, "Muller-Lyer: groer (n) ")):
        monkeypatch.setattr(planes, "_dejavu", lambda path=path: path)
        planes.font.cache_clear()
        text, pen = planes.printable(name), planes.font(16)
        assert text.startswith(expected)
        unknown = bytes(pen.getmask("\U0010ffff"))
        assert all(bytes(pen.getmask(letter)) != unknown for letter in text if letter != " ")
    planes.font.cache_clear()
