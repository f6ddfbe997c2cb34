"""Images that a program holds: SimpleITK and nibabel images, and arrays or tensors with their affine, as volumes like those of files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medlore.data.volumes.geometry import Array, Shape, check_affine
from medlore.data.volumes.nifti import Volume, header_for, scaled
from medlore.data.volumes.nifti_affine import AffineChoice, affine_of
from medlore.data.volumes.voxel_bytes import part_of
from medlore.errors import DataError, InputError

NAME = Path("image in memory")
ACCEPTED = (
    "a path, a Volume, a SimpleITK image, a nibabel image, or a pair of an array or tensor (x y z) and its affine (4 x 4, to RAS+ mm)"
)
_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def volume_of(image: Any, *, affine_from: AffineChoice = "auto", frame: int | None = None) -> Volume:
    """The volume that an image in memory is.

    Voxels are those of the image, not a copy where their type allows it; nothing is written into them.

    Args:
        image: a SimpleITK or nibabel image, or a pair of voxels (NumPy array or torch tensor, x y z) and affine (voxel index -> RAS+ mm).
        affine_from: which matrix of a NIfTI header to believe.
        frame: which volume of an image with four axes.

    Raises:
        InputError: something else.
        DataError: no one grey volume with a position in space.
    """
    if isinstance(image, nib.spatialimages.SpatialImage):
        return _of_nibabel(image, affine_from, frame)
    itk = sys.modules.get("SimpleITK")  # who holds such an image has imported it
    if itk is not None and isinstance(image, itk.Image):
        return _of_simpleitk(image, itk, frame)
    if isinstance(image, Sequence) and not isinstance(image, str | bytes) and len(image) == 2:
        return _of_array(*image)
    raise InputError("image", f"a {type(image).__name__}", ACCEPTED, "give one of these; an array alone has no position in space")


def _of_nibabel(image: Any, affine_from: AffineChoice, frame: int | None) -> Volume:
    proxy = image.dataobj
    from_file = isinstance(proxy, nib.arrayproxy.ArrayProxy)
    is_nifti = isinstance(image.header, nib.Nifti1Header)
    voxels = np.asanyarray(proxy.get_unscaled() if is_nifti and from_file else proxy)
    part, shape = _one_of(voxels, frame)
    if not is_nifti:
        return _made(part, np.asarray(image.affine, float), shape)
    header = image.header.copy()
    header.set_data_shape(voxels.shape)
    affine, notes = affine_of(header, affine_from, NAME)
    check_affine(affine, str(NAME))
    found = _plain(part)
    if from_file:  # what nibabel has taken out of the header
        header.set_slope_inter(proxy.slope, proxy.inter)
        found, said = scaled(found, header, NAME)
        notes += said
    return Volume(found, affine, header, shape, NAME, tuple(notes))


def _of_simpleitk(image: Any, itk: Any, frame: int | None) -> Volume:
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise _refused(f"an image of {image.GetNumberOfComponentsPerPixel()} values a voxel", "one grey value a voxel")
    size = image.GetDimension()
    part, shape = _one_of(itk.GetArrayViewFromImage(image).T, frame)
    if size < 3:
        raise _refused(f"an image of {size} axes", "three axes")
    affine = np.eye(4)
    affine[:3, :3] = _TO_RAS @ np.reshape(image.GetDirection(), (size, size))[:3, :3] @ np.diag(image.GetSpacing()[:3])
    affine[:3, 3] = _TO_RAS @ image.GetOrigin()[:3]
    return _made(part, affine, shape)


def _of_array(voxels: Any, affine: Any) -> Volume:
    voxels, affine = _numbers(voxels), np.asarray(_numbers(affine), float)
    if voxels.ndim != 3:
        shape = " x ".join(map(str, voxels.shape))
        raise _refused(f"an array of shape {shape}", "three axes x y z", "take the volume that is meant, e.g. array[0]")
    return _made(voxels, affine, voxels.shape)


def _numbers(values: Any) -> Array:
    """A NumPy array of an array, a tensor on any device, or nested lists."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        held = values.detach().cpu()
        return np.asarray((held.float() if held.dtype == torch.bfloat16 else held).numpy())
    return np.asarray(values)


def _one_of(voxels: Array, frame: int | None) -> tuple[Array, tuple[int, ...]]:
    """The volume that is meant, x y z, and the shape that masks of it have: trailing ones stay."""
    part = part_of(voxels.shape, frame, start=0, itemsize=voxels.itemsize, path=NAME)
    return voxels.reshape((*part.shape, -1), copy=False)[..., frame or 0], part.file_shape


def _made(voxels: Array, affine: Array, file_shape: tuple[int, ...]) -> Volume:
    check_affine(affine, str(NAME))
    found = _plain(voxels)
    shape: Shape = (found.shape[0], found.shape[1], found.shape[2])
    header = header_for(affine, shape)
    header.set_data_shape(file_shape)
    return Volume(found, affine, header, file_shape, NAME)


def _plain(voxels: Array) -> Array:
    """Real numbers in the machine's own byte order; truth values are 0 and 1."""
    if voxels.dtype.kind == "b":
        return voxels.astype(np.uint8)
    if voxels.dtype.kind not in "iuf" or not voxels.size:
        raise _refused(f"{voxels.size} voxels of type {voxels.dtype}", "one real number per voxel")
    if voxels.dtype == np.float16:
        return voxels.astype(np.float32)
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def _refused(came: str, accepted: str, fix: str = "give one grey volume") -> DataError:
    return DataError(str(NAME), came, accepted, fix)
