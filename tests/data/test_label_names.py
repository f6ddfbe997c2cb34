"""Which label a value is: names are believed before order, and what nobody claims is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from medlore.data.volumes.cases import Case
from medlore.data.volumes.dicom import write_dicom_seg
from medlore.data.volumes.masks import read_masks
from medlore.data.volumes.nifti import Volume, read_nifti, write_nifti
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError
from small_dicom import write_slices

SHAPE = (9, 8, 7)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])
CODES = np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    array = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "image.nii.gz")
    return read_nifti(tmp_path / "image.nii.gz")


def case(volume: Volume, labels: tuple[str, ...], mask: Path, **other: Any) -> Case:
    return Case(volume.path, labels, "ct", mask=mask, line=3, other=other)


def plain(folder: Path, codes: np.ndarray[Any, Any] = CODES) -> Path:
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(codes, AFFINE), folder / "mask.nii.gz")
    return folder / "mask.nii.gz"


# -- names of a label map ----------------------------------------------------------------------------------------------

TABLES = [
    {"labels": {"3": "liver", "1": "Left_Kidney"}},
    {"labels": {"background": 0, "liver": 3, "left kidney": 1}},
    {"3": "liver", "1": "left kidney"},
    {"liver": 3, "left kidney": "1"},
]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_beside_the_mask_is_believed_before_order(tmp_path: Path, volume: Volume, table: dict[str, Any]) -> None:
    mask = plain(tmp_path / "m")
    (tmp_path / "m" / "labels.json").write_text(json.dumps(table))
    found = read_masks(case(volume, ("left kidney", "liver"), mask), volume)
    assert np.array_equal(found.mask("liver"), CODES == 3)
    assert np.array_equal(found.mask("left kidney"), CODES == 1)
    assert found.notes == ("values in the mask that belong to no label of the case: 2",)


@pytest.mark.parametrize("table", ["{", "[1]", '{"labels": 3}', '{"labels": {"liver": "two"}}', '{"labels": {"1": "a", "b": 1}}'])
def test_a_broken_table_is_a_fault_and_no_reason_to_guess(tmp_path: Path, volume: Volume, table: str) -> None:
    mask = plain(tmp_path / "m")
    (tmp_path / "m" / "labels.json").write_text(table)
    with pytest.raises(DataError, match=r"labels\.json"):
        read_masks(case(volume, ("liver",), mask), volume)


def test_a_label_that_the_table_does_not_name_is_a_fault(tmp_path: Path, volume: Volume) -> None:
    mask = plain(tmp_path / "m")
    (tmp_path / "m" / "labels.json").write_text(json.dumps({"1": "livers"}))
    with pytest.raises(DataError, match=r"no value for 'liver'; the nearest are 'livers'"):
        read_masks(case(volume, ("liver",), mask), volume)


def test_the_line_is_believed_before_the_table_and_the_file_before_its_neighbour(tmp_path: Path, volume: Volume) -> None:
    write_nifti(tmp_path / "mask.nii.gz", CODES, volume, labels={2: "liver"})
    (tmp_path / "labels.json").write_text(json.dumps({"3": "liver"}))
    assert read_masks(case(volume, ("liver",), tmp_path / "mask.nii.gz"), volume).members == {"liver": (2,)}
    entry = case(volume, ("liver",), tmp_path / "mask.nii.gz", mask_values={"liver": [1, 3]})
    assert read_masks(entry, volume).members == {"liver": (1, 3)}


def test_the_table_of_workbench_in_a_nifti_header(tmp_path: Path, volume: Volume) -> None:
    xml = (
        '<?xml version="1.0"?><CaretExtension><VolumeInformation><LabelTable>'
        '<Label Key="0" Red="0"><![CDATA[???]]></Label><Label Key="2" Red="1"><![CDATA[spleen]]></Label>'
        '<Label Key="3" Red="1">liver &amp; more</Label></LabelTable></VolumeInformation></CaretExtension>'
    )
    image = nib.Nifti1Image(CODES, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, tmp_path / "mask.nii.gz")
    found = read_masks(case(volume, ("liver & more", "spleen"), tmp_path / "mask.nii.gz"), volume)
    assert found.members == {"liver & more": (3,), "spleen": (2,)}


def test_order_is_said_and_so_is_what_it_leaves_over(tmp_path: Path, volume: Volume) -> None:
    found = read_masks(case(volume, ("liver", "spleen"), plain(tmp_path / "m")), volume)
    assert "taken in the order of the labels" in found.notes[0]
    assert "belong to no label of the case: 3" in found.notes[1]


def test_a_label_without_a_voxel_is_said(tmp_path: Path, volume: Volume) -> None:
    mask = plain(tmp_path / "m", np.where(CODES == 1, 0, CODES).astype(np.uint8))
    found = read_masks(case(volume, ("liver", "spleen"), mask, mask_values={"liver": 1, "spleen": 2}), volume)
    assert found.notes[-1] == "labels without a voxel in the reference: liver; they count as absent from this image"


# -- segmentations of Slicer -------------------------------------------------------------------------------------------


def save_segments(
    path: Path, layers: list[np.ndarray[Any, Any]], segments: list[dict[str, str]], origin: tuple[int, ...] = (0, 0, 0)
) -> Path:
    """As Slicer writes them: layers first and fastest, one key a fact."""
    array = np.stack(layers) if len(layers) > 1 else layers[0]
    sizes = " ".join(map(str, array.shape))
    head = f"NRRD0004\ntype: unsigned char\ndimension: {array.ndim}\nspace: left-posterior-superior\nsizes: {sizes}\n"
    head += (
        f"space directions: {'none ' * (array.ndim - 3)}(1,0,0) (0,1,0) (0,0,2)\nkinds: {'list ' * (array.ndim - 3)}domain domain domain\n"
    )
    head += f"endian: little\nencoding: raw\nspace origin: ({origin[0]},{origin[1]},{2 * origin[2]})\n"
    head += "".join(f"Segment{k}_{name}:={value}\n" for k, entry in enumerate(segments) for name, value in entry.items())
    path.write_bytes(head.encode() + b"\n" + array.astype(np.uint8).tobytes(order="F"))
    return path


def segment(name: str, value: int, layer: int = 0) -> dict[str, str]:
    return {"Name": name, "LabelValue": str(value), "Layer": str(layer), "Color": "1 0 0"}


def test_names_of_slicer_are_believed_whatever_their_order(tmp_path: Path, volume: Volume) -> None:
    path = save_segments(tmp_path / "a.seg.nrrd", [CODES], [segment("spleen", 3), segment("Left Kidney", 1), segment("other", 2)])
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, CODES)
    found = read_masks(case(volume, ("left kidney", "spleen"), path), volume)
    assert np.array_equal(found.mask("spleen"), CODES == 3)
    assert np.array_equal(found.mask("left kidney"), CODES == 1)
    assert found.notes == ("segments in the file that are no label of the case: other",)
    with pytest.raises(DataError, match="no segment for 'liver'; the nearest are"):
        read_masks(case(volume, ("liver",), path), volume)


def test_segments_that_overlap_lie_in_layers(tmp_path: Path, volume: Volume) -> None:
    over = np.random.default_rng(5).integers(0, 2, SHAPE).astype(np.uint8)
    path = save_segments(tmp_path / "a.seg.nrrd", [CODES, over], [segment("a", 3), segment("b", 1, 1), segment("c", 1)])
    found = read_masks(case(volume, ("a", "b", "c"), path), volume)
    assert np.array_equal(found.mask("a"), CODES == 3)
    assert np.array_equal(found.mask("b"), over == 1)
    assert np.array_equal(found.mask("c"), CODES == 1)


def test_a_cropped_segmentation_is_put_in_its_place(tmp_path: Path, volume: Volume) -> None:
    path = save_segments(tmp_path / "a.seg.nrrd", [CODES[2:6, 1:5, 3:]], [segment("a", 3)], origin=(2, 1, 3))
    wanted = np.zeros(SHAPE, bool)
    wanted[2:6, 1:5, 3:] = CODES[2:6, 1:5, 3:] == 3
    assert np.array_equal(read_masks(case(volume, ("a",), path), volume).mask("a"), wanted)
    for origin in ((-2, 1, 3), (2, 5, 3), (2.5, 1, 3)):  # out of the image, or between its voxels
        save_segments(tmp_path / "b.seg.nrrd", [CODES[2:6, 1:5, 3:]], [segment("a", 3)], origin=origin)
        with pytest.raises(DataError, match="a mask of 4 x 4 x 4 voxels"):
            read_masks(case(volume, ("a",), tmp_path / "b.seg.nrrd"), volume)


@pytest.mark.parametrize("entry", [{"Name": "a"}, {"Name": "a", "LabelValue": "x"}, {"Name": "a", "LabelValue": "1", "Layer": "4"}])
def test_a_segment_without_name_value_or_layer_is_a_fault(tmp_path: Path, volume: Volume, entry: dict[str, str]) -> None:
    with pytest.raises(DataError, match="segment 0 without a name"):
        read_masks(case(volume, ("a",), save_segments(tmp_path / "a.seg.nrrd", [CODES], [entry])), volume)


# -- DICOM-SEG ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> Volume:
    array = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.uint16)
    return read_volume(write_slices(tmp_path / "s", array))


def test_dicom_seg_names_its_segments_and_leaves_empty_slices_out(tmp_path: Path, series: Volume) -> None:
    masks = {"liver": np.zeros(SHAPE, bool), "spleen": np.zeros(SHAPE, bool)}
    masks["liver"][2:5, 3:6, 2] = masks["liver"][2:5, 3:6, 5] = True
    masks["spleen"][6:, :2, 4] = True
    path = write_dicom_seg(tmp_path / "seg.dcm", series, masks)
    assert int(pydicom.dcmread(path).NumberOfFrames) < 2 * SHAPE[2]
    found = read_masks(case(series, ("spleen", "liver"), path), series)
    for label, mask in masks.items():
        assert np.array_equal(found.mask(label), mask), label


def test_dicom_seg_of_another_series_is_refused(tmp_path: Path, series: Volume) -> None:
    other = read_volume(write_slices(tmp_path / "t", series.array.astype(np.uint16)))
    path = write_dicom_seg(tmp_path / "seg.dcm", other, {"liver": np.ones(SHAPE, bool)})
    with pytest.raises(DataError, match="a segmentation of series"):
        read_masks(case(series, ("liver",), path), series)


def test_an_image_series_is_no_mask(tmp_path: Path, series: Volume) -> None:
    with pytest.raises(DataError, match="0 DICOM-SEG objects"):
        read_masks(case(series, ("liver",), tmp_path / "s"), series)
    path = write_dicom_seg(tmp_path / "seg.dcm", series, {"liver": np.ones(SHAPE, bool)})
    with pytest.raises(DataError, match="no DICOM image"):
        read_volume(path)


def test_masks_with_nan_are_no_masks(tmp_path: Path, volume: Volume) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, np.nan, np.float32), AFFINE), tmp_path / "liver.nii.gz")
    with pytest.raises(DataError, match="not finite"):
        read_masks(Case(volume.path, ("liver",), "ct", other={"mask": {"liver": str(tmp_path / "liver.nii.gz")}}), volume)
