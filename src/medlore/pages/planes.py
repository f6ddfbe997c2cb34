"""Planes of a volume as pictures, drawn with Pillow alone: starting a plotting library takes longer than a small image is segmented.

All sizes are pixels; across runs to the right and up runs upwards, as the rows of a plane do.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medlore.data.volumes.geometry import Array

Colour = tuple[int, int, int]
_FINER = 2  # lines are drawn so many times larger, for smooth edges
_LINE = 2.0

# Of a square of four voxels (1 lower left, 2 lower right, 4 upper left, 8 upper right) that are partly inside: between the middles of
# which two of its sides the outline runs. Where opposite corners are inside, it runs around each of them.
_L, _R, _B, _T = (0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0)
_SIDES = {
    1: [(_L, _B)], 2: [(_B, _R)], 3: [(_L, _R)], 4: [(_L, _T)], 5: [(_B, _T)], 6: [(_L, _T), (_B, _R)], 7: [(_T, _R)],
    8: [(_T, _R)], 9: [(_L, _B), (_T, _R)], 10: [(_B, _T)], 11: [(_L, _T)], 12: [(_L, _R)], 13: [(_B, _R)], 14: [(_L, _B)],
}  # fmt: skip


def grey_plane(plane: Array, window: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """A plane in grey.

    Args:
        plane: up x across, numbers.
        window: what is black and what is white.
        size: width and height of the picture.
    """
    low, high = window
    values = np.nan_to_num(np.asarray(plane, np.float32), nan=low, posinf=high, neginf=low)
    shade = np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(shade[::-1])).resize(size, Image.Resampling.BILINEAR).convert("RGB")


def draw_outline(picture: Image.Image, mask: Array, start: tuple[int, int], shape: tuple[int, int], colour: Colour) -> None:
    """Draw the outline of a mask into the picture of its plane.

    Args:
        picture: of the whole plane.
        mask: up x across, Boolean: a part of the plane.
        start: up and across, where the part begins.
        shape: up x across of the whole plane.
        colour: of the line.
    """
    scale = picture.width / shape[1], picture.height / shape[0]
    loops = [loop + np.array([start[1], start[0]]) + 0.5 for loop in loops_of(outline(mask))]  # across and up, from the edge on
    for loop in loops:
        loop[:, 0] *= scale[0]
        loop[:, 1] = (shape[0] - loop[:, 1]) * scale[1]
    ends = np.concatenate(loops)
    left, top = (int(v) for v in np.floor(ends.min(axis=0) - _LINE))
    right, bottom = (int(v) for v in np.ceil(ends.max(axis=0) + _LINE))
    cover = Image.new("L", ((right - left) * _FINER, (bottom - top) * _FINER))
    pen, width = ImageDraw.Draw(cover), round(_LINE * _FINER)
    for loop in loops:  # one call a loop: a call a piece would be most of the time
        pen.line((((loop - (left, top)) * _FINER) - 0.5).ravel().tolist(), fill=255, width=width)  # Pillow counts from a pixel's middle
    picture.paste(colour, (left, top), cover.reduce(_FINER))


def outline(mask: Array) -> Array:
    """The pieces of the line that runs half-way between what is inside a mask and what is not.

    Args:
        mask: up x across, Boolean.

    Returns:
        n x 2 x 2: both ends of each piece, across and up, in voxels; the middle of the first voxel is 0, 0.

    Examples:
        >>> sorted(map(tuple, outline(np.ones((1, 1), bool)).reshape(-1, 2).tolist()))[:2]
        [(-0.5, 0.0), (-0.5, 0.0)]
    """
    inside = np.pad(np.asarray(mask, np.uint8), 1)
    codes = inside[:-1, :-1] + 2 * inside[:-1, 1:] + 4 * inside[1:, :-1] + 8 * inside[1:, 1:]
    pieces = list(_pieces(codes))
    return np.concatenate(pieces) - 1 if pieces else np.zeros((0, 2, 2))


def loops_of(pieces: Array) -> list[Array]:
    """The pieces of outlines joined to closed lines: at every point exactly two of them meet.

    Args:
        pieces: of `outline`, n 2 2.

    Returns:
        One array a line, points x 2; the last point is the first.
    """
    points = pieces.reshape(-1, 2)
    keys = np.rint(2 * points).astype(np.int64)
    order = np.argsort(keys[:, 0] * (1 << 32) + keys[:, 1], kind="stable")
    partner = np.empty(len(points), np.int64)  # the end of the other piece at the same point
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    following = partner.tolist()
    left, loops = [True] * len(pieces), []
    for first in range(len(pieces)):
        if not left[first]:
            continue
        walked, end = [2 * first], 2 * first + 1
        while left[end // 2]:
            left[end // 2] = False
            walked.append(end)
            end = following[end] ^ 1
        loops.append(points[walked])
    return loops


def _pieces(codes: Array) -> Iterator[Array]:
    for code in np.unique(codes).tolist():
        ups, acrosses = np.nonzero(codes == code)
        corners = np.stack([acrosses, ups], axis=1)[:, None]
        for ends in _SIDES.get(code, ()):
            yield corners + np.array(ends)


@functools.cache
def font(size: int) -> Any:
    """DejaVu Sans where matplotlib has brought it, which is not imported for it; else the plain font inside Pillow."""
    path = _dejavu()
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(str(path), size)


def printable(text: str) -> str:
    """A text in the letters that `font` has: Pillow's own font knows nothing beyond ASCII, so accents are left out there."""
    return text if _dejavu() is not None else unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


@functools.cache
def _dejavu() -> Path | None:
    spec = importlib.util.find_spec("matplotlib")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return path if path is not None and path.is_file() else None
