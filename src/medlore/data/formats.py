"""The one table of volume formats: how files are named and told apart, and who reads, finds, measures and writes them.

A new format is one `VolumeFormat` in `FORMATS`: the command line then reads it, finds it in folders, takes it as a mask and
strips its suffix from names. What a format cannot do is None in its record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlore.errors import DataError, InputError, MedloreError

if TYPE_CHECKING:
    from medlore.data.volumes.geometry import Array, Shape
    from medlore.data.volumes.mask_files import MaskFile
    from medlore.data.volumes.nifti import Volume
    from medlore.data.volumes.nifti_affine import AffineChoice

_HEAD = 352  # bytes by which a file is told


@dataclass(frozen=True)
class ReadOptions:
    """What is asked of a reader; each takes what means something for it.

    Args:
        affine_from: which NIfTI matrix to believe.
        frame: which volume of several, from 0.
        series: which DICOM series of several.
        most_bytes: the most that voxels may need.
    """

    affine_from: AffineChoice = "auto"
    frame: int | None = None
    series: str | None = None
    most_bytes: int | None = None


def suffixed(format_: VolumeFormat, folder: Path) -> list[Path]:
    """The plain files of a folder with a suffix of the format."""
    return [path for path in folder.iterdir() if path.is_file() and format_.suffix_of(path.name) and not path.name.startswith(".")]


def plain_masks(format_: VolumeFormat, path: Path) -> MaskFile:
    """A label map without names: whatever the format reads as a volume."""
    from medlore.data.volumes.mask_files import MaskFile

    return MaskFile.of(read_volume_as(format_, path, ReadOptions()))


@dataclass(frozen=True)
class VolumeFormat:
    """One format of files.

    Args:
        name: as people call it.
        suffixes: in small letters, with the dot; a longer one is tried before a shorter.
        read: a file (or folder) as a volume; None where it holds masks alone.
        grid: shape and affine from the header alone; None where everything has to be read.
        told_by: whether the first (unpacked) bytes of a file are those of this format; a format without a mark is told by suffix.
        find: the images of the format in a folder; None where there are none to be found.
        masks: a file of masks, with names where the format has them.
        modality: what a file says of its modality; None where the format cannot say it.
        write: an array on the grid of a volume (or on that of another affine), with names of its values; None where the format
            is not written.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, ReadOptions], Volume] | None
    grid: Callable[[Path, ReadOptions], tuple[Shape, Array]] | None = None
    told_by: Callable[[bytes], bool] | None = None
    find: Callable[[VolumeFormat, Path], list[Path]] | None = suffixed
    masks: Callable[[VolumeFormat, Path], MaskFile] = plain_masks
    modality: Callable[[Path], str | None] | None = None
    write: Callable[[Path, Array, Volume, Mapping[int, str] | None, Array | None], Path] | None = None

    def suffix_of(self, name: str) -> str | None:
        """The suffix that a file's name ends with, if it is one of this format."""
        found = [suffix for suffix in self.suffixes if name.casefold().endswith(suffix)]
        return max(found, key=len, default=None)


# -- the formats -------------------------------------------------------------------------------------------------------


def _read_nifti(path: Path, options: ReadOptions) -> Volume:
    from medlore.data.volumes.nifti import read_nifti

    return read_nifti(path, affine_from=options.affine_from, frame=options.frame, most_bytes=options.most_bytes)


def _nifti_grid(path: Path, options: ReadOptions) -> tuple[Shape, Array]:
    from medlore.data.volumes.nifti import read_grid

    return read_grid(path, affine_from=options.affine_from, frame=options.frame)


def _is_nifti(head: bytes) -> bool:
    from medlore.data.volumes.nifti import is_nifti

    return is_nifti(head)


def _nifti_masks(_: VolumeFormat, path: Path) -> MaskFile:
    from medlore.data.volumes.mask_files import nifti_masks

    return nifti_masks(path)


def _write_nifti(path: Path, array: Array, like: Volume, labels: Mapping[int, str] | None, affine: Array | None) -> Path:
    from medlore.data.volumes.nifti import write_nifti

    return write_nifti(path, array, like, labels=labels, affine=affine)


def _read_nrrd(path: Path, options: ReadOptions) -> Volume:
    from medlore.data.volumes.nrrd import read_nrrd

    return read_nrrd(path, most_bytes=options.most_bytes)


def _nrrd_grid(path: Path, _: ReadOptions) -> tuple[Shape, Array]:
    from medlore.data.volumes.nrrd import read_nrrd_grid

    return read_nrrd_grid(path)


def _nrrd_masks(_: VolumeFormat, path: Path) -> MaskFile:
    from medlore.data.volumes.mask_files import nrrd_masks

    return nrrd_masks(path)


def _read_metaimage(path: Path, options: ReadOptions) -> Volume:
    from medlore.data.volumes.metaimage import read_metaimage

    return read_metaimage(path, most_bytes=options.most_bytes)


def _metaimage_grid(path: Path, _: ReadOptions) -> tuple[Shape, Array]:
    from medlore.data.volumes.metaimage import read_metaimage_grid

    return read_metaimage_grid(path)


def _is_metaimage(head: bytes) -> bool:
    from medlore.data.volumes.metaimage import is_metaimage

    return is_metaimage(head)


def _read_mgh(path: Path, options: ReadOptions) -> Volume:
    from medlore.data.volumes.mgh import read_mgh

    return read_mgh(path, frame=options.frame, most_bytes=options.most_bytes)


def _mgh_grid(path: Path, _: ReadOptions) -> tuple[Shape, Array]:
    from medlore.data.volumes.mgh import read_mgh_grid

    return read_mgh_grid(path)


def _is_mgh(head: bytes) -> bool:
    from medlore.data.volumes.mgh import is_mgh

    return is_mgh(head)


def _read_dicom(path: Path, options: ReadOptions) -> Volume:
    from medlore.data.volumes.dicom import read_dicom

    return read_dicom(path, series=options.series, most_bytes=options.most_bytes)


def _dicom_grid(path: Path, options: ReadOptions) -> tuple[Shape, Array]:
    from medlore.data.volumes.dicom import read_dicom_grid

    return read_dicom_grid(path, series=options.series)


def _is_dicom(head: bytes) -> bool:
    from medlore.data.volumes.dicom_files import is_dicom

    return is_dicom(head)


def _dicom_folders(_: VolumeFormat, folder: Path) -> list[Path]:
    """The folder itself, where it holds DICOM images at any depth: a series is a folder."""
    from medlore.data.volumes.dicom_files import holds_images

    others = [path for other in FORMATS if other.find is suffixed for path in suffixed(other, folder)]
    return [folder] if holds_images(folder, beside=others) else []


def _dicom_masks(_: VolumeFormat, path: Path) -> MaskFile:
    from medlore.data.volumes.mask_files import dicom_masks

    return dicom_masks(path)


def _dicom_modality(path: Path) -> str | None:
    from medlore.data.volumes.dicom import dicom_modality

    return dicom_modality(path)


def _npy_masks(_: VolumeFormat, path: Path) -> MaskFile:
    from medlore.data.volumes.mask_files import npy_masks

    return npy_masks(path)


NIFTI = VolumeFormat("NIfTI", (".nii.gz", ".nii"), _read_nifti, _nifti_grid, _is_nifti, masks=_nifti_masks, write=_write_nifti)
DICOM = VolumeFormat(
    "DICOM", (".dcm", ".zip"), _read_dicom, _dicom_grid, _is_dicom, _dicom_folders, masks=_dicom_masks, modality=_dicom_modality
)
FORMATS: tuple[VolumeFormat, ...] = (
    NIFTI,
    VolumeFormat(
        "NRRD", (".seg.nrrd", ".nrrd", ".nhdr"), _read_nrrd, _nrrd_grid, lambda head: head.startswith(b"NRRD000"), masks=_nrrd_masks
    ),
    VolumeFormat("MetaImage", (".mha", ".mhd"), _read_metaimage, _metaimage_grid, _is_metaimage),
    VolumeFormat("FreeSurfer", (".mgz", ".mgh"), _read_mgh, _mgh_grid, _is_mgh),
    DICOM,
    VolumeFormat("NumPy", (".npy",), None, find=None, masks=_npy_masks),
)


# -- what is asked of the table ----------------------------------------------------------------------------------------


def format_of(path: str | Path) -> VolumeFormat:
    """The format of a file or folder: by its first bytes, else by its suffix; a folder is a DICOM series.

    Raises:
        InputError: there is nothing, or a device or a pipe.
        DataError: none of the formats.
    """
    path = existing_image(path)
    if path.is_dir():
        return DICOM
    head = _first_bytes(path)
    for format_ in FORMATS:
        if format_.told_by is not None and format_.told_by(head):
            return format_
    named = format_named_like(path.name)
    if named is None:
        what = "an empty file" if not head else "a text file" if head.isascii() else "something else"
        raise DataError(str(path), f"no volume: {what}", accepted_volumes(), "name an image, or convert it")
    return named


def format_named_like(name: str) -> VolumeFormat | None:
    """The format whose suffix a file's name has; None where it has none."""
    return max((f for f in FORMATS if f.suffix_of(name)), key=lambda f: len(f.suffix_of(name) or ""), default=None)


def is_volume_name(name: str) -> bool:
    """Whether a file of this name is a volume by itself; a DICOM file may be a picture, or one slice of many."""
    named = format_named_like(name)
    return named is not None and named.read is not None and named.find is suffixed


def stem_of(name: str) -> str:
    """A file's name without the suffix of a volume.

    Example:
        >>> stem_of("ct.nii.gz"), stem_of("liver.seg.nrrd"), stem_of("v1.2")
        ('ct', 'liver', 'v1.2')
    """
    found = format_named_like(name)
    return name if found is None else name[: -len(found.suffix_of(name) or "")]


def accepted_volumes() -> str:
    """All formats that are read as images, in words."""
    return ", ".join(f"{f.name} ({', '.join(f.suffixes)})" for f in FORMATS if f.read is not None)


def existing_image(path: str | Path) -> Path:
    """`path`, if it is a file or a folder.

    Raises:
        InputError: nothing is there, or a device or a pipe, which would be waited for without end.
    """
    path = Path(path)
    if "\0" in str(path) or not path.exists():
        raise InputError(str(path), "no such file or folder", "an existing image", "check the spelling and the current folder")
    if not (path.is_file() or path.is_dir()):
        raise InputError(str(path), "is a device or a pipe", "an image file or a folder", "save the image to a file")
    return path


def read_volume_as(format_: VolumeFormat, path: Path, options: ReadOptions) -> Volume:
    """A volume by a format's reader; whatever a library raises on the way is a DataError that names the file.

    Raises:
        DataError: it cannot be read as one grey volume; the message says why.
    """
    if format_.read is None:
        raise DataError(str(path), f"a {format_.name} file, which holds no place in space", accepted_volumes(), "name an image")
    with refusing(path, format_.name):
        return format_.read(path, options)


def read_grid(path: str | Path, options: ReadOptions | None = None) -> tuple[Shape, Array]:
    """Shape and affine of a volume, from its headers where the format allows it.

    Raises:
        DataError: as for its voxels, as far as the headers tell.
    """
    options = options or ReadOptions()
    format_ = format_of(path)
    if format_.grid is None:
        volume = read_volume_as(format_, Path(path), options)
        return volume.shape, volume.affine
    with refusing(Path(path), format_.name):
        return format_.grid(Path(path), options)


def read_mask_file(path: str | Path) -> MaskFile:
    """The masks of a file, by its format.

    Raises:
        DataError: it cannot be read; the message says why.
    """
    path = existing_image(path)
    format_ = format_of(path)
    with refusing(path, format_.name):
        return format_.masks(format_, path)


def find_images(folder: str | Path) -> list[Path]:
    """The volumes in a folder, sorted: files of any format, or the folder itself where it is a DICOM series.

    Raises:
        DataError: image files and DICOM images side by side: which are meant would be a guess.
    """
    folder = Path(folder)
    found = {format_: format_.find(format_, folder) for format_ in FORMATS if format_.find is not None}
    paths = sorted({path for paths in found.values() for path in paths})
    if folder in paths and len(paths) > 1:
        files = [path.name for path in paths if path != folder]
        faults = ["DICOM images in it or below it", *(f"the file {name}" for name in files)]
        came, fix = "holds DICOM images and image files", "give each its own folder, or name the one that is meant"
        raise DataError(str(folder), came, "one of them", fix, faults=faults)
    return paths


def mask_files(folder: str | Path) -> dict[str, Path]:
    """Stem -> file of all files in a folder that hold one mask each; DICOM files belong together and are none."""
    named = ((path, format_named_like(path.name)) for path in sorted(Path(folder).iterdir()))
    return {stem_of(path.name): path for path, format_ in named if format_ not in (None, DICOM) and path.is_file() and path.name[0] != "."}


def modality_of(path: str | Path) -> str | None:
    """`ct`, `mri`, `pet` or `us`, as the file or folder says itself; None where it says nothing."""
    path = Path(path)
    format_ = format_of(path)
    if format_.modality is None:
        return None
    with refusing(path, format_.name):
        return format_.modality(path)


def write_volume(
    path: str | Path, array: Array, like: Volume, *, labels: Mapping[int, str] | None = None, affine: Array | None = None
) -> Path:
    """Write an array in the format that the file's suffix names, on the grid of `like`.

    Args:
        path: the file.
        array: x y z, numbers; stored in its own type.
        like: the volume whose grid is kept.
        labels: value -> name, kept in the file where the format can.
        affine: another grid; None keeps that of `like`.

    Raises:
        InputError: the suffix is of no format that is written.
        StepError: the file cannot be written.
    """
    path = Path(path)
    format_ = format_named_like(path.name)
    if format_ is None or format_.write is None:
        accepted = ", ".join(suffix for f in FORMATS if f.write is not None for suffix in f.suffixes)
        raise InputError(str(path), "a suffix of no format that is written", accepted, "name another file")
    return format_.write(path, array, like, labels, affine)


@contextmanager
def refusing(path: Path, name: str) -> Iterator[None]:
    """Whatever a library raises or warns of inside is a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MedloreError, MemoryError):
        raise
    except Exception as error:  # of nibabel, NumPy, pydicom, zipfile, ...: they share no parent
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0][:300]
        raise DataError(str(path), f"cannot be read as {name} ({reason})", "a sound file", "copy or export it again") from error


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file, unpacked where it is gzip."""
    from medlore.data.volumes.voxel_bytes import unpacked

    with refusing(path, "a file"), unpacked(path) as stream:
        head: Any = stream.read(_HEAD)
    return bytes(head)
