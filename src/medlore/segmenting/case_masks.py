"""The masks of a case as formats take them: one at a time, on the grid of the image or on that of a DICOM series, or as one label map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medlore.data.formats import write_volume
from medlore.data.volumes.geometry import Array, Crop, Shape, spacing_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.reference import ReferenceSeries
from medlore.segmenting.segmentation import Segmentation, canvas_of

OverlapRule = Literal["small-over-large", "given"]


@dataclass(frozen=True, eq=False)
class CaseMasks:
    """What a format is given to write.

    Args:
        result: the masks of a case.
        files: label -> file of its own mask, for a format of one file a label.
        overlap_rule: who keeps a voxel of a label map that two labels claim.
        reference: a DICOM series on whose slices the masks lie; None for the image itself.
        crop: the part of the output grid that is written; objects of DICOM take all of it, and leave empty slices out.
    """

    result: Segmentation
    files: Mapping[str, str]
    overlap_rule: OverlapRule = "small-over-large"
    reference: ReferenceSeries | None = None
    crop: Crop | None = None

    @property
    def series(self) -> Volume:
        """What objects of DICOM refer to."""
        return self.result.volume if self.reference is None else self.reference.volume

    @property
    def other_affine(self) -> Array | None:
        """Of what is written; None for the grid of the image itself."""
        return self.result.affine if self.crop is None else self.affine

    @property
    def affine(self) -> Array:
        """Of what is written: voxel index -> RAS+ mm."""
        whole = self.result.volume.affine if self.result.affine is None else self.result.affine
        return whole if self.crop is None else self.crop.apply_to_affine(whole)

    @property
    def shape(self) -> Shape:
        """Of what is written: x y z."""
        return self.result.reorientation.shape if self.crop is None else self.crop.new_shape

    def cut(self, values: Array) -> Array:
        """The part of an array on the output grid that is written."""
        return values if self.crop is None else self.crop.apply(values)

    def on_image(self, *, empty: bool = True) -> Mapping[str, Array]:
        """Label -> Boolean x y z on the grid of what is written, each made when it is asked for; with or without empty labels."""
        return _OneByOne(self.result, empty=empty, crop=self.crop)

    def on_series(self, *, empty: bool = True) -> Mapping[str, Array]:
        """The same on the grid of the series."""
        masks = _OneByOne(self.result, empty=empty)
        return masks if self.reference is None else self.reference.masks(masks)


def label_map(result: Segmentation, rule: OverlapRule = "small-over-large") -> Array:
    """One integer per voxel: the label's place in the list, from 1; 0 is background. The smallest type that holds all of them."""
    labels = result.routes.labels
    kind = np.uint8 if len(labels) < 256 else np.uint16
    values, view = canvas_of(result, kind)
    order = sorted(labels, key=result.voxels, reverse=True) if rule == "small-over-large" else list(labels)
    for label in order:  # later ones are painted over earlier ones
        if (found := result.boxed(label)) is not None:
            crop, mask = found
            np.copyto(crop.apply(view), labels.index(label) + 1, where=mask)
    return values


def write_nifti_masks(folder: Path, case: CaseMasks, together: str) -> None:
    """A mask a label, and the label map under the name `together`; one canvas for all masks."""
    result = case.result
    values, view = canvas_of(result, np.uint8)
    for label in result.routes.labels:
        found = result.boxed(label)
        if found is not None:
            found[0].apply(view)[...] = found[1]
        write_volume(folder / case.files[label], case.cut(values), result.volume, labels={1: label}, affine=case.other_affine)
        if found is not None:
            found[0].apply(view)[...] = 0
    names = dict(enumerate(result.routes.labels, start=1))
    codes = case.cut(label_map(result, case.overlap_rule))
    write_volume(folder / together, codes, result.volume, labels=names, affine=case.other_affine)


def union(result: Segmentation) -> Array:
    """Where any label is, on the output grid, uint8."""
    values, view = canvas_of(result, np.uint8)
    for label in result.routes.labels:
        if (found := result.boxed(label)) is not None:
            crop, mask = found
            crop.apply(view)[mask] = 1
    return values


def box_around(result: Segmentation, margin_mm: float) -> Crop | None:
    """The box of all labels on the output grid with so much around it; None where no label has a voxel."""
    boxes = [box for label in result.routes.labels if (box := result.box(label)) is not None]
    if not boxes:
        return None
    affine = result.volume.affine if result.affine is None else result.affine
    margin = np.ceil(margin_mm / spacing_of(affine)).astype(int)
    shape = result.reorientation.shape
    start = np.maximum(np.min([box.start for box in boxes], axis=0) - margin, 0).tolist()
    stop = np.minimum(np.max([box.stop for box in boxes], axis=0) + margin, shape).tolist()
    return Crop((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


class _OneByOne(Mapping[str, Array]):
    """Masks, each made when it is asked for."""

    def __init__(self, result: Segmentation, *, empty: bool, crop: Crop | None = None) -> None:
        self._result, self._crop = result, crop
        self._labels = [label for label in result.routes.labels if empty or result.voxels(label)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, label: str) -> Array:
        mask = self._result.mask(label)
        return mask if self._crop is None else self._crop.apply(mask)
