"""RTSTRUCT: outlines of masks for radiotherapy, out and in. Needs the extra `dicom`.

Written as the standard's Structure Set with closed planar contours, one ROI a label, each contour on the slice that it names. Read
back, contours of a slice that lie inside one another cut holes (an odd number of them is inside), and lie on the slices of an image.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.contours import filled, outlines
from medlore.data.volumes.dicom_files import find_files, read_header
from medlore.data.volumes.geometry import Array, Shape
from medlore.data.volumes.mask_codes import combined_codes
from medlore.data.volumes.mask_files import MaskFile
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.structures import Code, CodedStructure, structure_of
from medlore.errors import DataError, InputError
from medlore.extras import require
from medlore.files import atomic_path

_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_STUDY = "1.2.840.10008.3.1.2.3.1"  # the class that references to a study name, by the standard
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
_TAKEN_OVER = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator",
)  # fmt: skip
_NUMBER = "%.4f"  # mm; a tenth of a micrometre
_OFF_SLICE = 0.26  # of a slice's distance: contours drawn between slices are not guessed
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def write_rtstruct(path: str | Path, volume: Volume, masks: Mapping[str, Array]) -> Path:
    """Write one RTSTRUCT object whose ROIs are the outlines of masks, on the slices of `volume`.

    Args:
        path: the file.
        volume: read from DICOM.
        masks: label -> Boolean x y z on the grid of `volume`, asked for one at a time; an empty one is a ROI without contours.

    Raises:
        MissingExtraError: pydicom or contourpy is not installed.
        InputError: the volume did not come from DICOM.
        DataError: the headers of its slices lack what contours refer to.
    """
    check_rtstruct(volume)
    path = Path(path)
    with atomic_path(path) as temporary:
        _structure_set(volume, masks).save_as(temporary, enforce_file_format=True)
    return path


def check_rtstruct(volume: Volume) -> None:
    """Say what a volume lacks for contours before a network runs for hours.

    Raises:
        MissingExtraError: pydicom or contourpy is not installed.
        InputError: the volume did not come from DICOM.
        DataError: the headers of its slices lack what contours refer to.
    """
    require("pydicom", "RTSTRUCT")
    require("contourpy", "RTSTRUCT")
    if not volume.slices:
        raise InputError(str(volume.path), "an image that is not DICOM", "a DICOM series", "give --dicom-reference, or leave rtstruct out")
    missing = [name for name in _NEEDED if any(not header.get(name) for header in volume.slices)]
    if missing:
        came = f"slices without {', '.join(missing)}, to which an RTSTRUCT would refer"
        raise DataError(str(volume.path), came, "a series with these attributes", "leave rtstruct out, or export the series with them")


def _structure_set(volume: Volume, masks: Mapping[str, Array]) -> Any:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    from medlore import __version__

    first, now = volume.slices[0], dt.datetime.now().astimezone()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTStructureSetStorage, generate_uid(prefix=None)
    meta.TransferSyntaxUID = ImplicitVRLittleEndian  # long contours do not fit the lengths of the explicit one
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID, made.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    for name in _TAKEN_OVER:
        setattr(made, name, first.get(name))
    made.Modality, made.SeriesInstanceUID, made.SeriesNumber, made.InstanceNumber = "RTSTRUCT", generate_uid(prefix=None), 950, 1
    made.SeriesDescription = "MedLoRE structures (research, not for diagnosis)"
    made.OperatorsName, made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions = "", "MedLoRE", "medlore segment", __version__
    made.StructureSetLabel, made.StructureSetName = "MedLoRE", "MedLoRE segmentation"
    made.StructureSetDate = made.InstanceCreationDate = now.strftime("%Y%m%d")
    made.StructureSetTime = made.InstanceCreationTime = now.strftime("%H%M%S")
    made.ReferencedFrameOfReferenceSequence = _references(volume)
    rois, contours, meanings = [], [], []
    for number, label in enumerate(masks, start=1):
        structure = structure_of(label)
        rois.append(_item(ROINumber=number, ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID, ROIName=label[:64],
                          ROIGenerationAlgorithm="AUTOMATIC"))  # fmt: skip
        contours.append(_roi(number, structure, _contours(volume, masks[label])))
        meanings.append(_meaning(number, structure))
    made.StructureSetROISequence, made.ROIContourSequence, made.RTROIObservationsSequence = rois, contours, meanings
    return made


def _references(volume: Volume) -> list[Any]:
    """The frame of reference, study, series and slices on which contours lie."""
    first = volume.slices[0]
    images = list({header.SOPInstanceUID: _image(header, whole=True) for header in volume.slices}.values())
    series = _item(SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=images)
    study = _item(ReferencedSOPClassUID=_STUDY, ReferencedSOPInstanceUID=first.StudyInstanceUID, RTReferencedSeriesSequence=[series])
    return [_item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])]


def _image(header: Any, *, whole: bool = False) -> Any:
    """A slice, which may be a frame of an object, or the whole object."""
    made = _item(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)
    if not whole and "ReferencedFrameNumber" in header:
        made.ReferencedFrameNumber = header.ReferencedFrameNumber
    return made


def _roi(number: int, structure: CodedStructure, contours: list[Any]) -> Any:
    made = _item(ReferencedROINumber=number, ROIDisplayColor=list(structure.colour))
    if contours:
        made.ContourSequence = contours
    return made


def _contours(volume: Volume, mask: Array) -> list[Any]:
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    to_mm = (_TO_LPS @ volume.affine)[:3]
    data = Tag("ContourData")
    found = []
    for z in np.flatnonzero(mask.any(axis=(0, 1))):
        image = _image(volume.slices[z])
        for polygon in outlines(mask[:, :, z]):
            points = polygon @ to_mm[:, :2].T + (to_mm[:, 2] * z + to_mm[:, 3])
            made = _item(ContourImageSequence=[image], ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=len(points))
            text = "\\".join([_NUMBER] * points.size) % tuple(points.ravel().tolist())
            content = (text + " " * (len(text) % 2)).encode("ascii")
            made[data] = RawDataElement(data, "DS", len(content), content, 0, True, True)  # as bytes: millions of numbers are not parsed
            found.append(made)
    return found


def _meaning(number: int, structure: CodedStructure) -> Any:
    made = _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="ORGAN", ROIInterpreter="")
    made.ROIObservationLabel = structure.label[:16]
    made.RTROIIdentificationCodeSequence = [_coded(structure.code)]
    return made


def _coded(code: Code) -> Any:
    return _item(CodeValue=code.value, CodingSchemeDesignator="SCT", CodeMeaning=code.meaning)


def _item(**attributes: Any) -> Any:
    from pydicom.dataset import Dataset

    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


# -- in ----------------------------------------------------------------------------------------------------------------


def rtstruct_masks(path: Path, volume: Volume | None) -> MaskFile:
    """The ROIs of one RTSTRUCT object as masks on the grid of an image.

    Args:
        path: the file, or a folder or zip with one such object.
        volume: the image on which the contours lie.

    Raises:
        DataError: not one object, no image, contours of another series, or off its slices.
    """
    if volume is None:
        raise DataError(str(path), "contours without an image", "the image on whose slices they lie", "name it beside the RTSTRUCT")
    files = find_files(path, modality="RTSTRUCT")
    if len(files) != 1:
        raise DataError(str(path), f"{len(files)} RTSTRUCT objects", "one of them", "name its file")
    dataset: Any = read_header(files[0].source, pixels=True)
    drawn_on = _series_of(dataset)
    _check_series(path, drawn_on, volume)
    names = {int(item.ROINumber): str(item.ROIName) for item in dataset.get("StructureSetROISequence") or ()}
    rois: dict[str, list[Any]] = {}
    for item in dataset.get("ROIContourSequence") or ():
        name = names.get(int(item.ReferencedROINumber))
        if name is None:
            came = f"contours of ROI {item.ReferencedROINumber}, which has no name"
            raise DataError(str(path), came, "a name for every ROI", "export it again")
        rois.setdefault(name, []).extend(item.get("ContourSequence") or ())
    if not rois:
        raise DataError(str(path), "an RTSTRUCT without ROIs", "contours with names", "export it again")
    codes, members = combined_codes(_masks_of(rois, volume, path), volume.shape)
    unused = int(codes.max(initial=0)) + 1  # of a ROI without a contour: no voxel has it
    places = {name: tuple((0, code) for code in found or (unused,)) for name, found in members.items()}
    return MaskFile(path, (codes,), volume.affine, places, series=drawn_on)


def _series_of(dataset: Any) -> tuple[str, ...]:
    """UIDs of the series that the contours were drawn on."""
    return tuple(
        str(series.SeriesInstanceUID)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
    )


def _check_series(path: Path, drawn_on: Sequence[str], volume: Volume) -> None:
    own = str(volume.slices[0].get("SeriesInstanceUID")) if volume.slices else None
    if own is not None and drawn_on and own not in drawn_on:
        came = f"contours of series {drawn_on[0]}"
        raise DataError(str(path), came, f"those of this image's series, {own}", "give the RTSTRUCT of this very image")


def _masks_of(rois: Mapping[str, list[Any]], volume: Volume, path: Path) -> Iterator[tuple[str, Array]]:
    to_index = np.linalg.inv(_TO_LPS @ volume.affine)[:3]
    for name, contours in rois.items():
        yield name, _mask_of(contours, to_index, volume.shape, f"{path}, ROI {name}")


def _mask_of(contours: Sequence[Any], to_index: Array, shape: Shape, where: str) -> Array:
    by_slice: dict[int, list[Array]] = {}
    for contour in contours:
        kind = str(contour.get("ContourGeometricType"))
        if kind == "POINT":
            continue
        numbers = np.asarray(contour.get("ContourData") or (), float)
        if kind not in _CLOSED or numbers.size % 3 or numbers.size < 9 or not np.isfinite(numbers).all():
            came = f"a contour of type {kind} with {numbers.size} numbers"
            raise DataError(where, came, "closed planar contours of three points or more", "export it again")
        points = numbers.reshape(-1, 3) @ to_index[:, :3].T + to_index[:, 3]
        z = int(np.rint(points[:, 2].mean()))
        off = float(np.abs(points[:, 2] - z).max())
        if off > _OFF_SLICE or not 0 <= z < shape[2]:
            came = f"a contour that lies {off:.2g} of a slice from slice {z + 1} of {shape[2]}"
            raise DataError(where, came, "contours on the slices of the image", "give the image on which they were drawn")
        by_slice.setdefault(z, []).append(points[:, :2])
    mask: Array = np.zeros(shape, np.bool_)
    for z, polygons in by_slice.items():
        mask[:, :, z] = filled(polygons, shape[:2])
    return mask
