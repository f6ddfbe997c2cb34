"""NIfTI and NRRD files out of bug reports: where their voxels lie and what they mean, against nibabel and SimpleITK."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from medlore.data.volumes.geometry import spacing_of
from medlore.data.volumes.intensity import hounsfield, saturated
from medlore.data.volumes.nifti import check_same_grid, header_for, read_nifti, write_nifti
from medlore.data.volumes.preparation import Volume, prepare, read_volume
from medlore.errors import DataError

ARRAY = np.random.default_rng(0).integers(-9, 99, (9, 8, 7)).astype(np.int16)
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def nifti_bytes(array: np.ndarray[Any, Any] = ARRAY, affine: np.ndarray[Any, Any] = AFFINE, **fields: Any) -> bytes:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    return bytes(content)


# -- NIfTI: where ------------------------------------------------------------------------------------------------------


@pytest.mark.case("units")
@pytest.mark.parametrize(("code", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (3 + 8, 0.001), (1 + 16, 1000)])
def test_units_of_length_count(tmp_path: Path, code: int, scale: float) -> None:
    affine = np.diag([-0.05 / scale, -0.05 / scale, 0.06 / scale, 1.0])
    affine[:3, 3] = 1 / scale, 2 / scale, 3 / scale
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(affine=affine, xyzt_units=code))
    volume = read_nifti(path)
    assert np.allclose(spacing_of(volume.affine), SimpleITK.ReadImage(str(path)).GetSpacing(), rtol=1e-5)
    assert np.allclose(volume.affine, np.diag([-0.05, -0.05, 0.06, 1]) + np.array([1, 2, 3, 0])[:, None] * (0, 0, 0, 1), rtol=1e-5)
    mask = write_nifti(tmp_path / "m.nii", ARRAY > 0, volume)
    assert nib.load(mask).header.get_xyzt_units()[0] == nib.load(path).header.get_xyzt_units()[0]
    assert np.allclose(read_nifti(mask).affine, volume.affine)
    assert bool(volume.notes) == (scale != 1)
    moved = write_nifti(tmp_path / "p.nii", ARRAY, volume, affine=np.eye(4))
    assert np.allclose(read_nifti(moved).affine, np.eye(4))


def test_a_unit_that_nobody_knows_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(xyzt_units=5))
    volume = read_nifti(tmp_path / "a.nii")
    assert "code 5" in volume.notes[0]
    assert np.allclose(volume.affine, AFFINE)


def test_lengths_of_the_wrong_unit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(xyzt_units=1))  # 2 metres a voxel
    with pytest.raises(DataError, match="voxel edges of 2000 x 2000 x 3000 mm"):
        read_nifti(tmp_path / "a.nii")


@pytest.mark.case("quaternion")
@pytest.mark.parametrize("longer", [1.0000003, 1.0004])
@pytest.mark.parametrize("choice", ["auto", "sform", "qform"])
def test_a_quaternion_longer_than_one_by_rounding_is_scaled(tmp_path: Path, longer: float, choice: Any) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(quatern_b=0, quatern_c=0, quatern_d=longer))
    volume = read_nifti(path, affine_from=choice)
    assert np.allclose(volume.affine, AFFINE)
    assert np.allclose(spacing_of(volume.affine), SimpleITK.ReadImage(str(path)).GetSpacing())
    check_same_grid(write_nifti(tmp_path / "m.nii.gz", ARRAY > 0, volume), volume)


def test_a_quaternion_that_is_none_is_refused_unless_the_sform_is_asked_for(tmp_path: Path) -> None:
    for name, value in (("long", 5.0), ("nan", np.nan)):
        path = tmp_path / f"{name}.nii"
        path.write_bytes(nifti_bytes(quatern_d=value))
        with pytest.raises(DataError, match="quaternion has the length"):
            read_nifti(path)
        assert np.allclose(read_nifti(path, affine_from="sform").affine, AFFINE)


@pytest.mark.parametrize("offset", [0, 8, 300, 348, 351, -1, np.nan, np.inf, 1e12])
def test_voxels_that_would_begin_in_the_header_are_refused(tmp_path: Path, offset: float) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(vox_offset=offset) + bytes(8))
    with pytest.raises(DataError, match=r"begin at byte|vox offset"):
        read_nifti(tmp_path / "a.nii")


def test_voxels_behind_a_gap_are_found(tmp_path: Path) -> None:
    content = nifti_bytes(vox_offset=2000)
    (tmp_path / "a.nii").write_bytes(content[:352] + b"J" * 1648 + content[352:])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    for name in ("a.nii", "a.nii.gz"):
        assert np.array_equal(read_nifti(tmp_path / name).array, ARRAY)
        assert np.array_equal(np.asanyarray(nib.load(tmp_path / name).dataobj), ARRAY)


def test_one_frame_of_many_is_read_alone(tmp_path: Path) -> None:
    series = np.stack([ARRAY + k for k in range(6)], axis=-1)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes(series)))
    for frame in (0, 3, 5):
        assert np.array_equal(read_nifti(tmp_path / "a.nii.gz", frame=frame, most_bytes=ARRAY.nbytes).array, ARRAY + frame)
    for frame in (6, -1):
        with pytest.raises(DataError, match=f"of which frame {frame}"):
            read_nifti(tmp_path / "a.nii.gz", frame=frame)
    (tmp_path / "b.nii").write_bytes(nifti_bytes())
    with pytest.raises(DataError, match="one volume, of which frame 3"):
        read_nifti(tmp_path / "b.nii", frame=3)


# -- NIfTI: what value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "intercept", "noted"), [(0, 5, True), (np.nan, 5, True), (0, 0, False), (np.nan, np.nan, False)])
def test_a_slope_of_none_is_none_as_nibabel_reads_it(tmp_path: Path, slope: float, intercept: float, noted: bool) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti_bytes(scl_slope=slope, scl_inter=intercept))
    volume = read_nifti(path)
    assert np.array_equal(volume.array, np.asanyarray(nib.load(path).dataobj))
    assert bool(volume.notes) == noted


def test_a_slope_without_a_number_to_add_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(scl_slope=2, scl_inter=np.nan))
    with pytest.raises(DataError, match="slope and intercept that cannot be used"):
        read_nifti(tmp_path / "a.nii")


def ct_without_intercept(padding: int, kind: type) -> np.ndarray[Any, Any]:
    x, y, _ = np.indices((64, 64, 24))
    radius = np.hypot(x - 32, y - 32)
    values = np.where(radius < 20, 1064.0, 24.0) + np.random.default_rng(0).normal(0, 8, radius.shape)
    values[radius < 8] += 250
    values = np.maximum(values, 0)
    values[radius > 31] = padding
    return values.astype(kind)


@pytest.mark.case("lost_intercept_padding")
@pytest.mark.parametrize(
    ("padding", "kind"),
    [(0, np.uint16), (-2000, np.int16), (-3024, np.int16), (-2000, np.float32), (63536, np.uint16), (62512, np.int32), (-32768, np.int16)],
)
def test_a_ct_that_lost_its_intercept_is_found_under_any_padding(padding: int, kind: type) -> None:
    affine = np.diag([-1.0, -1, 1, 1])

    def prepared(array: np.ndarray[Any, Any]) -> Any:
        return prepare(Volume(array, affine, header_for(affine, array.shape), array.shape, Path("x.nii")), "ct")

    sound = ct_without_intercept(0, np.int16) - 1024
    wanted, found = prepared(sound), prepared(ct_without_intercept(padding, kind))
    assert found.pixels.shape == wanted.pixels.shape
    assert found.intensity.mean == pytest.approx(wanted.intensity.mean, abs=0.5)
    assert abs(found.pixels - wanted.pixels).max() < 0.01
    assert any("1024 was subtracted" in note for note in found.notes)
    assert wanted.notes == ()


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_a_sound_ct_with_padding_is_left_as_it_is_and_said(padding: int) -> None:
    sound = ct_without_intercept(0, np.int16) - 1024
    rim = ct_without_intercept(-5, np.int16) == -5
    array, offset, notes = hounsfield(np.where(rim, padding, sound).astype(np.int16))
    assert offset == 0
    assert np.array_equal(array, np.where(rim, padding, sound))
    assert "padding, which counts as air" in notes[0]


def test_a_signed_ct_stored_unsigned_is_itself_again() -> None:
    sound = (ct_without_intercept(0, np.int32) - 1024).astype(np.int16)
    array, offset, notes = hounsfield(sound.view(np.uint16))
    assert offset == 0
    assert np.array_equal(array, sound)
    assert "stored unsigned" in notes[0]
    metal = sound.astype(np.int32)
    metal[:4, :4] = 45_000
    metal[4:6, :4] = 61_000
    assert np.array_equal(hounsfield(metal)[0], metal)  # an extended scale goes all the way up


@pytest.mark.parametrize(
    ("kind", "value", "note"),
    [
        (np.uint16, 65535, "65535, the largest"),
        (np.int16, 32767, "32767, the largest"),
        (np.int16, -32768, "-32768, the smallest"),
        (np.float32, 3.4e38, "which no scanner measures"),
        (np.uint8, 255, None),
        (np.uint16, 4095, None),
        (np.uint16, 0, None),
    ],
)
def test_values_at_the_end_of_their_type_are_said(kind: type, value: float, note: str | None) -> None:
    array = np.full((5, 5, 5), 100, kind)
    array[0] = value
    said = saturated(array)
    assert (said is None) if note is None else (note in said and "25 voxels" in said)


# -- NRRD --------------------------------------------------------------------------------------------------------------

PLAIN = np.arange(120, dtype="<i2").reshape(6, 5, 4)
RAW = PLAIN.tobytes(order="F")
FIELDS = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\n"
    "space directions: (1,0,0) (0,1,0) (0,0,2)\nspace origin: (1,2,3)\n"
)
LITTLE = "endian: little\nencoding: raw\n"
PACKED = "endian: little\nencoding: gzip\n"


@pytest.mark.case("nrrd_skip")
@pytest.mark.parametrize("apart", [True, False], ids=["nhdr", "nrrd"])
@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (LITTLE, RAW),
        (LITTLE, RAW + b"more"),
        (LITTLE + "byte skip: -1\n", b"J" * 100 + RAW),
        (LITTLE + "byte skip: 100\n", b"J" * 100 + RAW),
        (LITTLE + "line skip: 2\n", b"one\ntwo\n" + RAW),
        (LITTLE + "byte skip: 3\nline skip: 1\n", b"one\nxyz" + RAW),
        (PACKED, gzip.compress(RAW)),
        (PACKED + "byte skip: 10\n", gzip.compress(b"J" * 10 + RAW)),
        (PACKED + "byte skip: -1\n", gzip.compress(b"J" * 10 + RAW)),
        (PACKED + "line skip: 1\n", b"one\n" + gzip.compress(RAW)),
        ("endian: big\nencoding: raw\n", PLAIN.astype(">i2").tobytes(order="F")),
        ("ENDIAN: Little\nEncoding: RAW\n", RAW),
        ("# a remark\nkey:=value: x\n" + LITTLE, RAW),
        ("min: 3\nold max: 5\n" + LITTLE, RAW),
    ],
)
def test_nrrd_fields_mean_what_simpleitk_takes_them_for(tmp_path: Path, fields: str, body: bytes, apart: bool) -> None:
    path = tmp_path / ("a.nhdr" if apart else "a.nrrd")
    path.write_bytes((FIELDS + fields).encode() + (b"data file: v.raw\n" if apart else b"\n" + body))
    (tmp_path / "v.raw").write_bytes(body)
    image = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, PLAIN)
    volume = read_volume(path)
    assert np.array_equal(volume.array, PLAIN)
    place = (volume.affine @ [3, 2, 1, 1])[:3] * (-1, -1, 1)
    assert np.allclose(place, image.TransformIndexToPhysicalPoint((3, 2, 1)))


@pytest.mark.parametrize("space", ["RAS", "LAS", "LPS", "right-anterior-superior", "left-anterior-superior"])
def test_spaces_are_those_of_simpleitk(tmp_path: Path, space: str) -> None:
    path = tmp_path / "a.nrrd"
    path.write_bytes((FIELDS.replace("left-posterior-superior", space) + LITTLE).encode() + b"\n" + RAW)
    place = (read_volume(path).affine @ [3, 2, 1, 1])[:3] * (-1, -1, 1)
    assert np.allclose(place, SimpleITK.ReadImage(str(path)).TransformIndexToPhysicalPoint((3, 2, 1)))


def test_units_of_nrrd_count(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes((FIELDS + LITTLE + 'space units: "cm" "cm" "cm"\n').encode() + b"\n" + RAW)
    assert np.allclose(spacing_of(read_volume(tmp_path / "a.nrrd").affine), (10, 10, 20))


@pytest.mark.case("small_things")
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("sizes: 6 5 4", "sizes: 6 5 x", "sizes: '6 5 x'"),
        ("sizes: 6 5 4", "sizes: -6 -5 4", "sizes '-6 -5 4'"),
        ("sizes: 6 5 4", "sizes: 6 5", "of dimension"),
        ("dimension: 3", "dimension: 4", "of dimension '4'"),
        ("sizes: 6 5 4", "sizes: 60000 50000 40000", "ends after"),
        ("encoding: raw\n", "encoding: bzip2\n", "encoding 'bzip2'"),
        ("endian: little\n", "", "endian 'not said'"),
        ("endian: little", "endian: middle", "endian 'middle'"),
        ("endian: little\n", "endian: little\nendian: little\n", "twice"),
        ("encoding: raw\n", "encoding: raw\nbyte skip: -2\n", "byte skip -2"),
        ("encoding: raw\n", "encoding: raw\nline skip: -1\n", "line skip -1"),
        ("encoding: raw\n", "encoding: raw\nline skip: 400\n", "lines before"),
        ("encoding: raw\n", "encoding: raw\nbyte skip: 900\n", "bytes before its voxels"),
        ("encoding: raw\n", "encoding: raw\nline skip: 900\nbyte skip: -1\n", "lines before its voxels"),
        ("encoding: raw\n", "encoding: gzip\n", "damaged"),
        ("(0,1,0)", "(0,x,0)", "space directions: '\\(0,x,0\\)'"),
        ("(0,1,0)", "none", "2 space directions"),
        ("(1,2,3)", "(1,2)", "space origin"),
        ("(1,2,3)", "1,2,3)", "space origin: '1,2,3\\)'"),
        ("(0,1,0)", "(0,1,0", "space directions"),
        ("(1,2,3)", "(1,2,nan)", "not 4x4 and finite"),
        ("space: left-posterior-superior", "space: scanner-xyz", "left and right are not known"),
        ("type: short", "type: block", "type 'block'"),
        ("encoding: raw\n", "encoding: raw\ndata file: ../v.raw\n", "in another folder"),
        ("encoding: raw\n", "encoding: raw\ndata file: /etc/passwd\n", "in another folder"),
        ("encoding: raw\n", "encoding: raw\ndata file: LIST\n", "several files"),
        ("encoding: raw\n", "encoding: raw\ndata file: gone.raw\n", "is not there"),
        ("NRRD0004", "NRRD0009", "not NRRD"),
        ("space origin:", "space origin8,20:", "the field 'space origin8,20'"),
        ("endian: little", "endian: little\nYY @", "the line 'YY @'"),
        ("endian: little", "endian:little", "the line 'endian:little'"),
        ("encoding: raw\n", 'encoding: raw\nspace units: "inch" "inch" "inch"\n', "space units"),
    ],
)
def test_nrrd_that_cannot_be_read_names_the_field(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert old in FIELDS + LITTLE
    (tmp_path / "a.nrrd").write_bytes((FIELDS + LITTLE).replace(old, new).encode() + b"\n" + RAW)
    with pytest.raises(DataError, match=reason):
        read_volume(tmp_path / "a.nrrd")


@pytest.mark.parametrize(("late", "named"), [("space", "space directions"), ("dimension", "sizes")])
def test_fields_of_nrrd_that_come_too_late_are_refused_as_by_simpleitk(tmp_path: Path, late: str, named: str) -> None:
    lines = (FIELDS + LITTLE).splitlines(keepends=True)
    moved = [line for line in lines if not line.startswith(f"{late}:")] + [line for line in lines if line.startswith(f"{late}:")]
    (tmp_path / "a.nrrd").write_bytes("".join(moved).encode() + b"\n" + RAW)
    with pytest.raises(RuntimeError):
        SimpleITK.ReadImage(str(tmp_path / "a.nrrd"))
    with pytest.raises(DataError, match=f"the field '{named}' before '{late}'"):
        read_volume(tmp_path / "a.nrrd")


def test_the_end_of_packed_voxels_is_not_guessed_behind_other_bytes(tmp_path: Path) -> None:
    """Counted from the end, the voxels would lie elsewhere: SimpleITK shifts them by a byte, gzip reads over the zero."""
    fields = (FIELDS + PACKED + "byte skip: -1\n").encode() + b"\n"
    (tmp_path / "a.nrrd").write_bytes(fields + gzip.compress(b"J" * 10 + RAW) + b"\0")
    with pytest.raises(DataError, match="bytes behind the packed voxels"):
        read_volume(tmp_path / "a.nrrd")


# -- bombs -------------------------------------------------------------------------------------------------------------

BOMB = """
import resource, sys
from pathlib import Path
from medlore.data.formats import ReadOptions, format_of, read_grid, read_volume_as
from medlore.errors import MedloreError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path = Path(sys.argv[1])
for read in (lambda: read_grid(path), lambda: read_volume_as(format_of(path), path, ReadOptions(most_bytes=64 << 20))):
    try:
        read()
    except MedloreError as error:
        assert "Traceback" not in str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bombs(folder: Path) -> dict[str, Path]:
    """Small files that would unpack to 400 MB, each by a header that promises so, or goes on for ever."""
    zeros = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = bytearray(nifti_bytes()[:352])
    struct.pack_into("<8h", head, 40, 3, 1024, 1024, 200, 1, 1, 1, 1)
    (folder / "a.nii.gz").write_bytes(packer.compress(bytes(head)) + b"".join(packer.compress(zeros) for _ in range(400)) + packer.flush())
    body = (folder / "a.nii.gz").read_bytes()
    fields = FIELDS.replace("6 5 4", "1024 1024 200")
    (folder / "a.nrrd").write_bytes((fields + PACKED).encode() + b"\n" + body)
    (folder / "tail.nrrd").write_bytes((FIELDS + PACKED + "byte skip: -1\n").encode() + b"\n" + body)  # sound sizes: read to its end
    flat = zlib.compressobj(9)
    packed = b"".join(flat.compress(zeros) for _ in range(400)) + flat.flush()
    text = "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    text += "ElementSpacing = 1 1 1\nDimSize = 1024 1024 200\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (folder / "a.mha").write_bytes(text.encode() + packed)
    (folder / "b.mha").write_bytes(text.replace("1024 1024 200", "6 5 4").encode() + packed)  # more than promised is not unpacked
    (folder / "line.mha").write_bytes(b"ObjectType" + b" " * (4 << 20))
    return {path.name: path for path in folder.iterdir()}


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    import subprocess
    import sys

    for name, path in bombs(tmp_path).items():
        assert path.stat().st_size < 5 << 20
        ran = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True)
        assert int(ran.stdout) < 80, f"{name}: {ran.stdout} MiB"  # readers' own libraries are 40 MiB


def test_damaged_names_and_colour_axes_are_refused(tmp_path: Path) -> None:
    """Found by the suite of 10,000 headers: a NUL in a MetaImage field, and an axis of colour that has a position in space."""
    head = "NDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 2 2 2\n"
    for first, fine in (("ObjectType = Image\n", True), ("Obj\0ctType = Image\n", False)):
        (tmp_path / "a.mha").write_bytes((first + head + "ElementType = MET_UCHAR\nElementDataFile = LOCAL\n").encode() + bytes(8))
        if fine:
            assert read_volume(tmp_path / "a.mha").shape == (2, 2, 2)
        else:
            with pytest.raises(DataError, match="field name"):
                read_volume(tmp_path / "a.mha")
    text = "NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 2 2\nencoding: raw\nspace origin: (0,0,0)\n"
    for kinds, fine in (("domain domain domain", True), ("RGB-color domain domain", False)):
        directions = "space directions: (1,0,0) (0,1,0) (0,0,1)\n"
        (tmp_path / "a.nrrd").write_bytes(f"{text}{directions}kinds: {kinds}\n\n".encode() + bytes(12))
        if fine:
            assert read_volume(tmp_path / "a.nrrd").shape == (3, 2, 2)
        else:
            with pytest.raises(DataError, match="kinds"):
                read_volume(tmp_path / "a.nrrd")
