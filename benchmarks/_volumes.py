"""Volumes of our own making: another array on another grid, with a header that it can be written with."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np

from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import Volume


def on_another_grid(volume: Volume, array: Array, affine: Array) -> Volume:
    """A volume of the same origin, with other voxels.

    Args:
        volume: whose path and notes it keeps.
        array: x y z.
        affine: voxel -> RAS+ mm.
    """
    header = nib.Nifti1Image(np.zeros(array.shape, np.uint8), affine).header
    return replace(volume, array=array, affine=np.asarray(affine, float), header=header, file_shape=array.shape)
