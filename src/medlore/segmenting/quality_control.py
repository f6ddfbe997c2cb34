"""One picture a case: three planes through the masks, outlines, and the names of the labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from medlore.data.volumes.geometry import Array, Crop, orientation_of, spacing_of
from medlore.files import atomic_path
from medlore.pages.colours import label_colour
from medlore.pages.planes import draw_outline, font, grey_plane, printable

if TYPE_CHECKING:
    from medlore.segmenting.segmentation import Segmentation

_CT_WINDOW_HU = (-160.0, 240.0)
_SAMPLED = 200_000  # voxels that say what is dark and what is bright
_NAMED = 24
_DOUBT = (255, 157, 92)  # what the check flagged
_WHITE, _LETTER = (255, 255, 255), (255, 210, 74)
_LINES = 4  # of the verdict that fit over the picture
_PLANE_OF = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
_OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
_UPRIGHT = "ISPALR"  # of the two directions in a plane, the one that comes first here stands upright
_WIDTH, _PLANES_HEIGHT, _GAP, _ROW = 1430, 440, 10, 20  # pixels: of the picture, of the planes, between things, of a line of text
_LARGE, _SMALL, _SWATCH = 15, 13, 26  # of titles and letters, of the legend and doubts, of the line before a name


def write_quality_control(path: str | Path, result: Segmentation, title: str) -> Path:
    """Draw the planes through the centre of the masks (of the volume, where all are empty), the patient's left at the left."""
    grey, affine = _shown(result)
    centre = _centre(grey.shape, result)
    views = _views(orientation_of(affine))
    cuts = {label: found for label in result.routes.labels if (found := _cuts(result, label, views, centre)) is not None}
    window = _window(grey, result.routes.modality)
    heading, names = _Text.heading(title, result), _Text.legend(result, set(cuts))
    top = _GAP + _ROW * len(heading) + _GAP
    picture = Image.new("RGB", (_WIDTH, top + _ROW + _PLANES_HEIGHT + 2 * _GAP + _ROW * math.ceil(len(names) / _columns(names)) + _GAP))
    pen = ImageDraw.Draw(picture)
    for row, text in enumerate(heading):
        text.draw(pen, (_WIDTH / 2, _GAP + _ROW * (row + 0.5)), "mm")
    edges = spacing_of(affine)
    boxes = _boxes([(grey.shape[v.across] * float(edges[v.across]), grey.shape[v.up] * float(edges[v.up])) for v in views], top + _ROW)
    for view, (left, upper, width, height) in zip(views, boxes, strict=True):
        plane = grey_plane(_plane(grey, view, centre[view.axis]), window, (width, height))
        for label, (crop, planes) in cuts.items():
            if view.axis in planes:
                start, shape = (crop.start[view.up], crop.start[view.across]), (grey.shape[view.up], grey.shape[view.across])
                draw_outline(plane, planes[view.axis], start, shape, label_colour(result.routes.labels.index(label)))
        _letters(ImageDraw.Draw(plane), view, width, height)
        picture.paste(plane, (left, upper))
        _Text(view.name, _LARGE).draw(pen, (left + width / 2, upper - _ROW / 2), "mm")
    _draw_legend(pen, names, top + _ROW + _PLANES_HEIGHT + 2 * _GAP)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=2)
    return Path(path)


def _shown(result: Segmentation) -> tuple[Array, Array]:
    """Grey values and affine in the frame in which the masks are held."""
    turn = result.reorientation
    if result.affine is not None:
        return turn.apply(result.prepared.pixels[0].numpy()), turn.apply_to_affine(result.affine)
    return turn.apply(result.volume.array), turn.apply_to_affine(result.volume.affine)


def _centre(shape: tuple[int, ...], result: Segmentation) -> list[int]:
    """The mean centre of the masks, of which one is unpacked at a time."""
    found = (result.boxed(label) for label in result.routes.labels)
    middles = [_middle(*box) for box in found if box is not None]
    return [int(v) for v in np.mean(middles, axis=0)] if middles else [size // 2 for size in shape]


def _middle(crop: Crop, mask: Any) -> Array:
    """Along each axis the mean of the places where the mask has voxels."""
    return np.array([mask.any(axis=tuple(b for b in range(3) if b != a)).nonzero()[0].mean() for a in range(3)]) + crop.start


def _cuts(result: Segmentation, label: str, views: list[_View], centre: list[int]) -> tuple[Crop, dict[int, Array]] | None:
    """The box of a label and, by axis, the planes of it that are shown, where it has voxels in them; None where it is empty."""
    found = result.boxed(label)
    if found is None:
        return None
    crop, mask = found
    planes = {v.axis: _plane(mask, v, centre[v.axis] - crop.start[v.axis]) for v in views
              if crop.start[v.axis] <= centre[v.axis] < crop.stop[v.axis]}  # fmt: skip
    return crop, {axis: plane.copy() for axis, plane in planes.items() if plane.any()}


def _window(grey: Array, modality: str) -> tuple[float, float]:
    step = max(1, round((grey.size / _SAMPLED) ** (1 / 3)))
    sample = grey[::step, ::step, ::step]
    sample = sample[np.isfinite(sample)]
    low, high = (float(v) for v in np.percentile(sample, (1, 99)))
    if modality == "ct" and low < -300 and high > 0:
        return _CT_WINDOW_HU
    return low, max(high, low + 1e-6)


class _View(NamedTuple):
    """A plane across one axis: which axes run across and up the picture, and what lies at its left, right, bottom and top."""

    name: str
    axis: int
    across: int
    up: int
    ends: tuple[str, str, str, str]


def _views(code: str) -> list[_View]:
    """Sagittal, coronal and axial planes of a grid with the orientation `code`."""
    views = []
    for axis in range(3):
        across, up = sorted((a for a in range(3) if a != axis), key=lambda a: -_UPRIGHT.index(code[a]))
        ends = (_OPPOSITE[code[across]], code[across], _OPPOSITE[code[up]], code[up])
        views.append(_View(_PLANE_OF[code[axis]], axis, across, up, ends))
    return sorted(views, key=lambda view: ("sagittal", "coronal", "axial").index(view.name))


def _plane(array: Array, view: _View, index: int) -> Array:
    """Rows up, columns across."""
    plane = array[tuple(index if axis == view.axis else slice(None) for axis in range(3))]  # no copy of the volume, as np.take makes
    return np.asarray(plane.T if view.across < view.up else plane)


class _Text(NamedTuple):
    """A line of text; in the legend the colour of the label goes before it."""

    words: str
    size: int
    colour: tuple[int, int, int] = _WHITE
    swatch: tuple[int, int, int] | None = None

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], anchor: str) -> None:
        pen.text(place, printable(self.words), fill=self.colour, font=font(self.size), anchor=anchor)

    @property
    def width(self) -> int:
        """In pixels, what goes before it included."""
        length: float = font(self.size).getlength(printable(self.words))
        return math.ceil(length) + (0 if self.swatch is None else _SWATCH + 8)

    @classmethod
    def heading(cls, title: str, result: Segmentation) -> list[_Text]:
        """The title, and under it what the check doubts."""
        doubts = [] if result.verdict is None else result.verdict.lines()
        shown = doubts if len(doubts) <= _LINES else [*doubts[: _LINES - 1], f"and {len(doubts) - _LINES + 1} more"]
        return [cls(title, _LARGE, _DOUBT if doubts else _WHITE), *(cls(line, _SMALL, _DOUBT) for line in shown)]

    @classmethod
    def legend(cls, result: Segmentation, found: set[str]) -> list[_Text]:
        """Name and volume of each label, marked where the check flagged it."""
        flagged = set() if result.verdict is None else {flag.label for flag in result.verdict.flags}
        texts = []
        for index, label in enumerate(result.routes.labels[:_NAMED]):
            words = f"{label} {result.voxels(label) * result.voxel_ml():.1f} ml" if label in found else f"{label}: not found"
            doubt = label in flagged
            texts.append(cls(f"{words}  (check)" if doubt else words, _SMALL, _DOUBT if doubt else _WHITE, label_colour(index)))
        hidden = len(result.routes.labels) - _NAMED
        return [*texts, cls(f"and {hidden} more", _SMALL)] if hidden > 0 else texts


def _boxes(sizes_mm: list[tuple[float, float]], top: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of each plane: one scale for all would waste room, so each fills its third."""
    third = _WIDTH // len(sizes_mm)
    boxes = []
    for number, (across, up) in enumerate(sizes_mm):
        scale = min((third - _GAP) / across, _PLANES_HEIGHT / up)
        width, height = max(1, round(across * scale)), max(1, round(up * scale))
        boxes.append((number * third + (third - width) // 2, top + (_PLANES_HEIGHT - height) // 2, width, height))
    return boxes


def _letters(pen: ImageDraw.ImageDraw, view: _View, width: int, height: int) -> None:
    places = ((5, height / 2), (width - 5, height / 2), (width / 2, height - 4), (width / 2, 4))
    for letter, place, anchor in zip(view.ends, places, ("lm", "rm", "mb", "mt"), strict=True):
        pen.text(place, letter, fill=_LETTER, font=font(_LARGE), anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0))


def _columns(names: list[_Text]) -> int:
    widest = max(text.width for text in names) + 2 * _GAP
    return max(1, min(len(names), 5, _WIDTH // widest))


def _draw_legend(pen: ImageDraw.ImageDraw, names: list[_Text], top: int) -> None:
    """Names column by column, in the middle of the picture."""
    columns = _columns(names)
    rows = math.ceil(len(names) / columns)
    parts = [names[i : i + rows] for i in range(0, len(names), rows)]
    widths = [max(text.width for text in part) + 2 * _GAP for part in parts]
    left = (_WIDTH - sum(widths)) / 2 + _GAP
    for part, width in zip(parts, widths, strict=True):
        for row, text in enumerate(part):
            middle = top + _ROW * (row + 0.5)
            if text.swatch is not None:
                pen.line((left, middle, left + _SWATCH, middle), fill=text.swatch, width=4)
            text.draw(pen, (left + (0 if text.swatch is None else _SWATCH + 8), middle), "lm")
        left += width
