"""DICOM series in, DICOM-SEG out, and NRRD; on files made here, against SimpleITK."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medlore.data.volumes.dicom import dicom_modality, write_dicom_seg
from medlore.data.volumes.geometry import shear_degrees, spacing_of
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, InputError

SHAPE = (12, 10, 6)  # columns, rows, slices


def write_series(
    folder: Path, *, tilt: float = 0.0, skip: tuple[int, ...] = (), uid: str | None = None, frame: str | None = None, **tags
) -> np.ndarray:
    """A CT series with stored values 0.. and intercept -1024; returns HU (x y z)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 2000, SHAPE).astype(np.uint16)
    series, study, frame = uid or generate_uid(), generate_uid(), frame or generate_uid()
    for z in range(SHAPE[2]):
        if z in skip:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.SeriesInstanceUID, d.StudyInstanceUID, d.FrameOfReferenceUID = series, study, frame
        d.Modality, d.PatientName, d.PatientID, d.PatientBirthDate, d.PatientSex = "CT", "Nobody^At All", "0", "", ""
        d.StudyDate, d.StudyTime, d.AccessionNumber, d.StudyID, d.SeriesNumber, d.ReferringPhysicianName = "", "", "", "1", 1, ""
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = SHAPE[1], SHAPE[0], 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.RescaleSlope, d.RescaleIntercept = 1, -1024
        d.PixelSpacing, d.SliceThickness, d.InstanceNumber = [0.9, 0.7], 2.5, SHAPE[2] - z
        d.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        d.ImagePositionPatient = [-5, round(-7 + 2.5 * z * np.tan(np.radians(tilt)), 6), 30 + 2.5 * z]
        d.PixelData = stored[:, :, z].T.tobytes()
        for name, value in tags.items():
            setattr(d, name, value)
        d.save_as(folder / f"{(z * 7) % 11:02d}-{z}-{str(series)[-4:]}.dcm", enforce_file_format=True)
    return stored.astype(int) - 1024


def test_a_series_is_what_simpleitk_reads(tmp_path: Path) -> None:
    import SimpleITK

    truth = write_series(tmp_path / "s")
    (tmp_path / "s" / "readme.txt").write_text("not an image")
    volume = read_volume(tmp_path / "s")
    assert volume.modality == dicom_modality(tmp_path / "s") == "ct"
    assert np.array_equal(volume.array, truth)
    assert volume.array.dtype == np.int16
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "s")))
    image = reader.Execute()
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, volume.array)
    corner = volume.affine @ [3, 2, 5, 1]
    assert np.allclose(corner[:3], np.array(image.TransformIndexToPhysicalPoint((3, 2, 5))) * (-1, -1, 1), atol=1e-4)
    assert np.allclose(spacing_of(volume.affine), (0.7, 0.9, 2.5))


def test_a_zip_and_one_file_of_the_folder(tmp_path: Path) -> None:
    truth = write_series(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for path in (tmp_path / "s").iterdir():
            archive.write(path, f"deep/{path.name}")
    assert np.array_equal(read_volume(tmp_path / "s.zip").array, truth)
    assert np.array_equal(read_volume(next((tmp_path / "s").iterdir())).array, truth)


def test_a_tilted_gantry_is_kept(tmp_path: Path) -> None:
    write_series(tmp_path / "s", tilt=14, GantryDetectorTilt=14)
    volume = read_volume(tmp_path / "s")
    assert shear_degrees(volume.affine) == pytest.approx(14, abs=0.01)
    assert "gantry tilt of 14" in volume.notes[0]


def test_what_would_make_a_wrong_volume_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", skip=(2,))
    with pytest.raises(DataError, match=r"slices 2 and 3 lie 5.00 mm apart, the others 2.50 mm"):
        read_volume(tmp_path / "gap")
    uid = generate_uid()
    write_series(tmp_path / "two", uid=uid)
    write_series(tmp_path / "two" / "other", SeriesDescription="lung")
    with pytest.raises(DataError, match="2 series"):
        read_volume(tmp_path / "two")
    assert read_volume(tmp_path / "two", series=uid).shape == SHAPE
    write_series(tmp_path / "twice", uid=uid)
    write_series(tmp_path / "twice" / "again", uid=uid)
    with pytest.raises(DataError, match="several images at one place"):
        read_volume(tmp_path / "twice")
    write_series(tmp_path / "mixed", uid=uid)
    write_series(tmp_path / "mixed" / "localizer", uid=uid, skip=(1, 2, 3, 4, 5), ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(DataError, match="a localizer"):
        read_volume(tmp_path / "mixed")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no DICOM image"):
        read_volume(tmp_path / "none")


def test_padding_outside_the_circle_is_air(tmp_path: Path) -> None:
    write_series(tmp_path / "s", PixelPaddingValue=1500)
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE)
    values = read_volume(tmp_path / "s").array
    assert (values[stored == 1500] == -1024).all()


def test_masks_go_out_as_dicom_seg_and_come_back_in_place(tmp_path: Path) -> None:
    write_series(tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    masks = {"liver": volume.array > 500, "left kidney": volume.array < -900}
    path = write_dicom_seg(tmp_path / "seg.dcm", volume, masks)
    seg = pydicom.dcmread(path)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "left kidney"]
    import highdicom

    read = highdicom.seg.segread(path)
    uids = [d.SOPInstanceUID for d in volume.slices]
    pixels = read.get_pixels_by_source_instance(source_sop_instance_uids=uids)  # slices rows columns segments
    for index, mask in enumerate(masks.values()):
        assert np.array_equal(pixels[..., index].transpose(2, 1, 0) > 0, mask)


def test_labels_that_overlap_go_into_files_of_their_own(tmp_path: Path) -> None:
    import highdicom

    write_series(tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    masks = {"a": volume.array > 500, "b": volume.array > 700, "c": volume.array < -900}
    first = write_dicom_seg(tmp_path / "seg.dcm", volume, masks)
    uids = [d.SOPInstanceUID for d in volume.slices]
    for path, labels in ((first, ["a", "c"]), (tmp_path / "seg_2.dcm", ["b"])):
        read = highdicom.seg.segread(path)
        assert [s.SegmentLabel for s in read.SegmentSequence] == labels
        pixels = read.get_pixels_by_source_instance(source_sop_instance_uids=uids, assert_missing_frames_are_empty=True)
        for index, label in enumerate(labels):
            assert np.array_equal(pixels[..., index].transpose(2, 1, 0) > 0, masks[label])
    assert not (tmp_path / "seg_3.dcm").exists()


def test_dicom_seg_needs_dicom(tmp_path: Path) -> None:
    from medlore.data.volumes.nifti import Volume, header_for

    array = np.zeros((3, 3, 3), np.int16)
    with pytest.raises(InputError, match="an image that is not DICOM"):
        write_dicom_seg(
            tmp_path / "x.dcm", Volume(array, np.eye(4), header_for(np.eye(4), (3, 3, 3)), (3, 3, 3), tmp_path), {"a": array > 0}
        )


@pytest.mark.parametrize("compressed", [False, True])
def test_nrrd_is_what_simpleitk_wrote(tmp_path: Path, compressed: bool) -> None:
    import SimpleITK

    array = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.7, 0.8, 3))
    image.SetOrigin((10, -20, 30))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"), useCompression=compressed)
    volume = read_volume(tmp_path / "a.nrrd")
    assert np.array_equal(volume.array, array.T)
    place = volume.affine @ [3, 4, 1, 1]
    assert np.allclose(place[:3], np.array(image.TransformIndexToPhysicalPoint((3, 4, 1))) * (-1, -1, 1))


def test_nrrd_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\ntype: short\ndimension: 2\nsizes: 4 4\nencoding: raw\n\n" + b"\0" * 32)
    with pytest.raises(DataError, match="three axes"):
        read_volume(tmp_path / "a.nrrd")
    (tmp_path / "b.nrrd").write_bytes(b"something else")
    with pytest.raises(DataError, match="not NRRD"):
        read_volume(tmp_path / "b.nrrd")
