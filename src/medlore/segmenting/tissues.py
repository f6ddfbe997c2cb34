"""Borders of tissues at the resolution of the file: the network says where, the grey values say how far.

A pack may name tissues that exclude each other (`preprocessing.tissues`, e.g. grey matter, white matter and fluid of mri).
Their probabilities are kept on the network's grid while the windows go by; then a mixture (`data.tissue_mixture`) is fitted there and
each voxel of the file is shared out, a few planes at a time. Where grey values do not separate the tissues, or would not redraw
the network's masks but overturn them, those stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from medlore.data.volumes.geometry import Array, Crop, GridPath, Shape, bounding_box
from medlore.data.volumes.intensity import finite_values
from medlore.data.volumes.interpolation import Taps
from medlore.data.volumes.preparation import PackedMasks, Prepared
from medlore.data.volumes.tissue_mixture import ANY_TISSUE, TissueMixture, fit_mixture

LEAST_SEPARATION = 2.0  # d'; below it, more than 16 % of two equal tissues lie on the wrong side of the best cut
LEAST_KEPT = 0.8  # grey values move borders; where they would move more than a fifth of all voxels, one of the two is wrong
_PLANES_AT_ONCE = 8


@dataclass(eq=False)
class TissueMasks:
    """What became of the tissues of one volume.

    Args:
        masks: in the order of the tissues; None where the network's own stay.
        record: for `case.json`: labels, whether they were redrawn, the fitted Gaussians (in the network's grey values).
    """

    masks: PackedMasks | None
    record: dict[str, Any]


class TissuePass:
    """Keeps the tissues' probabilities while the windows go by, then redraws their borders.

    Args:
        tissues: labels that exclude each other.
        shape: of the network's grid within the crop.
    """

    def __init__(self, tissues: Sequence[str], shape: Shape) -> None:
        self.tissues = tuple(tissues)
        self._prior = np.zeros((len(tissues), *shape), np.float16)  # k x y z

    def keep(self, group: Sequence[str], start: int, probability: Tensor) -> None:
        """Take the finished rows from `start` on (q rows y z) of a group of labels."""
        for index, label in enumerate(group):
            if label in self.tissues:
                rows = probability[index].cpu().numpy()
                self._prior[self.tissues.index(label), start : start + len(rows)] = rows

    def masks(self, prepared: Prepared, path: GridPath, image: Array | None) -> TissueMasks:
        """Fit, and share out the voxels of the output grid.

        Args:
            prepared: the volume on the network's grid.
            path: from the output grid to the network's.
            image: the volume in its own grey values, x y z; None where the output grid is the network's.
        """
        mixture = fit_mixture(prepared.pixels[0].numpy(), self._prior)
        record = {"labels": list(self.tissues), "redrawn": False, **({} if mixture is None else mixture.record())}
        if mixture is None or mixture.separation < LEAST_SEPARATION or mixture.kept < LEAST_KEPT:
            return TissueMasks(None, record)
        found = PackedMasks(path.resampling.shape, len(self.tissues))
        box = bounding_box(self._prior.sum(axis=0, dtype=np.float32) >= ANY_TISSUE)
        if box is not None:
            grey = None if image is None else path.reorientation.apply(finite_values(image, where="image")[0])
            _Redrawing(self._prior, mixture, prepared, path, grey).into(found, box)
        return TissueMasks(found, record | {"redrawn": True})


@dataclass(eq=False)
class _Redrawing:
    prior: Array
    mixture: TissueMixture
    prepared: Prepared
    path: GridPath
    grey: Array | None  # in the orientation of the network

    def into(self, found: PackedMasks, box: Crop) -> None:
        """Fill the masks, a few planes at a time."""
        taps = [self.path.taps(axis) for axis in range(3)]
        x, y, z = (t.reached(first, last) for t, first, last in zip(taps, box.start, box.stop, strict=True))
        z = slice(z.start // 8 * 8, z.stop)
        for first in range(x.start, x.stop, _PLANES_AT_ONCE):
            planes = slice(first, min(first + _PLANES_AT_ONCE, x.stop))
            kept = (planes, y, z)
            posterior = self.mixture.share_out(self._grey(kept), _interpolated(self.prior, taps, kept))
            for label, share in enumerate(posterior):
                found.set_planes(label, planes.start, (y, z), share > 0.5)

    def _grey(self, kept: tuple[slice, slice, slice]) -> Array:
        if self.grey is None:
            return self.prepared.pixels[0].numpy()[kept]
        return self.prepared.intensity.apply(self.grey[kept].astype(np.float32))


def _interpolated(prior: Array, taps: Sequence[Taps], kept: Sequence[slice]) -> Array:
    """The prior at some voxels of the output grid: k x y z float32."""
    values = prior[:, *(t.read(part) for t, part in zip(taps, kept, strict=True))].astype(np.float32)
    for axis, (t, part) in enumerate(zip(taps, kept, strict=True)):
        values = t.gather(values, part, axis=axis + 1)
    return values
