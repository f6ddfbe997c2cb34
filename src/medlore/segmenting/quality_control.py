"""One picture a case: three planes through the masks, outlines, and the names of the labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medlore.data.volumes.geometry import Array, Crop, orientation_of, spacing_of
from medlore.extras import require
from medlore.files import atomic_path
from medlore.pages.colours import label_colour

if TYPE_CHECKING:
    from medlore.segmenting.segmentation import Segmentation

_CT_WINDOW_HU = (-160.0, 240.0)
_NAMED = 24
_PLANE_OF = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
_OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
_UPRIGHT = "ISPALR"  # of the two directions in a plane, the one that comes first here stands upright


def write_quality_control(path: str | Path, result: Segmentation, title: str) -> Path:
    """Draw the planes through the centre of the masks (of the volume, where all are empty), the patient's left at the left."""
    require("matplotlib", "quality_control.png")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey, affine = _shown(result)
    centre = _centre(grey.shape, result)
    views = _views(orientation_of(affine))
    cuts = {label: found for label in result.routes.labels if (found := _cuts(result, label, views, centre)) is not None}
    window = _window(grey, result.routes.modality)
    figure = Figure(figsize=(13, 5.2), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    for plot, view in zip(figure.subplots(1, 3), views, strict=True):
        _draw_plane(plot, grey, view, centre[view.axis], spacing_of(affine), window)
        for label, (crop, planes) in cuts.items():
            if view.axis in planes:
                _outline(plot, crop, planes[view.axis], view, label_colour(result.routes.labels.index(label)))
        plot.set_xlim(-0.5, grey.shape[view.across] - 0.5)
        plot.set_ylim(-0.5, grey.shape[view.up] - 0.5)
        _letters(plot, view)
    _legend(figure, result, set(cuts))
    figure.suptitle(title, color="white", fontsize=11)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="black", format="png")
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
    sample = grey[::3, ::3, ::3] if min(grey.shape) > 12 else grey
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
    plane = np.take(array, index, axis=view.axis)
    return np.asarray(plane.T if view.across < view.up else plane)


def _draw_plane(plot: Any, grey: Array, view: _View, index: int, edges: Array, window: tuple[float, float]) -> None:
    picture = np.nan_to_num(np.asarray(_plane(grey, view, index), np.float32), posinf=window[1], neginf=window[0])
    aspect = float(edges[view.up] / edges[view.across])
    plot.imshow(picture, cmap="gray", origin="lower", aspect=aspect, vmin=window[0], vmax=window[1], interpolation="bilinear")


def _outline(plot: Any, crop: Crop, picture: Array, view: _View, colour: tuple[int, int, int]) -> None:
    padded = np.pad(picture.astype(np.float32), 1)  # so that a mask that touches its box is closed
    across = np.arange(padded.shape[1]) + crop.start[view.across] - 1
    up = np.arange(padded.shape[0]) + crop.start[view.up] - 1
    plot.contour(across, up, padded, levels=[0.5], colors=[tuple(c / 255 for c in colour)], linewidths=1.3)


def _letters(plot: Any, view: _View) -> None:
    plot.set_axis_off()
    plot.set_title(view.name, color="white", fontsize=10)
    style: dict[str, Any] = {"color": "#ffd24a", "fontsize": 10, "transform": plot.transAxes}
    left, right, bottom, top = view.ends
    plot.text(0.01, 0.5, left, va="center", ha="left", **style)
    plot.text(0.99, 0.5, right, va="center", ha="right", **style)
    plot.text(0.5, 0.01, bottom, va="bottom", ha="center", **style)
    plot.text(0.5, 0.99, top, va="top", ha="center", **style)


def _legend(figure: Any, result: Segmentation, found: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles, names = [], []
    for index, label in enumerate(result.routes.labels[:_NAMED]):
        handles.append(Line2D([], [], color=tuple(c / 255 for c in label_colour(index)), linewidth=3))
        names.append(f"{label} {result.voxels(label) * result.voxel_ml():.1f} ml" if label in found else f"{label}: not found")
    hidden = len(result.routes.labels) - _NAMED
    if hidden > 0:
        names[-1] += f"  (and {hidden} more)"
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), fontsize=9, frameon=False, labelcolor="white")
