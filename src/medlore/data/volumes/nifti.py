"""NIfTI in and out: an array, its affine, and the header that lets a mask return to exactly the same grid.

nibabel reads and writes the headers; isal (igzip) does the compression, several times faster than zlib. Integer voxels
stay integers, so a CT of 300 slices costs its 150 MB and no more.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.nifti1 import Nifti1Extension
from nibabel.spatialimages import HeaderDataError

from medlore.data.volumes.geometry import Array, Shape, check_affine, orientation_of, spacing_of
from medlore.data.volumes.gzip_writer import GzipWriter
from medlore.errors import DataError, StepError
from medlore.files import atomic_path, existing_file

AffineChoice = Literal["auto", "sform", "qform"]
LABEL_SCHEMA = "medlore/labels/1"

GZIP_FAULTS: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, cast("type[Exception]", isal_zlib.error))

_GZIP = b"\x1f\x8b"
_HEAD = 544  # the longer of the two headers, with the mark of extensions
_NAMES = ("db_name", "aux_file")  # text fields that may name the patient; the free text `descrip` is kept
_MOST_PACKED = 1032  # deflate packs no more than this into one byte
_COMMENT = 6  # NIfTI extension code for plain text
_VOXELS_ALIKE = 0.1  # sform and qform may lie this far apart (in voxels, at any corner) and count as equal


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


def read_nifti(path: str | Path, *, affine_from: AffineChoice = "auto", frame: int | None = None) -> Volume:
    """Read a .nii or .nii.gz file (either byte order, NIfTI-1 or -2).

    Args:
        path: the file; compression is told by its first bytes, not by its name.
        affine_from: which matrix to believe; `auto` takes the sform, else the qform, and refuses two that contradict each other.
        frame: which volume of a 4D file, from 0.

    Raises:
        DataError: not NIfTI, damaged, not three-dimensional, without orientation, or with an absurd grid.
    """
    path = existing_file(path)
    header, start, content = _read_header(path)
    affine, notes = _affine_of(header, affine_from, path)
    check_affine(affine, str(path))
    array = _voxels(header, start, content, path)
    array, file_shape = _three_axes(array, frame, path)
    return Volume(array, affine, header, file_shape, path, tuple(notes))


def read_grid(path: str | Path) -> tuple[Shape, Array]:
    """Shape and affine of a NIfTI file, from its first bytes alone.

    Raises:
        DataError: as `read_nifti`, as far as the header tells.
    """
    path = existing_file(path)
    with path.open("rb") as stream:
        head = stream.read(1 << 16)
    try:
        head = zlib.decompressobj(31).decompress(head, _HEAD) if head[:2] == _GZIP else head
    except zlib.error as error:
        raise DataError(str(path), f"a damaged or cut-off file ({error})", "a whole NIfTI file", "copy or export it again") from error
    header = _parse_header(head, path)
    _check_sizes(header, path)
    affine, _ = _affine_of(header, "auto", path)
    check_affine(affine, str(path))
    x, y, z = (*header.get_data_shape(), 1, 1)[:3]
    return (int(x), int(y), int(z)), affine


def write_nifti(
    path: str | Path, array: Array, like: Volume, *, labels: Mapping[int, str] | None = None, affine: Array | None = None
) -> Path:
    """Write an array on the grid of `like`: its shape, sform, qform, codes, units and description.

    Args:
        path: `.nii.gz` or `.nii`.
        array: x y z, numbers; stored in its own type.
        like: the volume whose grid and header are kept.
        labels: value -> name, kept in the file as a NIfTI comment extension.
        affine: another grid (then sform and qform are set to it); None keeps that of `like`.

    Raises:
        StepError: the file cannot be written, or its geometry is not that of `like` when it is read back.
    """
    header = _output_header(like, array, affine)
    shape = like.file_shape if affine is None else array.shape
    header.set_data_shape(shape)
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
    where there are any the file is written anew without them. One volume of a series, DICOM and NRRD are written too.

    Raises:
        StepError: the file cannot be written.
    """
    same = tuple(volume.header.get_data_shape()) == volume.shape == volume.file_shape
    if same and volume.path.name.endswith(".nii.gz") and not _says_more(volume.path):
        with atomic_path(path) as temporary:
            shutil.copyfile(volume.path, temporary)
        return Path(path)
    return write_nifti(path, volume.array, volume)


def label_table(labels: Mapping[int, str]) -> dict[str, Any]:
    """The label table as it stands in the files."""
    return {"schema": LABEL_SCHEMA, "labels": {str(value): name for value, name in labels.items()}}


def read_label_table(path: str | Path) -> dict[int, str] | None:
    """Value -> name from the extension of a label map; None where it has none."""
    for extension in nib.load(path).header.extensions:
        try:
            content = extension.get_content()
            table = json.loads(content.decode() if isinstance(content, bytes) else content)
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        if isinstance(table, dict) and table.get("schema") == LABEL_SCHEMA:
            return {int(value): str(name) for value, name in table["labels"].items()}
    return None


def check_same_grid(path: str | Path, like: Volume) -> None:
    """Compare the geometry of a written file with that of `like`.

    Raises:
        StepError: shape, affine, sform, qform or their codes differ.
    """
    written = nib.load(path)
    faults = []
    if written.shape != tuple(like.file_shape):
        faults.append(f"shape {written.shape}, not {tuple(like.file_shape)}")
    mine, theirs = written.header, like.header
    for name in ("sform", "qform"):
        (got, code), (want, wanted_code) = getattr(mine, f"get_{name}")(coded=True), getattr(theirs, f"get_{name}")(coded=True)
        if code != wanted_code:
            faults.append(f"{name} code {code}, not {wanted_code}")
        elif want is not None and not np.array_equal(got, want):
            faults.append(f"{name} differs by up to {np.abs(got - want).max():.3g}")
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


def _read_header(path: Path) -> tuple[Any, int, Array]:
    """Header, offset of the voxels, and all bytes of the (unpacked) file."""
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP
    try:
        with igzip.open(path, "rb") if packed else path.open("rb") as stream:
            head = stream.read(_HEAD)
            header = _parse_header(head, path)
            size = _check_sizes(header, path)
            start = int(header.get_data_offset())
            content = np.empty(size, np.uint8)  # in large pages, where the system has them, and not cleared first
            filled = min(len(head), size)
            content[:filled] = np.frombuffer(head, np.uint8, filled)
            while filled < size and (count := stream.readinto(content.data[filled:])):
                filled += count
    except GZIP_FAULTS as error:
        raise DataError(str(path), f"a damaged or cut-off file ({error})", "a whole NIfTI file", "copy or export it again") from error
    if filled < size:
        raise DataError(str(path), f"ends after {filled:,} of {size:,} bytes", "a whole NIfTI file", "copy or export it again")
    return header, start, content


def _says_more(path: Path) -> bool:
    """Whether a .nii.gz file has extensions or names something in the text fields of its header."""
    with igzip.open(path, "rb") as stream:
        head = stream.read(_HEAD)
    header = _parse_header(head, path)
    flag = head[header.sizeof_hdr : header.sizeof_hdr + 1]
    return flag not in (b"", b"\0") or any(bytes(header[name]).strip(b"\0 ") for name in _NAMES)


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
    raise DataError(
        str(path), f"not NIfTI: {kind_of_file}", "NIfTI (.nii, .nii.gz), NRRD, a DICOM folder or zip", "name an image, or convert it"
    )


def _check_sizes(header: Any, path: Path) -> int:
    """Refuse what cannot be a volume before any memory is taken; the bytes of the unpacked file."""
    shape = header.get_data_shape()
    if len(shape) < 2 or min(shape, default=0) < 1:
        raise DataError(str(path), f"an empty volume (shape {tuple(shape)})", "at least one voxel along every axis", "export it again")
    kind = header.get_data_dtype()
    if kind.names is not None or kind.kind not in "iuf":
        raise DataError(str(path), f"voxels of type {kind}", "one real number per voxel", "convert it to a grey volume")
    offset = float(header["vox_offset"])
    if not (offset == 0 or header.sizeof_hdr <= offset < 1 << 31):
        raise DataError(str(path), f"voxels that begin at byte {offset:g}", "an offset behind the header", "export the file again")
    size = int(header.get_data_offset()) + math.prod(int(n) for n in shape) * int(kind.itemsize)
    _check_bytes(size, f"shape {tuple(int(n) for n in shape)}, {kind}", path)
    return size


def _check_bytes(size: int, of_what: str, path: Path) -> None:
    there = path.stat().st_size
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP
    if not packed and size > there:
        raise DataError(str(path), f"ends after {there:,} of {size:,} bytes", "a whole NIfTI file", "copy or export it again")
    came = f"a header that promises {size:,} bytes ({of_what})"
    if size > there * _MOST_PACKED:
        raise DataError(str(path), f"{came}, more than a file of {there:,} bytes can hold", "a sound header", "copy or export it again")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        accepted, fix = f"a volume that fits the memory of {memory:,} bytes", "crop it, or store it in a smaller type"
        raise DataError(str(path), came, accepted, fix)


def _affine_of(header: Any, choice: AffineChoice, path: Path) -> tuple[Array, list[str]]:
    found = {name: getattr(header, f"get_{name}")(coded=True) for name in ("sform", "qform")}
    there = {name: matrix for name, (matrix, code) in found.items() if code > 0 and matrix is not None}
    if choice != "auto":
        if choice not in there:
            raise DataError(str(path), f"has no {choice}", "a header that holds it", "take --affine auto")
        return there[choice], [f"affine taken from the {choice}, as asked"]
    if not there:
        accepted, fix = "a header with an orientation", "write a qform or sform, e.g. with dcm2niix or fslorient; sides cannot be guessed"
        raise DataError(str(path), "neither sform nor qform: left and right are not known", accepted, fix)
    if len(there) == 1:
        return next(iter(there.values())), []
    return there["sform"], _compare_forms(there["sform"], there["qform"], header.get_data_shape(), path)


def _compare_forms(sform: Array, qform: Array, shape: tuple[int, ...], path: Path) -> list[str]:
    size = np.asarray((*shape, 1, 1)[:3]) - 1
    corners = np.array([[x, y, z, 1] for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])], float)
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    smallest = float(spacing_of(sform).min())
    if apart <= _VOXELS_ALIKE * max(smallest, 1e-6):
        return []
    if spacing_of(qform).min() > 0 and orientation_of(sform) == orientation_of(qform):
        return [f"sform and qform lie up to {apart:.2f} mm apart; the sform was taken"]
    codes = " against ".join(orientation_of(m) if spacing_of(m).min() > 0 else "none" for m in (sform, qform))
    accepted, fix = "two matrices that agree", "say which one is right with --affine sform or --affine qform"
    raise DataError(str(path), f"sform and qform contradict each other (orientation {codes})", accepted, fix)


def _voxels(header: Any, start: int, content: Array, path: Path) -> Array:
    kind = header.get_data_dtype()
    flat = np.frombuffer(content, kind, offset=start)
    array = flat.reshape(header.get_data_shape(), order="F")
    if not kind.isnative:
        array = array.astype(kind.newbyteorder("="))
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise DataError(str(path), f"slope and intercept that cannot be used ({error})", "numbers", "export the file again") from error
    if (slope in (None, 1.0)) and (intercept in (None, 0.0)):
        return array
    wide = np.float64 if array.dtype.itemsize > 2 else np.float32
    scaled: Array = array.astype(wide)
    scaled *= slope
    scaled += intercept or 0
    return scaled.astype(np.float32)


def _three_axes(array: Array, frame: int | None, path: Path) -> tuple[Array, tuple[int, ...]]:
    shape = array.shape
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 4:
        if frame is None or not 0 <= frame < array.shape[3]:
            came = f"4D, {array.shape[3]} volumes" + ("" if frame is None else f", of which frame {frame} was asked for")
            raise DataError(str(path), came, "one volume", f'name one with "frame": 0 to {array.shape[3] - 1}, or split the file')
        return array[..., frame], array.shape[:3]
    if array.ndim != 3:
        raise DataError(str(path), f"{array.ndim}D of shape {shape}", "one grey volume", "this looks like a vector field or a series")
    return array, shape


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
