"""NIfTI in and out: an array, its affine, and the header that lets a mask return to exactly the same grid.

nibabel reads and writes the headers; isal (igzip) does the compression, several times faster than zlib. Integer voxels
stay integers, so a CT of 300 slices costs its 150 MB and no more.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError

from medlore.data.volumes.geometry import Array, Shape, check_affine, spacing_of
from medlore.data.volumes.gzip_writer import GzipWriter
from medlore.data.volumes.nifti_affine import AffineChoice, affine_of
from medlore.data.volumes.voxel_bytes import VoxelRange, as_voxels, check_end, check_promise, is_gzip, part_of, read_part, unpacked
from medlore.errors import DataError, StepError
from medlore.files import atomic_path, existing_file

LABEL_SCHEMA = "medlore/labels/1"

_HEAD = 544  # the longer of the two headers, with the mark of extensions
_NAMES = ("db_name", "aux_file")  # text fields that may name the patient; the free text `descrip` is kept
_COMMENT = 6  # NIfTI extension code for plain text
_MOST_EXTENSION = 64 << 20  # bytes of header extensions that are looked at


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume: voxels and where they lie.

    Args:
        array: x y z voxels as stored (integers stay integers; slope and intercept are applied).
        affine: voxel index -> RAS+ mm.
        header: a NIfTI header of the same grid; masks are written with it.
        file_shape: shape in the file, which may have trailing ones; masks are written in it.
        path: where it came from.
        notes: what was found odd and how it was handled, for the report.
        modality: what the file says (DICOM), else None.
        slices: the DICOM files in the order of z, for DICOM-SEG.
    """

    array: Array
    affine: Array
    header: Any
    file_shape: tuple[int, ...]
    path: Path
    notes: tuple[str, ...] = ()
    modality: str | None = None
    slices: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def shape(self) -> Shape:
        """Voxels along x, y and z."""
        x, y, z = self.array.shape
        return x, y, z

    def with_note(self, note: str) -> Volume:
        """The same volume with one more note."""
        return replace(self, notes=(*self.notes, note))


def read_nifti(path: str | Path, *, affine_from: AffineChoice = "auto", frame: int | None = None, most_bytes: int | None = None) -> Volume:
    """Read a .nii or .nii.gz file (either byte order, NIfTI-1 or -2).

    Args:
        path: the file; compression is recognised by its first bytes, not by its name.
        affine_from: which matrix to believe; `auto` takes the sform, else the qform, and refuses two that contradict each other.
        frame: which volume of a 4D file, from 0; only its voxels are held.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        DataError: not NIfTI, damaged, not three-dimensional, without orientation, or with an absurd grid.
    """
    path = existing_file(path)
    with unpacked(path) as stream:
        head = stream.read(_HEAD)
        header = _parse_header(head, path)
        part = _part_of(header, frame, path)
        affine, notes = affine_of(header, affine_from, path)
        check_affine(affine, str(path))
        _check_sizes(header, part, path, most_bytes)
        content = read_part(stream, part, path, begun=head)
        check_end(stream)
    array, said = scaled(as_voxels(content, header.get_data_dtype(), part.shape), header, path)
    return Volume(array, affine, header, part.file_shape, path, (*notes, *said))


def read_grid(path: str | Path, *, affine_from: AffineChoice = "auto", frame: int | None = None) -> tuple[Shape, Array]:
    """Shape and affine of a NIfTI file, from its first bytes alone; of any one volume where there are several.

    Raises:
        DataError: as `read_nifti`, as far as the header shows.
    """
    path = existing_file(path)
    header = read_header(path)
    shape = tuple(int(n) for n in header.get_data_shape())
    part = _part_of(header, 0 if frame is None and len(shape) == 4 else frame, path)
    _check_sizes(header, part, path, None)
    affine, _ = affine_of(header, affine_from, path)
    check_affine(affine, str(path))
    x, y, z = part.shape
    return (x, y, z), affine


def read_stack(path: Path) -> tuple[Array, Array]:
    """All volumes of a 4D file (x y z q), read once, and the affine.

    Raises:
        DataError: as `read_nifti`.
    """
    with unpacked(path) as stream:
        head = stream.read(_HEAD)
        header = _parse_header(head, path)
        first = _part_of(header, 0, path)
        x, y, z, *rest = (int(n) for n in header.get_data_shape())
        whole = first._replace(size=first.size * math.prod(rest))
        affine, _ = affine_of(header, "auto", path)
        check_affine(affine, str(path))
        _check_sizes(header, whole, path, None)
        content = read_part(stream, whole, path, begun=head)
    array, _ = scaled(as_voxels(content, header.get_data_dtype(), (x, y, z, math.prod(rest))), header, path)
    return array, affine


def read_header(path: Path) -> Any:
    """The header of a NIfTI file, from its first bytes alone.

    Raises:
        DataError: not NIfTI, or damaged.
    """
    with unpacked(path) as stream:
        return _parse_header(stream.read(_HEAD), path)


def read_extensions(path: Path) -> list[bytes]:
    """The contents of the header's extensions, of any code.

    Raises:
        DataError: not NIfTI, or damaged.
    """
    with unpacked(path) as stream:
        head = stream.read(_HEAD)
        header = _parse_header(head, path)
        stop = min(int(header["vox_offset"]), _MOST_EXTENSION)
        content = head + stream.read(max(stop - len(head), 0))
    at, found = header.sizeof_hdr, []
    if content[at : at + 1] in (b"", b"\0"):
        return []
    order: Literal["little", "big"] = "little" if header.endianness == "<" else "big"
    at += 4
    while at + 8 <= stop and 8 <= (size := int.from_bytes(content[at : at + 4], order)) <= stop - at:
        found.append(content[at + 8 : at + size].rstrip(b"\0"))
        at += size
    return found


def write_nifti(
    path: str | Path,
    array: Array,
    like: Volume,
    *,
    labels: Mapping[int, str] | None = None,
    affine: Array | None = None,
    slope: float = 1.0,
) -> Path:
    """Write an array on the grid of `like`: its shape, sform, qform, codes, units and description.

    Args:
        path: `.nii.gz` or `.nii`.
        array: x y z, numbers; stored in its own type.
        like: the volume whose grid and header are kept.
        labels: value -> name, kept in the file as a NIfTI comment extension.
        affine: another grid (then sform and qform are set to it); None keeps that of `like`.
        slope: by which a reader multiplies the stored numbers.

    Raises:
        StepError: the file cannot be written, or its geometry is not that of `like` when it is read back.
    """
    header = _output_header(like, array, affine)
    shape = like.file_shape if affine is None else array.shape
    header.set_data_shape(shape)
    header.set_slope_inter(slope, 0)
    extension = [] if labels is None else [Nifti1Extension(_COMMENT, json.dumps(label_table(labels), ensure_ascii=False).encode())]
    with atomic_path(path) as temporary:
        planes = (np.ascontiguousarray(array[:, :, z].T) for z in range(array.shape[2]))  # no copies in the order of the file
        if str(path).endswith(".gz"):
            with GzipWriter(temporary) as packed:
                packed.write(_head_bytes(header, extension))
                for plane in planes:
                    packed.write_plane(plane)
        else:
            with temporary.open("wb") as stream:
                stream.write(_head_bytes(header, extension))
                for plane in planes:
                    stream.write(plane.data)
    if affine is None:
        check_same_grid(path, like)
    return Path(path)


def copy_image(volume: Volume, path: str | Path) -> Path:
    """The image itself on the same grid: the bytes of its file, unless they hold more than a grid and voxels.

    Header extensions and the fields `db_name` and `aux_file` may name the patient, or hold the label table of something else:
    where there are any the file is written again without them. One volume of a series, DICOM and NRRD are written too.

    Raises:
        StepError: the file cannot be written.
    """
    same = tuple(volume.header.get_data_shape()) == volume.shape == volume.file_shape
    if same and _is_packed_nifti(volume.path) and not _says_more(volume.path):
        with atomic_path(path) as temporary:
            shutil.copyfile(volume.path, temporary)
        return Path(path)
    return write_nifti(path, volume.array, volume)


def _is_packed_nifti(path: Path) -> bool:
    """Whether a file is NIfTI in gzip, whatever it is called."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    with unpacked(path) as stream:
        return packed and is_nifti(stream.read(4))


def label_table(labels: Mapping[int, str]) -> dict[str, Any]:
    """The label table as it stands in the files."""
    return {"schema": LABEL_SCHEMA, "labels": {str(value): name for value, name in labels.items()}}


def check_same_grid(path: str | Path, like: Volume) -> None:
    """Compare the geometry of a written file with that of `like`.

    Raises:
        StepError: shape, affine, sform, qform or their codes differ.
    """
    header = read_header(Path(path))
    shape = tuple(int(n) for n in header.get_data_shape())
    faults = []
    if shape != tuple(like.file_shape):
        faults.append(f"shape {shape}, not {tuple(like.file_shape)}")
    for name, fields in _FORM_FIELDS.items():
        differing = [f for f in fields if not np.array_equal(header[f], like.header[f], equal_nan=True)]
        if differing:
            faults.append(f"the {name} differs ({', '.join(differing)})")
    sides = slice(0, min(len(shape), 3) + 1)
    if not np.array_equal(header["pixdim"][sides], like.header["pixdim"][sides], equal_nan=True):
        faults.append("the spacing differs")
    if faults:
        raise StepError(
            str(path), "was written on another grid", f"the grid of {like.path}", "report this as a fault of MedLoRE", faults=faults
        )


def header_for(affine: Array, shape: Shape) -> Any:
    """A NIfTI header for a grid that came from elsewhere (DICOM, NRRD); scanner coordinates."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_zooms(spacing_of(affine))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)
    header.set_xyzt_units("mm")
    return header


# -- reading -----------------------------------------------------------------------------------------------------------


def _says_more(path: Path) -> bool:
    """Whether a .nii.gz file has extensions or names something in the text fields of its header."""
    with unpacked(path) as stream:
        head = stream.read(_HEAD)
    header = _parse_header(head, path)
    flag = head[header.sizeof_hdr : header.sizeof_hdr + 1]
    return flag not in (b"", b"\0") or any(bytes(header[name]).strip(b"\0 ") for name in _NAMES)


def is_nifti(head: bytes) -> bool:
    """Whether these are the first bytes of a NIfTI file, recognised by the header size that they state."""
    return any(size in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")) for size in (348, 540))


def _parse_header(head: bytes, path: Path) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(head) >= size and size in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")):
            try:
                header = kind.from_fileobj(io.BytesIO(head[:size] + b"\0\0\0\0"), check=True)
            except (HeaderDataError, ValueError) as error:
                raise DataError(str(path), f"a NIfTI header with a fault ({error})", "a sound header", "export the file again") from error
            if bytes(header["magic"])[:2] == b"ni":
                raise DataError(str(path), "the header of a .hdr/.img pair", "a single .nii or .nii.gz", "convert it, e.g. with nibabel")
            return header
    kind_of_file = "an empty file" if not head else "a text file" if head[:256].isascii() and head.strip() else "something else"
    raise DataError(str(path), f"not NIfTI: {kind_of_file}", "a NIfTI file", "name an image, or convert it")


def _part_of(header: Any, frame: int | None, path: Path) -> VoxelRange:
    """Which bytes of the unpacked file are the volume that is meant; everything else is refused, from the header alone."""
    shape = tuple(int(n) for n in header.get_data_shape())
    kind = header.get_data_dtype()
    if kind.names is not None or kind.kind not in "iuf":
        raise DataError(str(path), f"voxels of type {kind}", "one real number per voxel", "convert it to a grey volume")
    offset, first = float(header["vox_offset"]), header.sizeof_hdr + 4  # behind the mark of extensions
    if not first <= offset < 1 << 31:
        accepted = f"an offset behind the header, from {first}"
        raise DataError(str(path), f"voxels that begin at byte {offset:g}", accepted, "export the file again")
    return part_of(shape, frame, start=int(offset), itemsize=int(kind.itemsize), path=path)


def _check_sizes(header: Any, part: VoxelRange, path: Path, most_bytes: int | None) -> None:
    """Refuse what cannot be in the file, or in memory, before any is taken."""
    shape, kind = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
    size = int(header["vox_offset"]) + math.prod(shape) * int(kind.itemsize)
    check_promise(size, f"shape {shape}, {kind}", path, packed=is_gzip(path), most_bytes=most_bytes, held=part.size)


_FORM_FIELDS = {
    "sform": ("sform_code", "srow_x", "srow_y", "srow_z"),
    "qform": ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
}


def scaled(array: Array, header: Any, path: Path) -> tuple[Array, list[str]]:
    """Slope and intercept applied; a slope of 0 means none, as the standard says. And what was odd about them."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError(str(path), f"slope and intercept that cannot be used ({error})", "numbers", "export the file again") from error
    written = float(header["scl_inter"])
    if slope is None and math.isfinite(written) and written:  # other readers add it
        return array, [f"a slope of {float(header['scl_slope']):g} means no scaling, so the intercept {written:g} was left out too"]
    if (slope in (None, 1.0)) and (intercept in (None, 0.0)):
        return array, []
    wide = np.float64 if array.dtype.itemsize > 2 else np.float32
    made: Array = array.astype(wide)
    made *= slope
    made += intercept or 0
    return made.astype(np.float32), []


# -- writing -----------------------------------------------------------------------------------------------------------


def _output_header(like: Volume, array: Array, affine: Array | None) -> Any:
    header = like.header.copy() if like.header.endianness == "<" else like.header.as_byteswapped("<")
    header.set_data_dtype(np.uint8 if array.dtype == np.bool_ else array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_max"], header["cal_min"] = 0, 0
    for name in _NAMES:
        if name in header:
            header[name] = b""
    if affine is not None:
        header.set_data_shape(array.shape)
        header.set_zooms(spacing_of(affine))
        header.set_sform(affine, code=1)
        header.set_qform(affine, code=1, strip_shears=True)
        header.set_xyzt_units("mm")
    return header


def _head_bytes(header: Any, extensions: list[Nifti1Extension]) -> bytes:
    """Header, extensions and padding; the extensions of the input are not passed on (they may name the patient)."""
    header.extensions[:] = extensions
    size = header.sizeof_hdr + 4 + sum(e.get_sizeondisk() for e in extensions)
    header["vox_offset"] = -(-size // 16) * 16
    stream = io.BytesIO()
    header.write_to(stream)
    stream.write(bytes(int(header["vox_offset"]) - stream.tell()))
    return stream.getvalue()
