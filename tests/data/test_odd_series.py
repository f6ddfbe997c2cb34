"""DICOM series as they come out of archives, anonymisers and other tools: right, or one clear refusal."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medlore.data.formats import ReadOptions, find_images, read_grid
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, InputError
from small_dicom import GONE, write_slices

ARRAY = np.random.default_rng(0).integers(0, 2000, (9, 8, 10)).astype(np.uint16)
HU = ARRAY.astype(int) - 1024


def itk_of(folder: Path) -> Any:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def itk_values(folder: Path) -> np.ndarray[Any, Any]:
    import SimpleITK

    return SimpleITK.GetArrayFromImage(itk_of(folder)).T


# -- whose data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.zip", b"PK\x03\x04 and no more", "not a zip file"),
        ("empty.zip", b"", "not a zip file"),
        ("empty.dcm", b"", "an empty file"),
        ("text.dcm", b"not an image", "no DICOM in it"),
        ("empty", b"", "an empty file"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_replaced_by_its_neighbours(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    write_slices(tmp_path / "s", ARRAY)
    (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_volume(tmp_path / "s" / name)


def test_one_file_speaks_for_its_own_series(tmp_path: Path) -> None:
    write_slices(tmp_path / "two", ARRAY)
    write_slices(tmp_path / "two" / "other", ARRAY[:, :, ::-1] + 1)
    first = next((tmp_path / "two").glob("*.dcm"))
    assert np.array_equal(read_volume(first).array, HU)
    assert np.array_equal(read_volume(next((tmp_path / "two" / "other").iterdir())).array, HU[:, :, ::-1] + 1)
    with pytest.raises(DataError, match="an image of series"):
        read_volume(first, series="1.2.3")


def test_a_damaged_slice_is_not_left_out_in_silence(tmp_path: Path) -> None:
    files = sorted(write_slices(tmp_path / "s", ARRAY).iterdir())
    files[-1].write_bytes(files[-1].read_bytes()[:150])  # the last slice: nothing else would be missed
    with pytest.raises(DataError, match=r"1 DICOM file\(s\) that cannot be read"):
        read_volume(tmp_path / "s")


def test_a_slice_whose_kind_and_height_are_damaged_is_not_left_out(tmp_path: Path) -> None:
    def damage(d: Any, z: int) -> None:
        if z == 2:
            d.SOPClassUID = "1.2.840.10008.5.1.1.2.4.1"
            del d.Rows

    with pytest.raises(DataError, match=r"1 DICOM file\(s\) that cannot be read"):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=damage))


def test_a_slice_that_says_another_modality_than_its_series_is_not_left_out(tmp_path: Path) -> None:
    def damage(d: Any, z: int) -> None:
        d.Modality = "SEG" if z == 2 else "CT"

    with pytest.raises(DataError, match=r"(?s)1 DICOM file\(s\) that cannot be read.*modality SEG in a series of others"):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=damage))


@pytest.mark.case("nifti_in_dicom_folder")
def test_a_folder_with_an_image_file_and_dicom_names_both(tmp_path: Path) -> None:
    import nibabel as nib

    folder = write_slices(tmp_path / "s", ARRAY)
    assert find_images(folder) == [folder]
    nib.save(nib.Nifti1Image(np.ones((8, 8, 6), np.uint8), np.eye(4)), folder / "old_mask.nii.gz")
    with pytest.raises(DataError, match=r"(?s)DICOM images and image files.*DICOM images in it.*old_mask\.nii\.gz"):
        find_images(folder)


@pytest.mark.parametrize("name", ["PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_series_has_one_owner(tmp_path: Path, name: str) -> None:
    def two(d: Any, z: int) -> None:
        setattr(d, name, f"1.2.{z // 5}")

    with pytest.raises(DataError, match=rf"(?s)do not belong together.*{name}: 2 different ones, in 5, 5 images"):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=two))

    def some_empty(d: Any, z: int) -> None:
        setattr(d, name, "" if z % 2 else "1.2.3")

    assert np.array_equal(read_volume(write_slices(tmp_path / "t", ARRAY, each=some_empty)).array, HU)


def test_segmentations_in_the_folder_are_no_second_series(tmp_path: Path) -> None:
    from medlore.data.volumes.dicom import write_dicom_seg

    folder = write_slices(tmp_path / "s", ARRAY)
    volume = read_volume(folder)
    write_dicom_seg(folder / "seg.dcm", volume, {"liver": volume.array > 0})
    assert np.array_equal(read_volume(folder).array, HU)


# -- where -------------------------------------------------------------------------------------------------------------


def shifted(by_mm: float) -> Callable[[Any, int], None]:
    def each(d: Any, z: int) -> None:
        d.ImagePositionPatient = [by_mm if z in (4, 5) else 0, 0, z]

    return each


def stepped(by_mm: float) -> Callable[[Any, int], None]:
    def each(d: Any, z: int) -> None:
        d.ImagePositionPatient = [by_mm if z > 4 else 0, 0, z]

    return each


def turned(by: float) -> Callable[[Any, int], None]:
    def each(d: Any, z: int) -> None:
        a = by if z == 3 else 0.0
        d.ImageOrientationPatient = [float(f"{v:.10f}") for v in (np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0)]

    return each


def spaced(by: float) -> Callable[[Any, int], None]:
    def each(d: Any, z: int) -> None:
        d.PixelSpacing = [1, 1 + by * (z == 3)]

    return each


@pytest.mark.case("inplane_shift")
@pytest.mark.parametrize(
    ("each", "reason"),
    [
        (shifted(20), r"no straight stack.*slice 5 is shifted by 20\.00 mm"),
        (shifted(0.5), r"no straight stack.*shifted by 0\.50 mm"),
        (stepped(20), r"no straight stack.*mm"),
        (stepped(0.8), r"no straight stack.*mm"),
        (turned(0.04), r"no straight stack: a corner of slice 4 lies 0\.[23]\d mm"),
        (turned(1.0), "a localizer"),
        (spaced(0.05), r"no straight stack: a corner of slice 4 lies 0\.3\d mm"),
    ],
)
def test_slices_that_are_no_straight_stack_are_refused_with_the_distance(tmp_path: Path, each: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=each))


@pytest.mark.parametrize("each", [shifted(0.01), shifted(0.05), stepped(0.05), turned(2e-5), spaced(1e-4)])
def test_rounding_is_no_fault(tmp_path: Path, each: Any) -> None:
    folder = write_slices(tmp_path / "s", ARRAY, each=each)
    volume = read_volume(folder)
    assert np.array_equal(volume.array, HU)
    for z, header in enumerate(volume.slices):
        place = (volume.affine @ [0, 0, z, 1])[:3] * (-1, -1, 1)
        assert np.abs(place - np.array(header.ImagePositionPatient, float)).max() < 0.05


@pytest.mark.case("healthy_series_refused")
def test_sound_series_are_read_whatever_edge_the_rounding_falls_on(tmp_path: Path) -> None:
    def noise(d: Any, z: int) -> None:
        d.ImageOrientationPatient = [1, 0, -0.00049 if z % 2 else -0.00051, 0, 1, 0]

    def rounded(d: Any, z: int) -> None:
        d.ImagePositionPatient = [0, 0, round(0.625 * z + 1e-9, 1)]

    assert np.array_equal(read_volume(write_slices(tmp_path / "n", ARRAY, each=noise)).array, HU)
    volume = read_volume(write_slices(tmp_path / "r", ARRAY, each=rounded))
    assert np.array_equal(volume.array, HU)
    assert volume.affine[2, 2] == pytest.approx(0.625, abs=0.005)
    assert "headers are rounded" in volume.notes[0]


def test_a_direction_that_is_no_unit_vector_is_refused(tmp_path: Path) -> None:
    for turn in ([2, 0, 0, 0, 1, 0], [1, 0, 0, 0.5, 0.8, 0], [0, 0, 0, 0, 1, 0]):
        with pytest.raises(DataError, match="an ImageOrientationPatient of lengths"):
            read_volume(write_slices(tmp_path / str(turn), ARRAY, ImageOrientationPatient=turn))


# -- what value --------------------------------------------------------------------------------------------------------


def test_32_bit_unsigned_pixels_are_not_wrapped(tmp_path: Path) -> None:
    stored = ARRAY.astype(np.uint32) + 3_000_000_000
    folder = write_slices(tmp_path / "s", stored, mr=True)
    assert np.array_equal(read_volume(folder).array.astype(np.int64), stored.astype(np.int64))


def test_float_pixels_keep_their_digits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 1, (9, 8, 4)).astype(np.float32)

    def each(d: Any, z: int) -> None:
        del d.PixelData
        for name in ("BitsStored", "HighBit", "PixelRepresentation"):
            delattr(d, name)
        d.BitsAllocated = 32
        d.FloatPixelData = np.ascontiguousarray(values[:, :, z].T).tobytes()

    volume = read_volume(write_slices(tmp_path / "s", values.view(np.uint32), each=each, mr=True))
    assert np.array_equal(volume.array, values)


def test_bits_beyond_those_stored_do_not_count(tmp_path: Path) -> None:
    """Old overlays lie in the upper bits; GDCM leaves them out too."""
    overlay = (np.random.default_rng(1).integers(0, 2, ARRAY.shape) << 14).astype(np.uint16)
    folder = write_slices(tmp_path / "s", ARRAY | overlay, BitsStored=12, HighBit=11, mr=True)
    assert np.array_equal(read_volume(folder).array, ARRAY)
    assert np.array_equal(itk_values(folder), ARRAY)


def test_signed_numbers_of_12_bits_keep_their_sign(tmp_path: Path) -> None:
    signed = ARRAY.astype(np.int16) - 1000
    folder = write_slices(tmp_path / "s", signed & np.int16(0x0FFF), BitsStored=12, HighBit=11, PixelRepresentation=1, mr=True)
    assert np.array_equal(read_volume(folder).array, signed)
    assert np.array_equal(itk_values(folder), signed)


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    def each(d: Any, z: int) -> None:
        d.RescaleSlope, d.RescaleIntercept = str(0.5 + z), str(z)

    folder = write_slices(tmp_path / "s", ARRAY, each=each, mr=True)
    wanted = ARRAY * (0.5 + np.arange(10)) + np.arange(10)
    assert np.allclose(read_volume(folder).array, wanted)
    assert np.allclose(itk_values(folder), wanted)


def test_a_slope_in_some_slices_alone_is_refused(tmp_path: Path) -> None:
    def each(d: Any, z: int) -> None:
        if z == 3:
            d.RescaleSlope = d.RescaleIntercept = None

    with pytest.raises(DataError, match="1 of 10 images without RescaleSlope"):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=each))


@pytest.mark.parametrize(("pad", "kind"), [(-2000, np.int16), (63536, np.int16), (63536, np.uint16)])
def test_padding_is_air_whatever_sign_its_header_gives_it(tmp_path: Path, pad: int, kind: type) -> None:
    stored = ARRAY.astype(kind)
    stored[0, 0] = np.array(pad, np.int64).astype(kind)

    def each(d: Any, z: int) -> None:
        d.add_new("PixelPaddingValue", "US" if pad > 0 else "SS", pad)

    array = read_volume(write_slices(tmp_path / "s", stored, each=each)).array
    assert (array[0, 0] <= -1024).all()
    assert np.array_equal(array[1:], HU[1:])


# -- empty, absent and damaged attributes ------------------------------------------------------------------------------


@pytest.mark.case("dicom_empty_tags")
@pytest.mark.parametrize("how", [None, GONE], ids=["empty", "absent"])
@pytest.mark.parametrize("names", ["RescaleSlope RescaleIntercept", "NumberOfFrames", "Modality", "SliceThickness", "SeriesInstanceUID"])
def test_what_is_empty_counts_as_absent(tmp_path: Path, names: str, how: Any) -> None:
    tags = {name: how for name in names.split() if not (how is GONE and name == "NumberOfFrames")}
    volume = read_volume(write_slices(tmp_path / "s", ARRAY, **tags))
    assert np.array_equal(volume.array, ARRAY if "RescaleSlope" in tags else HU)
    assert volume.modality == (None if "Modality" in tags else "ct")


@pytest.mark.parametrize("how", [None, GONE], ids=["empty", "absent"])
@pytest.mark.parametrize("name", ["PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"])
def test_a_series_without_a_place_is_refused(tmp_path: Path, name: str, how: Any) -> None:
    with pytest.raises(DataError, match="10 images without position or spacing"):
        read_volume(write_slices(tmp_path / "s", ARRAY, **{name: how}))


def test_numbers_with_commas_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "s", ARRAY, PixelSpacing=["0.900", "0.700"])
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"0.900\\0.700", b"0,900\\0,700"))
    with pytest.raises(DataError, match="PixelSpacing cannot be used"):
        read_volume(folder)


@pytest.mark.case("small_things")
def test_a_series_without_uid_is_one_series_and_said(tmp_path: Path) -> None:
    volume = read_volume(write_slices(tmp_path / "s", ARRAY, SeriesInstanceUID=GONE))
    assert "no SeriesInstanceUID" in volume.notes[0]


def test_dicom_without_its_preamble_is_read(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "s", ARRAY)
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        plain = pydicom.Dataset()
        plain.update(dataset)
        plain.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert next(folder.iterdir()).read_bytes()[128:132] != b"DICM"
    assert np.array_equal(read_volume(folder).array, HU)


# -- hostile -----------------------------------------------------------------------------------------------------------


@pytest.mark.case("small_things")
def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "s", ARRAY)
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    content = bytearray((tmp_path / "e.zip").read_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + flag] |= 1
    (tmp_path / "e.zip").write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        read_volume(tmp_path / "e.zip")


def test_links_in_a_circle_and_pipes_are_walked_past(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "s", ARRAY)
    (folder / "again").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    os.mkfifo(folder / "pipe")
    assert np.array_equal(read_volume(folder).array, HU)
    with pytest.raises(InputError, match="is a device or a pipe"):
        read_volume(folder / "pipe")
    with pytest.raises(InputError, match="no such file"):
        read_volume(folder / "itself")


def test_a_series_is_measured_before_it_is_read(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "s", ARRAY)
    assert read_grid(folder, ReadOptions())[0] == ARRAY.shape
    with pytest.raises(DataError, match="at most 1,000 bytes"):
        read_volume(folder, most_bytes=1000)


def test_a_compressed_image_larger_than_its_header_is_refused(tmp_path: Path) -> None:
    import io

    from PIL import Image
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    stream = io.BytesIO()
    Image.new("L", (3000, 2000)).save(stream, "JPEG")

    def each(d: Any, z: int) -> None:
        d.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        d.BitsAllocated = d.BitsStored = 8
        d.HighBit = 7
        d.PixelData = encapsulate([stream.getvalue()])
        d["PixelData"].VR = "OB"
        d["PixelData"].is_undefined_length = True

    with pytest.raises(DataError, match="a compressed image of 2000 x 3000 in a header of 8 x 9"):
        read_volume(write_slices(tmp_path / "s", ARRAY, each=each))


def test_a_deflated_file_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    import zlib

    folder = write_slices(tmp_path / "s", ARRAY[:, :, :1])
    file = next(folder.iterdir())
    dataset = pydicom.dcmread(file)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(file, enforce_file_format=True)
    assert np.array_equal(read_volume(folder).array, HU[:, :, :1])
    content = file.read_bytes()
    meta = 144 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    file.write_bytes(content[:meta] + bomb)
    with pytest.raises(DataError, match=r"cannot be read[^|]*unpacks to more than"):
        read_volume(folder)
