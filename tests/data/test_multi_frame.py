"""Enhanced multi-frame CT and MR are read like the single-frame series that they were made of; masks refer to their frames."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, generate_uid

from medlore.data.formats import ReadOptions, read_grid
from medlore.data.volumes.cases import Case
from medlore.data.volumes.dicom import write_dicom_seg
from medlore.data.volumes.masks import read_masks
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.rtstruct import write_rtstruct
from medlore.errors import DataError
from small_dicom import write_slices

SHAPE = (12, 10, 6)


def slices(folder: Path, seed: int = 0, *, mr: bool = False) -> Path:
    """Oblique slices of 0.8 x 1.2 x 3 mm."""

    def turned(dataset: Any, z: int) -> None:
        across, down = np.array([0.6, 0.8, 0.0]), np.array([0.0, 0.0, -1.0])
        dataset.PixelSpacing, dataset.SliceThickness = [1.2, 0.8], 3
        dataset.ImageOrientationPatient = [*across.tolist(), *down.tolist()]
        dataset.ImagePositionPatient = (np.array([10.0, -20.0, 30.0]) + 3.0 * z * np.cross(across, down)).tolist()

    return write_slices(folder, np.random.default_rng(seed).integers(0, 2000, SHAPE).astype(np.uint16), each=turned, mr=mr)


def enhanced(folder: Path, path: Path, *, mr: bool = False, syntax: Any = None) -> Path:
    """One object of the slices of a folder, made by highdicom."""
    read = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    for one in read:
        one.AcquisitionNumber, one.ImageType, one.BodyPartExamined = 1, ["ORIGINAL", "PRIMARY", "AXIAL"], "HEAD"
        one.Laterality, one.PatientPosition, one.Manufacturer, one.PositionReferenceIndicator = "", "HFS", "A", ""
    kind = highdicom.legacy.LegacyConvertedEnhancedMRImage if mr else highdicom.legacy.LegacyConvertedEnhancedCTImage
    more = {} if syntax is None else {"transfer_syntax_uid": syntax}
    made = kind(read, generate_uid(), 7, generate_uid(), 1, **more)
    made.save_as(path)
    return path


def several(path: Path, objects: list[Path]) -> Path:
    """The frames of several objects in one, in turn: time points of one stack."""
    first, *others = [pydicom.dcmread(item) for item in objects]
    count = int(first.NumberOfFrames)
    groups, pixels = [], []
    stacks = [first, *others]
    for index in range(count):
        for time, one in enumerate(reversed(stacks)):  # the order of frames says nothing; the dimension does
            group = copy.deepcopy(one.PerFrameFunctionalGroupsSequence[index])
            group.FrameContentSequence[0].DimensionIndexValues = [len(stacks) - time, index + 1]
            groups.append(group)
            pixels.append(one.pixel_array[index])
    pointers = []
    for pointer in (0x00209128, 0x00209057):
        item = Dataset()
        item.DimensionIndexPointer, item.FunctionalGroupPointer = pointer, 0x00209111
        pointers.append(item)
    first.DimensionIndexSequence, first.PerFrameFunctionalGroupsSequence = pointers, groups
    first.NumberOfFrames, first.PixelData = len(groups), np.stack(pixels).tobytes()
    first.save_as(path)
    return path


@pytest.mark.parametrize(("mr", "syntax"), [(False, None), (True, None), (False, JPEGLSLossless)])
def test_an_enhanced_object_is_the_series_that_it_was_made_of(tmp_path: Path, mr: bool, syntax: Any) -> None:
    single = read_volume(slices(tmp_path / "single", mr=mr))
    path = enhanced(tmp_path / "single", tmp_path / "enhanced.dcm", mr=mr, syntax=syntax)
    found = read_volume(path)
    assert np.array_equal(found.array, single.array)
    assert found.array.dtype == single.array.dtype
    assert np.allclose(found.affine, single.affine, atol=1e-6)
    assert found.modality == single.modality
    shape, affine = read_grid(path)
    assert shape == SHAPE
    assert np.array_equal(affine, found.affine)


def test_one_volume_of_several_is_chosen_by_its_number(tmp_path: Path) -> None:
    objects = [enhanced(slices(tmp_path / f"s{n}", n, mr=True), tmp_path / f"e{n}.dcm", mr=True) for n in range(3)]
    (tmp_path / "all").mkdir()
    path = several(tmp_path / "all" / "all.dcm", objects)
    with pytest.raises(DataError, match=r"3 volumes in one series.*from 0 to 2.*--frame N"):
        read_volume(path)
    for n in range(3):
        assert np.array_equal(read_volume(path, frame=n).array, read_volume(tmp_path / f"s{n}").array), n
        assert read_grid(path, ReadOptions(frame=n))[0] == SHAPE
    with pytest.raises(DataError, match="of which frame 3 was asked for"):
        read_volume(path, frame=3)


def test_masks_refer_to_the_frames_of_the_object_and_come_back(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    path = several(tmp_path / "all" / "all.dcm", [enhanced(slices(tmp_path / f"s{n}", n), tmp_path / f"e{n}.dcm") for n in range(2)])
    volume = read_volume(path, frame=1)
    mask = volume.array > 200
    source = pydicom.dcmread(path)
    structures = pydicom.dcmread(write_rtstruct(tmp_path / "rt.dcm", volume, {"liver": mask}))
    for contour in structures.ROIContourSequence[0].ContourSequence:
        (image,) = contour.ContourImageSequence
        group = source.PerFrameFunctionalGroupsSequence[image.ReferencedFrameNumber - 1]
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert group.FrameContentSequence[0].DimensionIndexValues[0] == 2
        offset = np.array(contour.ContourData[:3], float) - np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        assert abs(offset @ np.cross([0.6, 0.8, 0.0], [0.0, 0.0, -1.0])) < 1e-3
    segments = write_dicom_seg(tmp_path / "seg.dcm", volume, {"liver": mask})
    read = highdicom.seg.segread(segments)
    placed = read.get_volume(segment_numbers=[1])
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    values = np.asarray(placed.array)[..., 0]  # in highdicom's own order of axes
    centres = np.argwhere(values) @ (to_ras @ placed.affine)[:3, :3].T + (to_ras @ placed.affine)[:3, 3]
    mine = np.argwhere(mask) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    assert np.allclose(sorted(map(tuple, centres.round(2))), sorted(map(tuple, mine.round(2))), atol=0.02)
    for file in (segments, tmp_path / "rt.dcm"):
        back = read_masks(Case(path, ("liver",), "ct", mask=file), volume)
        assert np.array_equal(back.mask("liver"), mask), file.name


def test_frames_without_a_place_or_with_uneven_numbers_are_refused(tmp_path: Path) -> None:
    path = enhanced(slices(tmp_path / "s"), tmp_path / "e.dcm")
    whole = pydicom.dcmread(path)
    cine = copy.deepcopy(whole)
    del cine.PerFrameFunctionalGroupsSequence
    (tmp_path / "cine").mkdir()
    cine.save_as(tmp_path / "cine" / "a.dcm")
    with pytest.raises(DataError, match="6 frames with 0 groups"):
        read_volume(tmp_path / "cine" / "a.dcm")
    (tmp_path / "odd").mkdir()
    whole.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence = whole.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    whole.save_as(tmp_path / "odd" / "a.dcm")
    with pytest.raises(DataError, match="1 frames at some places and 2 at others"):
        read_volume(tmp_path / "odd")
    (tmp_path / "short").mkdir()
    whole.PerFrameFunctionalGroupsSequence = whole.PerFrameFunctionalGroupsSequence[:3]
    whole.save_as(tmp_path / "short" / "a.dcm")
    with pytest.raises(DataError, match="6 frames with 3 groups"):
        read_volume(tmp_path / "short")
