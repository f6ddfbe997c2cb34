"""The one table of volume formats: how files are named and recognised, and who reads, finds, measures and writes them.

A new format is one `VolumeFormat` in `FORMATS`: the command line then reads it, finds it in folders, takes it as a mask and
strips its suffix from names. What a format cannot do is None in its record.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.data.volumes import dicom, dicom_files, mask_files, metaimage, mgh, nifti, nrrd, rtstruct
from medlore.data.volumes.geometry import Array, Shape
from medlore.data.volumes.mask_files import MaskFile
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.nifti_affine import AffineChoice
from medlore.data.volumes.voxel_bytes import unpacked
from medlore.errors import DataError, InputError, MedloreError, reason_of
from medlore.files import existing_path, sha256_of

_HEAD = 352  # bytes by which a format is recognised


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


def plain_masks(format_: VolumeFormat, path: Path, _: Volume | None) -> MaskFile:
    """A label map without names: whatever the format reads as a volume."""
    return MaskFile.of(read_volume_as(format_, path, ReadOptions()))


@dataclass(frozen=True)
class VolumeFormat:
    """One format of files.

    Args:
        name: as people call it.
        suffixes: in small letters, with the dot; a longer one is tried before a shorter.
        read: a file (or folder) as a volume; None where it holds masks alone.
        grid: shape and affine from the header alone; None where everything has to be read.
        recognised_by: whether the first (decompressed) bytes of a file belong to this format; None: recognised by its suffix alone.
        find: the images of the format in a folder; None where there are none to be found.
        masks: a file of masks, with names where the format has them; outlines lie on an image, which is handed on.
        data_file: the file beside a header that holds its voxels, if any; None where a volume is always one file.
        modality: what a file says of its modality; None where the format cannot say it.
        write: an array on the grid of a volume (or on that of another affine), with names of its values; None where the format
            is not written.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, ReadOptions], Volume] | None
    grid: Callable[[Path, ReadOptions], tuple[Shape, Array]] | None = None
    recognised_by: Callable[[bytes], bool] | None = None
    find: Callable[[VolumeFormat, Path], list[Path]] | None = suffixed
    masks: Callable[[VolumeFormat, Path, Volume | None], MaskFile] = plain_masks
    data_file: Callable[[Path], Path | None] | None = None
    modality: Callable[[Path], str | None] | None = None
    write: Callable[[Path, Array, Volume, Mapping[int, str] | None, Array | None], Path] | None = None

    def suffix_of(self, name: str) -> str | None:
        """The suffix that a file's name ends with, if it is one of this format."""
        found = [suffix for suffix in self.suffixes if name.casefold().endswith(suffix)]
        return max(found, key=len, default=None)


# -- the formats -------------------------------------------------------------------------------------------------------


def _dicom_folders(_: VolumeFormat, folder: Path) -> list[Path]:
    """The folder itself, where it holds DICOM images at any depth: a series is a folder."""
    others = [path for other in FORMATS if other.find is suffixed for path in suffixed(other, folder)]
    return [folder] if dicom_files.holds_images(folder, beside=others) else []


def _dicom_masks(path: Path, on: Volume | None) -> MaskFile:
    """DICOM-SEG, or the outlines of an RTSTRUCT on the image that they were drawn on."""
    return rtstruct.rtstruct_masks(path, on) if dicom_files.find_files(path, modality="RTSTRUCT") else mask_files.dicom_masks(path)


DICOM = VolumeFormat(
    "DICOM",
    (".dcm", ".zip"),
    lambda path, o: dicom.read_dicom(path, series=o.series, frame=o.frame, most_bytes=o.most_bytes),
    lambda path, o: dicom.read_dicom_grid(path, series=o.series, frame=o.frame),
    dicom_files.is_dicom,
    _dicom_folders,
    masks=lambda _, path, on: _dicom_masks(path, on),
    modality=dicom.dicom_modality,
)
FORMATS: tuple[VolumeFormat, ...] = (
    VolumeFormat(
        "NIfTI",
        (".nii.gz", ".nii"),
        lambda path, o: nifti.read_nifti(path, affine_from=o.affine_from, frame=o.frame, most_bytes=o.most_bytes),
        lambda path, o: nifti.read_grid(path, affine_from=o.affine_from, frame=o.frame),
        nifti.is_nifti,
        masks=lambda _, path, __: mask_files.nifti_masks(path),
        write=lambda path, array, like, labels, affine: nifti.write_nifti(path, array, like, labels=labels, affine=affine),
    ),
    VolumeFormat(
        "NRRD",
        (".seg.nrrd", ".nrrd", ".nhdr"),
        lambda path, o: nrrd.read_nrrd(path, frame=o.frame, most_bytes=o.most_bytes),
        lambda path, _: nrrd.read_nrrd_grid(path),
        nrrd.is_nrrd,
        masks=lambda _, path, __: mask_files.nrrd_masks(path),
        data_file=nrrd.data_file_of,
    ),
    VolumeFormat(
        "MetaImage",
        (".mha", ".mhd"),
        lambda path, o: metaimage.read_metaimage(path, frame=o.frame, most_bytes=o.most_bytes),
        lambda path, _: metaimage.read_metaimage_grid(path),
        metaimage.is_metaimage,
        data_file=metaimage.data_file_of,
    ),
    VolumeFormat(
        "FreeSurfer",
        (".mgz", ".mgh"),
        lambda path, o: mgh.read_mgh(path, frame=o.frame, most_bytes=o.most_bytes),
        lambda path, _: mgh.read_mgh_grid(path),
        mgh.is_mgh,
    ),
    DICOM,
    VolumeFormat("NumPy", (".npy",), None, find=None, masks=lambda _, path, __: mask_files.npy_masks(path)),
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
        if format_.recognised_by is not None and format_.recognised_by(head):
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
    return existing_path(path, "an existing image")


def read_volume_as(format_: VolumeFormat, path: Path, options: ReadOptions) -> Volume:
    """A volume by a format's reader; whatever a library raises on the way is a DataError that names the file.

    Raises:
        DataError: it cannot be read as one grey volume; the message says why.
    """
    if format_.read is None:
        raise DataError(str(path), f"a {format_.name} file, which holds no position in space", accepted_volumes(), "name an image")
    with refusing(path, format_.name):
        return format_.read(path, options)


def read_grid(path: str | Path, options: ReadOptions | None = None) -> tuple[Shape, Array]:
    """Shape and affine of a volume, from its headers where the format allows it.

    Raises:
        DataError: as for its voxels, as far as the headers show.
    """
    options = options or ReadOptions()
    format_ = format_of(path)
    if format_.grid is None:
        volume = read_volume_as(format_, Path(path), options)
        return volume.shape, volume.affine
    with refusing(Path(path), format_.name):
        return format_.grid(Path(path), options)


def read_mask_file(path: str | Path, *, on: Volume | None = None) -> MaskFile:
    """The masks of a file, by its format.

    Args:
        path: the file, or the folder of a DICOM object.
        on: the image that the masks belong to; outlines (RTSTRUCT) have no grid of their own.

    Raises:
        DataError: it cannot be read; the message says why.
    """
    path = existing_image(path)
    format_ = format_of(path)
    with refusing(path, format_.name):
        return format_.masks(format_, path, on)


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


def files_of_masks(folder: str | Path) -> dict[str, Path]:
    """Stem -> file of all files in a folder that hold one mask each; DICOM files belong together and are none."""
    named = ((path, format_named_like(path.name)) for path in sorted(Path(folder).iterdir()))
    return {stem_of(path.name): path for path, format_ in named if format_ not in (None, DICOM) and path.is_file() and path.name[0] != "."}


def files_of(path: str | Path) -> list[Path]:
    """The files that a volume or mask is made of: a header's data file counts, a folder is one thing.

    A header that cannot be read, or whose data file is not there, is alone: what is wrong is said when it is read.
    """
    path = Path(path)
    format_ = format_named_like(path.name) if path.is_file() else None
    if format_ is None or format_.data_file is None:
        return [path]
    try:
        with refusing(path, format_.name):
            beside = format_.data_file(path)
    except MedloreError:
        return [path]
    return [path] if beside is None else [path, beside]


def content_hash(path: str | Path) -> str:
    """SHA-256 over all that a volume is made of: two patients' headers may be alike, their data files are not."""
    hashes = [sha256_of(file) for file in files_of(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def modality_of(path: str | Path) -> str | None:
    """`ct`, `mri`, `pet` or `us`, as the file or folder says itself; None where it says nothing."""
    path = Path(path)
    format_ = format_of(path)
    if format_.modality is None:
        return None
    with refusing(path, format_.name):
        return format_.modality(path)


def slice_headers(path: str | Path, options: ReadOptions) -> tuple[Any, ...]:
    """The headers of the slices of a DICOM series, by which masks are known to be drawn on it; none for any other format."""
    path = Path(path)
    if format_of(path) is not DICOM:
        return ()
    with refusing(path, DICOM.name):
        return dicom.read_slice_headers(path, series=options.series, frame=options.frame)


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
        raise DataError(str(path), f"cannot be read as {name} ({reason_of(error)})", "a valid file", "copy or export it again") from error


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file, unpacked where it is gzip."""
    with refusing(path, "a file"), unpacked(path) as stream:
        head: Any = stream.read(_HEAD)
    return bytes(head)
