"""The same image looked at in other ways (`--check thorough`): through windows that lie elsewhere, and in a mirror from left to right.

A network that knows a structure gives it the same voxels however it is cut into windows, and in the mirror image too. One that is lost does
not. The way is a `Look`; what agrees is measured as Dice on the network's grid, between the network's own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.geometry import Array, Crop, GridPath, Reorientation, Resampling, Shape, orientation_of
from medlore.data.volumes.preparation import PackedMasks, Prepared
from medlore.segmenting.first_pass import side_of
from medlore.segmenting.segmentation import Segmentation

Find = Callable[[Prepared, GridPath], Mapping[str, tuple[PackedMasks, int]]]


@dataclass(frozen=True)
class Look:
    """One other way to look at an image.

    Args:
        name: after "Dice ... with".
        there: prepared volume, side of a window along each axis and its overlap -> the volume to look at.
        back: Boolean mask found there, and the shape of the first volume -> the mask in the first volume.
        swaps: whether left and right change places.
    """

    name: str
    there: Callable[[Prepared, Shape, float], Prepared]
    back: Callable[[Array, Prepared, Shape, float], Array]
    swaps: bool = False


def second_opinions(result: Segmentation, prepared: Prepared, find: Find) -> dict[str, dict[str, float]]:
    """Label -> Dice by the way to look; empty unless the plan says that the check is thorough.

    Args:
        result: whose maps hold the network's own masks, on the network's grid.
        prepared: the volume, with its axes in the order of the windows.
        find: runs the network over another volume on a path that stays on the network's grid.
    """
    watch, rules = result.maps, result.plan.rules
    if result.plan.extras.check != "thorough" or watch is None or watch.masks is None:
        return {}
    roi_x, roi_y, roi_z = (rules.roi_size[axis] for axis in result.order)
    roi_size, overlap, labels, masks = (roi_x, roi_y, roi_z), rules.overlap, watch.labels, watch.masks
    told: dict[str, dict[str, float]] = {label: {} for label in labels}
    for look in LOOKS:
        other = look.there(prepared, roi_size, overlap)
        x, y, z = other.pixels.shape[1:]
        found = find(other, staying(prepared.path, (x, y, z)))
        for index, label in enumerate(labels):
            source = _mirrored_name(label) if look.swaps else label
            if source in found:
                packed, place = found[source]
                second = look.back(packed.whole(place), prepared, roi_size, overlap)
                told[label][look.name] = _dice(masks.whole(index), second)
    return told


def staying(path: GridPath, shape: Shape) -> GridPath:
    """The identity on a grid of the network."""
    stay = Reorientation((0, 1, 2), (False, False, False), shape)
    return GridPath(path.network_affine, stay, Resampling(shape, shape, (1.0, 1.0, 1.0)), Crop((0, 0, 0), shape))


def _with(prepared: Prepared, pixels: Tensor, body: Array | None) -> Prepared:
    x, y, z = pixels.shape[1:]
    shape = (int(x), int(y), int(z))
    return replace(prepared, pixels=pixels, body=body, path=staying(prepared.path, shape))


def _shift(roi_size: Shape, overlap: float) -> list[int]:
    """By half of the distance between windows, so that the borders of the new ones lie in the middle of the old."""
    return [max(int(side * (1 - overlap)) // 2, 1) for side in roi_size]


def _shifted(prepared: Prepared, roi_size: Shape, overlap: float) -> Prepared:
    x, y, z = _shift(roi_size, overlap)
    pixels = torch.nn.functional.pad(prepared.pixels, (z, 0, y, 0, x, 0), value=prepared.intensity.air)
    body = None if prepared.body is None else np.pad(prepared.body, ((x, 0), (y, 0), (z, 0)))
    return _with(prepared, pixels, body)


def _unshifted(mask: Array, _prepared: Prepared, roi_size: Shape, overlap: float) -> Array:
    x, y, z = _shift(roi_size, overlap)
    return mask[x:, y:, z:]


def _across(prepared: Prepared) -> int:
    """The axis from left to right."""
    code = orientation_of(prepared.path.network_affine)
    return next(axis for axis, letter in enumerate(code) if letter in "RL")


def _mirrored(prepared: Prepared, _roi_size: Shape, _overlap: float) -> Prepared:
    axis = _across(prepared)
    body = None if prepared.body is None else np.flip(prepared.body, axis)
    return _with(prepared, torch.flip(prepared.pixels, (1 + axis,)), body)


def _unmirrored(mask: Array, prepared: Prepared, _roi_size: Shape, _overlap: float) -> Array:
    return np.flip(mask, _across(prepared))


LOOKS = (
    Look("shifted windows", _shifted, _unshifted),
    Look("the mirror image", _mirrored, _unmirrored, swaps=True),
)


def _mirrored_name(label: str) -> str:
    """`left X` is looked for under `right X` in the mirror."""
    side = side_of(label)
    return label if side is None else f"{'right' if side == 'left' else 'left'}{label.removeprefix(side)}"


def _dice(one: Array, other: Array) -> float:
    """Two empty masks agree."""
    both = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * int(np.count_nonzero(one & other)) / both if both else 1.0
