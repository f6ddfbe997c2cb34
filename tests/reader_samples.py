"""Volume files of every format, sound and damaged, as hypothesis draws them; and who else reads them."""

from __future__ import annotations

import gzip
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK
from hypothesis import reject
from hypothesis import strategies as st

from small_dicom import write_slices

Values = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Sample:
    """Files to write, and which of them (or the folder, if empty) is the volume; sound ones must be read."""

    files: dict[str, bytes]
    name: str
    sound: bool


@dataclass(frozen=True)
class Kind:
    """How a format is drawn, and who else reads it."""

    samples: st.SearchStrategy[Sample]
    independent: Callable[[Path], Values]


numbers = st.one_of(
    st.sampled_from([0.0, -1.0, 1.0, 2.0, 1e-30, 1e30, -1e30, float("nan"), float("inf"), 1e5]), st.floats(-100, 100, width=32)
)
shapes = st.tuples(*[st.integers(1, 5)] * 3)


@st.composite
def grids(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """An affine that a scanner may write: voxels of 0.3 to 5 mm, turned by up to 30 degrees, axes swapped and flipped."""
    from scipy.spatial.transform import Rotation

    spacing = [draw(st.sampled_from([0.3, 0.625, 0.7, 1.0, 1.25, 2.5, 5.0])) for _ in range(3)]
    turn = Rotation.from_euler("xyz", [draw(st.sampled_from([0, 0, 5, -30])) for _ in range(3)], degrees=True).as_matrix()
    order = draw(st.permutations([0, 1, 2]))
    signs = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = turn @ (np.eye(3)[:, order] * signs) * spacing
    affine[:3, 3] = [draw(st.integers(-200, 200)) for _ in range(3)]
    return affine


def voxels(draw: st.DrawFn, kind: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if np.dtype(kind).kind == "f":
        return rng.normal(0, 500, shape).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(max(limits.min, -3000), min(limits.max, 3000), shape, endpoint=True).astype(kind)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int) -> bytes:
    """The bytes cut off, prolonged, or with some of them changed in the header or anywhere."""
    how = draw(st.sampled_from(["cut", "longer", "header byte", "any byte", "swapped"]))
    if how == "cut":
        return content[: draw(st.integers(0, max(len(content) - 1, 0)))]
    if how == "longer":
        return content + draw(st.binary(min_size=1, max_size=9))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, (min(head, len(content)) if how == "header byte" else len(content)) - 1))
        changed[at] = draw(st.integers(0, 255))
    if how == "swapped":
        at = draw(st.integers(0, max(len(content) - 8, 0)))
        changed[at : at + 4], changed[at + 4 : at + 8] = changed[at + 4 : at + 8], changed[at : at + 4]
    return bytes(changed)


# -- NIfTI -------------------------------------------------------------------------------------------------------------

NIFTI_FIELDS = [
    "vox_offset",
    "scl_slope",
    "scl_inter",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "datatype",
    "bitpix",
    "xyzt_units",
    "dim_info",
    "intent_code",
    "slice_start",
    "cal_max",
    "toffset",
    "sizeof_hdr",
]


@st.composite
def nifti_samples(draw: st.DrawFn) -> Sample:
    kind = draw(st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", "i8"]))
    order = draw(st.sampled_from("<>"))
    shape: tuple[int, ...] = draw(shapes)
    sound = draw(st.booleans())
    if not sound:
        shape = draw(st.sampled_from([shape, shape[:2], (*shape, 1), (*shape, 2), (*shape, 1, 3), (1, 1, 1, 1, 1)]))
    affine = draw(grids())
    family = draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    header = family.header_class(endianness=order)
    header.set_data_dtype(np.dtype(kind).newbyteorder(order))
    image = family(voxels(draw, kind, shape), affine, header, dtype=np.dtype(kind).newbyteorder(order))
    for form in draw(st.sampled_from([("sform",), ("qform",), ("sform", "qform")])):
        getattr(image, f"set_{form}")(affine, code=draw(st.integers(1, 4)))
    image.header.set_xyzt_units("mm")
    content = bytearray(image.to_bytes())
    size = image.header.sizeof_hdr
    head = family.header_class(bytes(content[:size]), check=False)
    if draw(st.booleans()):
        head["scl_slope"], head["scl_inter"] = draw(st.sampled_from([(1, 0), (2, -1024), (0.5, 3.25), (0, 0)]))
    if not sound:
        for name in draw(st.lists(st.sampled_from(NIFTI_FIELDS), max_size=3)):
            place = head[name]
            value = draw(numbers)
            head[name] = value if place.dtype.kind == "f" else draw(st.integers(-3, 300)) % (1 << (8 * place.dtype.itemsize - 1))
        if draw(st.integers(0, 3)) == 0:
            axis = draw(st.integers(0, 7))
            head["pixdim"][axis] = draw(numbers)
            head["dim"][axis] = draw(st.sampled_from([-1, 0, 1, 2, 4, 9, 300, 32000]))
    content[:size] = head.binaryblock
    if draw(st.booleans()):
        content = bytearray(gzip.compress(bytes(content), mtime=0))
    if not sound and draw(st.booleans()):
        content = bytearray(draw(damaged(bytes(content), 540)))
    name = draw(st.sampled_from(["a.nii", "a.nii.gz"]))
    return Sample({name: bytes(content)}, name, sound)


def read_with_nibabel(path: Path) -> Values:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = zlib.decompressobj(31).decompress(content)
    family = next(
        f
        for f in (nib.Nifti1Image, nib.Nifti2Image)
        if f.header_class.sizeof_hdr in struct.unpack("<i", content[:4]) + struct.unpack(">i", content[:4])
    )
    header = family.header_class(content[: family.header_class.sizeof_hdr])
    affine = None
    try:
        image = family.from_bytes(content)
    except ValueError as error:  # a quaternion that is too long by rounding: nibabel stops, ITK scales it
        if "w2 should be positive" not in str(error):
            raise
        header["qform_code"] = 0
        image = family.from_bytes(header.binaryblock + content[header.sizeof_hdr :])
        affine = image.affine if header["sform_code"] > 0 else None
    else:
        affine = image.affine
    array = np.asanyarray(image.dataobj)
    scale = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    return array, None if affine is None else np.diag([scale, scale, scale, 1.0]) @ affine


# -- MGH ---------------------------------------------------------------------------------------------------------------


@st.composite
def mgh_samples(draw: st.DrawFn) -> Sample:
    kind = draw(st.sampled_from(["u1", "i2", "i4", "f4"]))
    sound = draw(st.booleans())
    shape: tuple[int, ...] = draw(shapes)
    if not sound and draw(st.booleans()):
        shape = (*shape, 2)
    content = bytearray(nib.MGHImage(voxels(draw, kind, shape), draw(grids())).to_bytes())
    if not sound:
        for _ in range(draw(st.integers(0, 2))):
            at, form = draw(
                st.sampled_from([(0, ">i"), (4, ">i"), (12, ">i"), (16, ">i"), (20, ">i"), (28, ">h"), (30, ">f"), (42, ">f"), (80, ">f")])
            )
            value = draw(numbers) if form == ">f" else draw(st.integers(-2, 12))
            struct.pack_into(form, content, at, value)
    if draw(st.booleans()):
        content = bytearray(gzip.compress(bytes(content), mtime=0))
    if not sound and draw(st.booleans()):
        content = bytearray(draw(damaged(bytes(content), 90)))
    name = draw(st.sampled_from(["a.mgz", "a.mgh"]))
    return Sample({name: bytes(content)}, name, sound)


def read_mgh_with_nibabel(path: Path) -> Values:
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = zlib.decompressobj(31).decompress(content)
    image = nib.MGHImage.from_bytes(content)
    return np.asanyarray(image.dataobj), image.affine


# -- NRRD and MetaImage ------------------------------------------------------------------------------------------------


def vector(values: Any) -> str:
    return f"({','.join(f'{v:.17g}' for v in values)})"


def drawn_lines(draw: st.DrawFn, lines: dict[str, str], odd: dict[str, list[str]], sound: bool) -> dict[str, str]:
    """Lines of a header, some of them taken out or given another value where the file need not be sound."""
    if sound:
        return lines
    for name in draw(st.lists(st.sampled_from(sorted(odd)), max_size=3)):
        value = draw(st.sampled_from(odd[name]))
        if value:
            lines[name] = value
        else:
            lines.pop(name, None)
    return lines


@st.composite
def nrrd_samples(draw: st.DrawFn) -> Sample:
    named = {
        "int8": "i1",
        "uchar": "u1",
        "short": "i2",
        "unsigned short": "u2",
        "int": "i4",
        "uint32": "u4",
        "float": "f4",
        "double": "f8",
        "int64": "i8",
    }
    kind = draw(st.sampled_from(sorted(named)))
    endian, encoding = draw(st.sampled_from(["little", "big"])), draw(st.sampled_from(["raw", "gzip", "gz"]))
    shape, sound, apart = draw(shapes), draw(st.booleans()), draw(st.booleans())
    affine = LPS @ draw(grids())
    body = voxels(draw, named[kind], shape).astype(("<" if endian == "little" else ">") + named[kind]).tobytes(order="F")
    lines_before, bytes_before = draw(st.integers(0, 2)), draw(st.sampled_from([0, 0, 5, -1]))
    lead = b"x" * (7 if bytes_before == -1 else bytes_before)
    body = b"line\n" * (lines_before if bytes_before != -1 else 0) + (
        gzip.compress(lead + body, mtime=0) if encoding != "raw" else lead + body
    )
    lines = {
        "type": kind,
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, shape)),
        "space directions": " ".join(vector(affine[:3, k]) for k in range(3)),
        "space origin": vector(affine[:3, 3]),
        "endian": endian,
        "encoding": encoding,
    }
    if lines_before and bytes_before != -1:
        lines["line skip"] = str(lines_before)
    if bytes_before:
        lines["byte skip"] = str(bytes_before)
    odd = {
        "type": ["", "block", "float", "uint8", "x"],
        "dimension": ["", "2", "4", "x"],
        "space": ["", "RAS", "scanner-xyz", "LAS", "x"],
        "sizes": ["", "2 2", "2 2 2", "0 1 1", "-1 2 3", "9 9 9", "1 2 x", "1000000 1000000 1000000", "2 2 2 1"],
        "space directions": [
            "",
            "none none none",
            "(1,0,0) (0,1,0)",
            "(1,0,0) (1,0,0) (0,0,1)",
            "(1,0) (0,1)",
            "(nan,0,0) (0,1,0) (0,0,1)",
            "(1,0,0) none (0,1,0) (0,0,1)",
        ],
        "space origin": ["", "(1,2)", "(nan,0,0)", "x"],
        "endian": ["", "big", "little", "x"],
        "encoding": ["", "raw", "gzip", "hex", "bzip2", "x"],
        "byte skip": ["", "-1", "-2", "3", "100000", "x"],
        "line skip": ["", "1", "-1", "7", "x"],
        "kinds": ["domain domain domain", "RGB-color domain domain"],
        "data file": ["", "gone.raw", "../v.raw", "LIST", "v%d.raw 1 2 1", "/etc/hostname"],
        "space units": ['"mm" "mm" "mm"', '"x" "x" "x"'],
    }
    if apart:
        lines["data file"] = "v.raw"
    lines = drawn_lines(draw, lines, odd, sound)
    content = "".join(f"{name}: {value}\n" for name, value in lines.items()).encode()
    content = b"NRRD0004\n" + content + (b"" if apart else b"\n" + body)
    if not sound and draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content, 200))
    name = draw(st.sampled_from(["a.nhdr"] if apart else ["a.nrrd"]))
    return Sample({name: content, "v.raw": body} if apart else {name: content}, name, sound)


@st.composite
def metaimage_samples(draw: st.DrawFn) -> Sample:
    named = {
        "MET_CHAR": "i1",
        "MET_UCHAR": "u1",
        "MET_SHORT": "i2",
        "MET_USHORT": "u2",
        "MET_INT": "i4",
        "MET_UINT": "u4",
        "MET_FLOAT": "f4",
        "MET_DOUBLE": "f8",
        "MET_LONG_LONG": "i8",
    }
    kind = draw(st.sampled_from(sorted(named)))
    big, packed, apart, sound = (draw(st.booleans()) for _ in range(4))
    shape, affine = draw(shapes), LPS @ draw(grids())
    body = voxels(draw, named[kind], shape).astype((">" if big else "<") + named[kind]).tobytes(order="F")
    body = zlib.compress(body) if packed else body
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": str(big),
        "CompressedData": str(packed),
        "TransformMatrix": " ".join(f"{v:.17g}" for v in (affine[:3, :3] / spacing).T.ravel()),
        "Offset": " ".join(f"{v:.17g}" for v in affine[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": " ".join(f"{v:.17g}" for v in spacing),
        "DimSize": " ".join(map(str, shape)),
        "ElementType": kind,
        "ElementDataFile": "v.raw" if apart else "LOCAL",
    }
    if packed:
        lines = {
            **{k: v for k, v in lines.items() if k != "ElementDataFile"},
            "CompressedDataSize": str(len(body)),
            "ElementDataFile": lines["ElementDataFile"],
        }
    odd = {
        "ObjectType": ["", "Mesh", "x"],
        "NDims": ["", "2", "4", "x"],
        "BinaryData": ["", "False", "x"],
        "BinaryDataByteOrderMSB": ["True", "False", "x"],
        "CompressedData": ["", "True", "False", "x"],
        "TransformMatrix": ["", "1 0 0 1", "0 0 0 0 0 0 0 0 0", "nan 0 0 0 1 0 0 0 1", "x"],
        "Offset": ["", "1 2", "nan 0 0", "x"],
        "ElementSpacing": ["", "1 1", "0 1 1", "-1 1 1", "nan 1 1", "x"],
        "ElementType": ["", "MET_FLOAT", "MET_UCHAR", "MET_SHORT_ARRAY", "x"],
        "DimSize": ["", "2 2", "2 2 2", "0 1 1", "-1 2 3", "9 9 9", "1000000 1000000 1000000", "x"],
        "ElementNumberOfChannels": ["1", "3", "x"],
        "ElementDataFile": ["gone.raw", "../v.raw", "LIST", "v%d.raw 1 2 1", "/etc/hostname"],
        "HeaderSize": ["0", "-1", "3", "-2", "100000", "x"],
    }
    lines = drawn_lines(draw, lines, odd, sound)
    lines["ElementDataFile"] = lines.pop("ElementDataFile", "LOCAL")  # it is the last line
    content = "".join(f"{name} = {value}\n" for name, value in lines.items()).encode() + (b"" if apart else body)
    if not sound and draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content, 200))
    name = "a.mhd" if apart else "a.mha"
    return Sample({name: content, "v.raw": body} if apart else {name: content}, name, sound)


def read_with_simpleitk(path: Path) -> Values:
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, LPS @ affine


# -- DICOM -------------------------------------------------------------------------------------------------------------

DICOM_VALUES: dict[str, list[Any]] = {
    "RescaleSlope": [None, "2", "0.5", "0", "1e400"],
    "RescaleIntercept": [None, "-5", "0.25"],
    "Modality": [None, "MR", "PT", "SEG", "XX"],
    "PixelSpacing": [None, [0.5, 2], [0, 1], [-1, 1], [1]],
    "SliceThickness": [None, 3],
    "ImageOrientationPatient": [None, [0, 1, 0, 0, 0, -1], [1, 0, 0, 1, 0, 0], [1, 0, 0]],
    "ImagePositionPatient": [None, [0, 0, 0], [1, 2]],
    "Rows": [None, 0, 2, 100],
    "Columns": [None, 0, 3, 100],
    "BitsStored": [None, 12, 8, 1, 40],
    "HighBit": [None, 15, 11, 3],
    "BitsAllocated": [None, 8, 16, 32, 7],
    "PixelRepresentation": [None, 1, 0],
    "SamplesPerPixel": [None, 3],
    "NumberOfFrames": [None, 1, 4],
    "PhotometricInterpretation": [None, "MONOCHROME1", "RGB", "PALETTE COLOR"],
    "SeriesInstanceUID": [None, "1.2.3"],
    "PatientID": [None, "7"],
    "FrameOfReferenceUID": [None, "1.2.4"],
    "StudyInstanceUID": [None, "1.2.5"],
    "PixelPaddingValue": [None, 0, 65535],
    "InstanceNumber": [None, 0],
    "SOPClassUID": [None, "1.2.6"],
    "PatientName": ["M\u00fcller", ""],
    "SpecificCharacterSet": [None, "ISO_IR 100", "nothing"],
    "GantryDetectorTilt": [None, 14],
}


@st.composite
def dicom_samples(draw: st.DrawFn) -> Sample:
    kind = draw(st.sampled_from([np.uint16, np.int16, np.uint8, np.uint32]))
    sound = draw(st.booleans())
    x, y, _ = draw(shapes)
    array = voxels(draw, np.dtype(kind).str, (x, y, 3))
    slope = draw(st.sampled_from([("1", "-1024"), ("1", "0"), ("0.5", "0.25"), ("3", "7")]))
    step = draw(st.sampled_from([1.0, 0.625, 2.5]))
    faults = (
        []
        if sound
        else draw(st.lists(st.tuples(st.sampled_from(sorted(DICOM_VALUES)), st.integers(0, 9), st.booleans(), st.booleans()), max_size=3))
    )

    def each(d: Any, z: int) -> None:
        d.ImagePositionPatient = [0, 0, step * z]
        d.RescaleSlope, d.RescaleIntercept = slope
        for name, which, gone, everywhere in faults:
            if everywhere or z == 1:
                value = DICOM_VALUES[name][which % len(DICOM_VALUES[name])]
                if gone and name in d:
                    delattr(d, name)
                elif not gone:
                    setattr(d, name, value)

    files = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with warnings.catch_warnings(action="ignore"):  # pydicom warns of some values, and writes them
                write_slices(Path(folder) / "s", array, each=each, mr=draw(st.booleans()), seed="drawn")
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # a value that pydicom does not write
            reject()
        for number, file in enumerate(sorted((Path(folder) / "s").iterdir())):
            files[f"{number}.dcm"] = file.read_bytes()
    if not sound and draw(st.integers(0, 2)) == 0:
        name = draw(st.sampled_from(sorted(files)))
        files[name] = draw(damaged(files[name], 400))
    return Sample(files, "", sound)


def read_with_pydicom(folder: Path) -> Values:
    """The plain formula, slice by slice, at the places that the headers give; what tells no place is not compared."""
    found = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    found = [d for d in found if "PixelData" in d]
    across, down = np.array(found[0].ImageOrientationPatient, float).reshape(2, 3)
    found.sort(key=lambda d: float(np.array(d.ImagePositionPatient, float) @ np.cross(across, down)))
    planes = []
    for d in found:
        raw = d.pixel_array.astype(float)
        bits = int(d.BitsStored)
        if bits < int(d.BitsAllocated):  # what lies above does not count (GDCM)
            raw = raw % (1 << bits)
            raw = np.where((d.PixelRepresentation == 1) & (raw >= 1 << (bits - 1)), raw - (1 << bits), raw)
        values = raw * float(d.get("RescaleSlope") or 1) + float(d.get("RescaleIntercept") or 0)
        padding = d.get("PixelPaddingValue")
        if padding is not None and d.get("Modality") == "CT":
            stored = int(padding) % (1 << int(d.BitsAllocated))
            values = np.where(raw % (1 << int(d.BitsAllocated)) == stored, np.minimum(values, -1024), values)
        planes.append(values.T)
    first, last = (np.array(found[k].ImagePositionPatient, float) for k in (0, -1))
    rows_mm, columns_mm = (float(v) for v in found[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * columns_mm, down * rows_mm
    affine[:3, 2] = (last - first) / (len(found) - 1) if len(found) > 1 else np.cross(across, down) * float(found[0].SliceThickness)
    affine[:3, 3] = first
    return np.stack(planes, axis=-1), LPS @ affine


# -- NumPy masks -------------------------------------------------------------------------------------------------------


@st.composite
def npy_samples(draw: st.DrawFn) -> Sample:
    import io

    sound = draw(st.booleans())
    shape: tuple[int, ...] = draw(shapes)
    array = voxels(draw, draw(st.sampled_from(["u1", "i2", "f4", "u2"])), shape)
    if not sound:
        array = draw(
            st.sampled_from([array, array[0], array.astype("c8"), array.astype("S3"), np.zeros((0, 2, 2)), array[None, None, None]])
        )
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    content = stream.getvalue()
    if not sound and draw(st.booleans()):
        content = draw(damaged(content, 128))
    return Sample({"a.npy": content}, "a.npy", sound)


def read_with_numpy(path: Path) -> Values:
    return np.load(path, allow_pickle=False), None


KINDS = {
    "NIfTI": Kind(nifti_samples(), read_with_nibabel),
    "NRRD": Kind(nrrd_samples(), read_with_simpleitk),
    "MetaImage": Kind(metaimage_samples(), read_with_simpleitk),
    "FreeSurfer": Kind(mgh_samples(), read_mgh_with_nibabel),
    "DICOM": Kind(dicom_samples(), read_with_pydicom),
    "NumPy": Kind(npy_samples(), read_with_numpy),
}
