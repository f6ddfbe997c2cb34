"""Masks go out as RTSTRUCT, .seg.nrrd and DICOM-SEG and are what foreign readers find in them; codes are those of SNOMED CT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from matplotlib.path import Path as Polygon
from pydicom.sr.codedict import codes

from medlore.data.volumes.cases import Case
from medlore.data.volumes.contours import filled, outlines
from medlore.data.volumes.dicom import write_dicom_seg
from medlore.data.volumes.masks import read_masks
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.reference import read_reference
from medlore.data.volumes.rtstruct import write_rtstruct
from medlore.data.volumes.seg_nrrd import write_seg_nrrd
from medlore.data.volumes.structures import KINDS, SIDES, structure_of, structures
from medlore.errors import DataError, InputError
from medlore.models.segmenter.vocabulary import default_vocabulary
from small_dicom import GONE, write_slices

SHAPE = (17, 13, 5)
TURNED = np.array([[0.8, 0.6, 0.0], [-0.36, 0.48, 0.8]])  # rows and columns of an oblique scan, DICOM's order


def oblique(dataset: Any, z: int) -> None:
    """Slices of 0.7 x 1.3 mm, 2.5 mm apart, in a turned frame."""
    normal = np.cross(*TURNED)
    dataset.PixelSpacing, dataset.SliceThickness = [1.3, 0.7], 2.5
    dataset.ImageOrientationPatient = [float(v) for v in TURNED.ravel()]
    dataset.ImagePositionPatient = [f"{v:.6f}" for v in np.array([-40.0, 25.0, 110.0]) + normal * 2.5 * z]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    stored = np.random.default_rng(3).integers(0, 2000, SHAPE).astype(np.uint16)
    return read_volume(write_slices(tmp_path_factory.mktemp("series") / "s", stored, each=oblique))


@pytest.fixture(scope="module")
def masks() -> dict[str, np.ndarray[Any, Any]]:
    """A ring with an island in its hole, noise, one voxel, a plate at the border, and nothing; the first two overlap."""
    x, y, z = np.indices(SHAPE)
    radius = np.hypot(x - 8, y - 6)
    ring = (radius <= 5.5) & ~((radius <= 3.5) & (radius > 1.5)) & (z > 0)
    one = np.zeros(SHAPE, bool)
    one[4, 4, 2] = True
    noise = np.random.default_rng(0).random(SHAPE) < 0.45
    return {"liver": ring, "liver tumor": noise, "left kidney": one, "heart": (x < 3) & (z == 4), "spleen": np.zeros(SHAPE, bool)}


def rasterised(dataset: Any, number: int, series: Volume, how: str) -> np.ndarray[Any, Any]:
    """The mask of a ROI by matplotlib, from the headers of the slices that its contours name.

    Args:
        dataset: RTSTRUCT.
        number: of the ROI.
        series: its slices.
        how: `odd` or `any`: which contours a voxel must lie in.
    """
    found = np.zeros(SHAPE, int)
    centres = np.indices(SHAPE[:2]).reshape(2, -1).T
    (roi,) = [item for item in dataset.ROIContourSequence if item.ReferencedROINumber == number]
    for contour in roi.get("ContourSequence", ()):
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        assert contour.NumberOfContourPoints * 3 == len(contour.ContourData)
        uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
        (z,) = [index for index, header in enumerate(series.slices) if uid == header.SOPInstanceUID]
        header = series.slices[z]
        across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
        offset = np.array(contour.ContourData, float).reshape(-1, 3) - np.array(header.ImagePositionPatient, float)
        assert np.abs(offset @ np.cross(across, down)).max() < 1e-3  # mm off the slice
        row_mm, column_mm = map(float, header.PixelSpacing)
        points = np.column_stack([offset @ across / column_mm, offset @ down / row_mm])
        found[:, :, z] += Polygon(np.vstack([points, points[:1]])).contains_points(centres).reshape(SHAPE[:2])
    return found % 2 == 1 if how == "odd" else found > 0


# -- RTSTRUCT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["odd", "any"])
def test_contours_hold_the_voxels_of_the_mask_for_every_way_of_reading_holes(
    tmp_path: Path, series: Volume, masks: dict[str, Any], how: str
) -> None:
    dataset = pydicom.dcmread(write_rtstruct(tmp_path / "rt.dcm", series, masks))
    for roi, (label, mask) in zip(dataset.StructureSetROISequence, masks.items(), strict=True):
        assert roi.ROIName == label
        assert np.array_equal(rasterised(dataset, roi.ROINumber, series, how), mask), label


def test_a_contour_lies_within_half_a_voxel_of_the_border() -> None:
    i, j = np.indices((60, 50))
    radius, centre = 18.3, (29.4, 24.7)
    (outline,) = outlines(np.hypot(i - centre[0], j - centre[1]) <= radius)
    assert np.abs(np.hypot(*(outline - centre).T) - radius).max() <= 0.5
    following = np.roll(outline, -1, axis=0)
    area = 0.5 * abs(float((outline[:, 0] * following[:, 1] - following[:, 0] * outline[:, 1]).sum()))
    assert area == pytest.approx(np.pi * radius**2, rel=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_what_outlines_hold_is_filled_again_and_matplotlib_agrees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 25, 2)) < rng.uniform(0.2, 0.9)
    found = list(outlines(mask))
    assert np.array_equal(filled(found, mask.shape), mask)
    centres = np.indices(mask.shape).reshape(2, -1).T
    inside = [Polygon(np.vstack([p, p[:1]])).contains_points(centres) for p in found]
    assert np.array_equal(np.any([*inside, np.zeros(mask.size, bool)], axis=0).reshape(mask.shape), mask)


def test_an_rtstruct_refers_to_its_series_and_names_its_structures(tmp_path: Path, series: Volume, masks: dict[str, Any]) -> None:
    dataset = pydicom.dcmread(write_rtstruct(tmp_path / "rt.dcm", series, masks))
    source = series.slices[0]
    assert dataset.SOPClassUID == pydicom.uid.RTStructureSetStorage
    assert (dataset.PatientID, dataset.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    frame = dataset.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == source.FrameOfReferenceUID
    referred = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source.SeriesInstanceUID
    images = [item.ReferencedSOPInstanceUID for item in referred.ContourImageSequence]
    assert images == [header.SOPInstanceUID for header in series.slices]
    kidney = dataset.RTROIObservationsSequence[2].RTROIIdentificationCodeSequence[0]
    assert (kidney.CodeValue, kidney.CodingSchemeDesignator) == (codes.SCT.Kidney.value, "SCT")
    assert list(dataset.ROIContourSequence[2].ROIDisplayColor) == list(structure_of("left kidney").colour)
    assert "ContourSequence" not in dataset.ROIContourSequence[4]  # nothing of the spleen


def test_an_rtstruct_comes_back_as_reference_masks(tmp_path: Path, series: Volume, masks: dict[str, Any]) -> None:
    path = write_rtstruct(tmp_path / "rt.dcm", series, masks)
    found = read_masks(Case(series.path, tuple(masks), "ct", mask=path), series)
    for label, mask in masks.items():
        assert np.array_equal(found.mask(label), mask), label
    assert "without a voxel in the reference: spleen" in " ".join(found.notes)


def test_contours_of_another_series_or_off_the_slices_are_refused(tmp_path: Path, series: Volume, masks: dict[str, Any]) -> None:
    path = write_rtstruct(tmp_path / "rt.dcm", series, masks)
    other = read_volume(write_slices(tmp_path / "t", np.zeros(SHAPE, np.uint16), each=oblique))
    with pytest.raises(DataError, match="contours of series"):
        read_masks(Case(other.path, ("liver",), "ct", mask=path), other)
    dataset = pydicom.dcmread(path)
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    normal = np.cross(*TURNED)
    contour.ContourData = [f"{v:.4f}" for v in (np.array(contour.ContourData, float).reshape(-1, 3) + normal).ravel()]
    dataset.save_as(tmp_path / "off.dcm")
    with pytest.raises(DataError, match=r"ROI liver: a contour that lies 0\.4 of a slice from slice"):
        read_masks(Case(series.path, ("liver",), "ct", mask=tmp_path / "off.dcm"), series)


def test_what_contours_refer_to_must_be_there(tmp_path: Path, masks: dict[str, Any]) -> None:
    bare = read_volume(write_slices(tmp_path / "s", np.zeros(SHAPE, np.uint16), FrameOfReferenceUID=GONE))
    with pytest.raises(DataError, match="slices without FrameOfReferenceUID"):
        write_rtstruct(tmp_path / "rt.dcm", bare, masks)
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="not DICOM"):
        write_rtstruct(tmp_path / "rt.dcm", read_volume(tmp_path / "a.nii.gz"), masks)
    assert not (tmp_path / "rt.dcm").exists()


# -- .seg.nrrd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [("liver", "left kidney"), ("liver", "liver tumor", "left kidney", "heart", "spleen")])
def test_simpleitk_and_slicers_fields_find_the_segments(
    tmp_path: Path, series: Volume, masks: dict[str, Any], chosen: tuple[str, ...]
) -> None:
    parted = {label: masks[label] & ~masks["liver"] if len(chosen) == 2 and label != "liver" else masks[label] for label in chosen}
    path = write_seg_nrrd(tmp_path / "a.seg.nrrd", series.affine, SHAPE, parted)
    image = SimpleITK.ReadImage(str(path))
    source = SimpleITK.ReadImage([str(header.filename) for header in series.slices])
    assert np.allclose(image.GetOrigin(), source.GetOrigin(), atol=1e-4)
    assert np.allclose(image.GetSpacing(), (0.7, 1.3, 2.5), atol=1e-4)
    assert np.allclose(image.GetDirection(), source.GetDirection(), atol=1e-5)
    array = SimpleITK.GetArrayFromImage(image)
    layers = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    assert len(layers) == (1 if len(chosen) == 2 else 2)
    for number, label in enumerate(chosen):
        field = {key: image.GetMetaData(f"Segment{number}_{key}") for key in ("Name", "LabelValue", "Layer", "Color", "Extent", "Tags")}
        assert field["Name"] == label
        found = (layers[int(field["Layer"])] == int(field["LabelValue"])).T
        assert np.array_equal(found, parted[label]), label
        assert np.allclose(np.array(field["Color"].split(), float) * 255, structure_of(label).colour, atol=0.01)
        places = np.argwhere(parted[label])
        box = [int(v) for pair in zip(places.min(0), places.max(0), strict=True) for v in pair] if len(places) else [0, -1] * 3
        assert [int(v) for v in field["Extent"].split()] == box
        entry = field["Tags"].split("TerminologyEntry:")[1].rstrip("|").split("~")
        assert len(entry) == 7
        assert entry[2].split("^")[1] == structure_of(label).code.value
    back = read_masks(Case(series.path, chosen, "ct", mask=path), series)
    assert all(np.array_equal(back.mask(label), parted[label]) for label in chosen)


def test_a_layer_of_bytes_is_never_filled_over_its_values(tmp_path: Path) -> None:
    shape = (300, 1, 1)
    apart = {f"label {i}": np.arange(300)[:, None, None] == i for i in range(300)}
    image = SimpleITK.ReadImage(str(write_seg_nrrd(tmp_path / "a.seg.nrrd", np.eye(4), shape, apart)))
    layers = SimpleITK.GetArrayFromImage(image)
    for i in (0, 254, 255, 299):
        layer, value = (int(image.GetMetaData(f"Segment{i}_{key}")) for key in ("Layer", "LabelValue"))
        assert np.array_equal(np.flatnonzero(layers[0, 0, :, layer] == value), [i])


# -- DICOM-SEG, codes and colours --------------------------------------------------------------------------------------


def test_segments_carry_codes_sides_sites_and_colours(tmp_path: Path, series: Volume) -> None:
    labels = ["left kidney", "liver tumor", "right rib 4", "something of mine", "something else"]
    planes = {label: np.indices(SHAPE)[0] == at for at, label in enumerate(labels)}
    read = highdicom.seg.segread(write_dicom_seg(tmp_path / "seg.dcm", series, planes))
    found = {item.SegmentLabel: item for item in read.SegmentSequence}
    kidney, tumour, rib = (found[label].SegmentedPropertyTypeCodeSequence[0] for label in labels[:3])
    assert (kidney.CodeValue, kidney.CodeMeaning) == (codes.SCT.Kidney.value, "Kidney")
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == codes.SCT.Left.value
    assert tumour.CodeValue == codes.SCT.Neoplasm.value
    assert found["liver tumor"].SegmentedPropertyCategoryCodeSequence[0].CodeValue == codes.SCT.MorphologicallyAbnormalStructure.value
    assert found["liver tumor"].AnatomicRegionSequence[0].CodeValue == codes.SCT.Liver.value
    assert found["right rib 4"].AnatomicRegionSequence[0].CodeValue == codes.SCT.Rib.value
    assert rib.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == codes.SCT.Right.value
    schemes = {item.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator for item in found.values()}
    assert schemes == {"SCT"}  # nothing invented
    for label in labels:
        colour = highdicom.color.CIELabColor.from_dicom_value(found[label].RecommendedDisplayCIELabValue).to_rgb()
        assert np.abs(np.array(colour) - structure_of(label).colour).max() <= 2, label
    assert structure_of(labels[3]).colour != structure_of(labels[4]).colour


def test_every_code_of_the_table_stands_in_the_dictionary_with_its_meaning() -> None:
    known: dict[str, set[str]] = {}
    for concept in codes.SCT.concepts.values():
        known.setdefault(concept.value, set()).add(concept.meaning)
    pairs = [tuple(entry[part]) for entry in structures().values() for part in ("code", "site") if entry[part]]
    pairs += [tuple(code) for code in (*KINDS.values(), *SIDES.values(), structure_of("?").code)]
    assert [pair for pair in pairs if pair[1] not in known.get(pair[0], set())] == []
    assert {code.value for code in KINDS.values()} <= {concept.value for concept in codes.cid7150.concepts.values()}


def test_every_label_of_the_vocabulary_has_a_code_or_a_site_and_its_own_sides() -> None:
    labels = {entry.label for entry in default_vocabulary().entries()}
    table = structures()
    bare = [label for label in labels if label not in table and label.replace("left ", "", 1).replace("right ", "", 1) not in table]
    assert bare == []
    assert {structure_of(label).side for label in labels if "right" in label.split()} <= {SIDES["right"], None}
    assert structure_of("left lung").colour != structure_of("right lung").colour
    unused = [
        name for name in table if not any(name in label or name in label.replace("left ", "").replace("right ", "") for label in labels)
    ]
    assert unused == []


# -- the series that an image was converted from -----------------------------------------------------------------------


def as_nifti(path: Path, series: Volume, *, seed: int | None = None) -> Volume:
    """A series as converters write it: rows turned round, axes in another order."""
    array = series.array if seed is None else np.random.default_rng(seed).permutation(series.array.ravel()).reshape(SHAPE)
    step = np.eye(4)
    step[1, 1], step[1, 3] = -1, SHAPE[1] - 1
    turned = nib.Nifti1Image(array[:, ::-1].astype(np.int16), series.affine @ step)
    nib.save(turned.as_reoriented(np.array([[2, 1], [0, 1], [1, -1]])), path)
    return read_volume(path)


def test_masks_of_a_converted_image_lie_on_the_slices_of_its_series(tmp_path: Path, series: Volume, masks: dict[str, Any]) -> None:
    image = as_nifti(tmp_path / "ct.nii.gz", series)
    reference = read_reference(series.path, image)
    assert image.shape != SHAPE
    mine = {"liver": image.array > 300}
    dataset = pydicom.dcmread(write_rtstruct(tmp_path / "rt.dcm", reference.volume, reference.masks(mine)))
    assert np.array_equal(rasterised(dataset, 1, series, "odd"), series.array > 300)


def test_a_series_that_is_not_the_images_is_refused(tmp_path: Path, series: Volume) -> None:
    with pytest.raises(DataError, match=r"on the grid of .* whose grey values are others"):
        read_reference(series.path, as_nifti(tmp_path / "other.nii.gz", series, seed=1))
    shifted = read_volume(write_slices(tmp_path / "t", (series.array + 1024).astype(np.uint16)))
    with pytest.raises(DataError, match="whose places are not those of"):
        read_reference(shifted.path, as_nifti(tmp_path / "ct.nii.gz", series))
    with pytest.raises(DataError, match="the series of"):
        read_reference(shifted.path, series)
