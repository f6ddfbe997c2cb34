"""From a segmented case to its verdict: the evidence of each label is gathered and the checks look at it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from medlore.data.volumes.geometry import Array, bounding_box
from medlore.models.segmenter.vocabulary import REGIONS
from medlore.segmenting.body_part import oddities
from medlore.segmenting.expectations import Expectations
from medlore.segmenting.first_pass import side_of
from medlore.segmenting.scene import Boxed, Edges, Scene, Structure
from medlore.segmenting.segmentation import Segmentation
from medlore.segmenting.verdict import Verdict, judge

_OTHER = {"left": "right", "right": "left"}


def verdict_of(
    result: Segmentation,
    expected: Expectations,
    *,
    brain: Array | None = None,
    dropped_ml: Mapping[str, float] | None = None,
    agreement: Mapping[str, Mapping[str, float]] | None = None,
) -> Verdict:
    """Look at a case.

    Args:
        result: with its masks.
        expected: by the pack, in this modality.
        brain: Boolean, what all structures lie inside, in the frame of the masks; that of the result where it has one.
        dropped_ml: label -> stray parts that were dropped.
        agreement: label -> Dice by the other way to look.
    """
    labels = result.routes.labels
    own = result.boxed(expected.inside) if expected.inside in result.masks else None
    scene = _scene(result, expected, boxed(brain) if brain is not None else own)
    entropies = {} if result.maps is None else result.maps.entropies()
    seen = (
        _structure(result, label, scene, entropies, dropped_ml or {}, agreement or {}) for label in labels
    )  # one mask unpacked at a time
    beside: list[Structure] = []
    if expected.inside in result.masks and expected.inside not in labels:  # asked beside the labels, for this
        beside.append(Structure(str(expected.inside), own, scene, expected.structures.get(str(expected.inside))))
    odd = oddities(result.volume, result.routes.modality, regions_of(result.routes.by_region))
    return judge(itertools.chain(seen, beside), level=result.plan.extras.check, image=odd)


def regions_of(by_region: Mapping[str, list[str]]) -> list[str]:
    """Regions of the labels, where the model knows regions.

    Example:
        >>> regions_of({"brain": ["hippocampus"]}), regions_of({"all regions": ["hippocampus"]})
        (['brain'], [])
    """
    return [region for region in by_region if region in REGIONS]


def boxed(mask: Array) -> Boxed | None:
    """A Boolean volume in its box; None where it is empty."""
    box = bounding_box(mask)
    return None if box is None else (box, box.apply(mask))


def _scene(result: Segmentation, expected: Expectations, brain: Boxed | None) -> Scene:
    turn = result.reorientation
    if result.affine is None:
        return Scene(turn.new_shape, turn.apply_to_affine(result.volume.affine), ((True, True),) * 3, expected, brain)
    return Scene(turn.new_shape, turn.apply_to_affine(np.asarray(result.affine)), _edges_of_crop(result), expected, brain)


def _edges_of_crop(result: Segmentation) -> Edges:
    """Of the network's grid: the crop to the body ends at the image's edge only where it left nothing out."""
    path = result.prepared.path
    ends = zip(path.crop.start, path.crop.stop, path.resampling.new_shape, strict=True)
    edges = [(start == 0, stop == size) for start, stop, size in ends]
    return tuple(edges[axis] for axis in result.order)


def _structure(
    result: Segmentation,
    label: str,
    scene: Scene,
    entropies: Mapping[str, float],
    dropped_ml: Mapping[str, float],
    agreement: Mapping[str, Mapping[str, float]],
) -> Structure:
    return Structure(
        label,
        result.boxed(label),
        scene,
        scene.expected.structures.get(label),
        partner=_partner_ml(result, label),
        dropped_ml=dropped_ml.get(label, 0.0),
        entropy=entropies.get(label),
        agreement=agreement.get(label, {}),
    )


def _partner_ml(result: Segmentation, label: str) -> float | None:
    side = side_of(label)
    other = None if side is None else f"{_OTHER[side]} {label.removeprefix(side).lstrip()}"
    return result.voxels(other) * result.voxel_ml() if other in result.routes.labels else None
