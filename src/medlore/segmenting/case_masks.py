"""The masks of a case as formats take them: one at a time, on the grid of the image or on that of a DICOM series, or as one label map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from medlore.data.formats import write_volume
from medlore.data.volumes.geometry import Array, Shape
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.reference import Reference
from medlore.segmenting.maps import canvas_of
from medlore.segmenting.segmentation import Segmentation

OverlapRule = Literal["small-over-large", "given"]


@dataclass(frozen=True, eq=False)
class CaseMasks:
    """What a format is given to write.

    Args:
        result: the masks of a case.
        files: label -> file of its own mask, for a format of one file a label.
        overlap_rule: who keeps a voxel of a label map that two labels claim.
        reference: a DICOM series on whose slices the masks lie; None for the image itself.
    """

    result: Segmentation
    files: Mapping[str, str]
    overlap_rule: OverlapRule = "small-over-large"
    reference: Reference | None = None

    @property
    def series(self) -> Volume:
        """What objects of DICOM refer to."""
        return self.result.volume if self.reference is None else self.reference.volume

    @property
    def affine(self) -> Array:
        """Of the grid of the output: voxel index -> RAS+ mm."""
        return self.result.volume.affine if self.result.affine is None else self.result.affine

    @property
    def shape(self) -> Shape:
        """Of the grid of the output: x y z."""
        return self.result.reorientation.shape

    def on_image(self, *, empty: bool = True) -> Mapping[str, Array]:
        """Label -> Boolean x y z on the grid of the output, each made when it is asked for; with or without labels that have no voxel."""
        return _OneByOne(self.result, empty=empty)

    def on_series(self, *, empty: bool = True) -> Mapping[str, Array]:
        """The same on the grid of the series."""
        masks = self.on_image(empty=empty)
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
        write_volume(folder / case.files[label], values, result.volume, labels={1: label}, affine=result.affine)
        if found is not None:
            found[0].apply(view)[...] = 0
    names = dict(enumerate(result.routes.labels, start=1))
    write_volume(folder / together, label_map(result, case.overlap_rule), result.volume, labels=names, affine=result.affine)


class _OneByOne(Mapping[str, Array]):
    """Masks, each made when it is asked for."""

    def __init__(self, result: Segmentation, *, empty: bool) -> None:
        self._result = result
        self._labels = [label for label in result.routes.labels if empty or result.voxels(label)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, label: str) -> Array:
        return self._result.mask(label)
