"""DICOM in (one series of images, single-frame or enhanced multi-frame, in a folder or zip) and DICOM-SEG out. Needs the extra `dicom`."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.codestreams import check_codestream
from medlore.data.volumes.dicom_files import DicomFile, find_files, read_header
from medlore.data.volumes.dicom_frames import frames_of, is_multi_frame, one_volume
from medlore.data.volumes.dicom_series import check_kind, check_one_owner, choose_series, stack, values_of
from medlore.data.volumes.geometry import Array, Shape, check_affine, spacing_of
from medlore.data.volumes.nifti import Volume, header_for
from medlore.data.volumes.structures import CodedStructure, structure_of
from medlore.data.volumes.voxel_bytes import check_frame, check_memory
from medlore.errors import DataError, InputError, MedloreError, reason_of
from medlore.extras import require
from medlore.files import atomic_path

_MODALITIES = {"CT": "ct", "MR": "mri", "PT": "pet", "US": "us"}
_MAY_BE_EMPTY = (
    "AccessionNumber", "PatientBirthDate", "PatientID", "PatientName", "PatientSex", "ReferringPhysicianName", "StudyDate", "StudyID",
    "StudyTime",
)  # fmt: skip
_TOGETHER = ("RescaleSlope", "RescaleIntercept")


def read_dicom(path: str | Path, *, series: str | None = None, frame: int | None = None, most_bytes: int | None = None) -> Volume:
    """Read one DICOM series.

    Headers are read first; pixels only of the series that is meant, once its size and place are known.

    Args:
        path: a folder (searched through and through), a zip, or one file of a series, whose other files lie in the same folder.
        series: SeriesInstanceUID, or its end, where there are several.
        frame: which volume of an enhanced multi-frame series that holds several, from 0.
        most_bytes: voxels that need more than this are refused before they are read.

    Raises:
        MissingExtraError: pydicom is not installed.
        DataError: no image, several series, patients, studies or frames of reference, damaged, missing, doubled or shifted slices,
            uneven spacing, several volumes, colour.
    """
    path = Path(path)
    slices, affine, notes = _stack_of(path, series, frame)
    x, y, z = _shape_of(slices)
    check_memory(x * y * z * 4, f"a series of {x} x {y} x {z} voxels", path, most_bytes=most_bytes)
    array = _voxels(slices)
    notes += _tilt_note(slices)
    modality = _MODALITIES.get(slices[0].text("Modality"))
    headers = tuple(file.header for file in slices)
    return Volume(array, affine, header_for(affine, (x, y, z)), (x, y, z), path, tuple(notes), modality, headers)


def read_dicom_grid(path: str | Path, *, series: str | None = None, frame: int | None = None) -> tuple[Shape, Array]:
    """Shape and affine of a series, from its headers alone.

    Raises:
        DataError: as `read_dicom`, as far as the headers show.
    """
    slices, affine, _ = _stack_of(Path(path), series, frame)
    return _shape_of(slices), affine


def read_slice_headers(path: str | Path, *, series: str | None = None, frame: int | None = None) -> tuple[Any, ...]:
    """The headers of a series, in the order of z, without its pixels.

    Raises:
        DataError: as `read_dicom`, as far as the headers show.
    """
    return tuple(file.header for file in _stack_of(Path(path), series, frame)[0])


def dicom_modality(path: str | Path) -> str | None:
    """`ct`, `mri`, `pet` or `us`, from the first DICOM image below a path; None where there is none, or it does not say."""
    first = next(iter(find_files(Path(path))), None)
    return None if first is None else _MODALITIES.get(first.text("Modality"))


def _files_of(path: Path, series: str | None) -> tuple[list[DicomFile], str | None]:
    """The files in which a series is looked for, and its UID where that is still to be chosen: one file names its own."""
    files = find_files(path)
    if path.is_file() and len(files) == 1 and files[0].source == path:  # one slice: the series is the one that it belongs to
        own = files[0].text("SeriesInstanceUID")
        if series is not None and not own.endswith(series):
            raise DataError(str(path), f"an image of series {own}, not of {series!r}", "a file of the series", "name another file")
        return [file for file in find_files(path.parent) if file.text("SeriesInstanceUID") == own], None
    return files, series


def _stack_of(path: Path, series: str | None, frame: int | None) -> tuple[list[DicomFile], Array, list[str]]:
    files, series = _files_of(path, series)
    chosen = choose_series(files, series, path)
    if any(map(is_multi_frame, chosen)):
        chosen = one_volume([part for file in chosen for part in frames_of(file)], frame, path)
    else:
        check_frame(frame, path)
    check_kind(chosen, path)
    slices, affine, notes = stack(chosen, path)
    check_affine(affine, str(path))
    check_one_owner(slices, path)
    for name in _TOGETHER:
        without = sum(file.numbers(name, 1) is None for file in slices)
        if 0 < without < len(slices):
            came = f"{without} of {len(slices)} images without {name}"
            raise DataError(str(path), came, "all images with it, or none", "export the series again")
    if not slices[0].text("SeriesInstanceUID"):
        notes.append("the images have no SeriesInstanceUID; they were taken for one series")
    if any(file.text("PhotometricInterpretation") == "MONOCHROME1" for file in slices):
        notes.append("the header asks for inverted display (MONOCHROME1); values were taken as they are stored")
    return slices, affine, notes


def _shape_of(slices: Sequence[DicomFile]) -> Shape:
    return int(slices[0].number("Columns", 0)), int(slices[0].number("Rows", 0)), len(slices)


def _voxels(slices: Sequence[DicomFile]) -> Array:
    """Voxels x y z; int16 or int32 where slopes and intercepts leave whole numbers that fit, else floating point."""
    planes, all_whole = [], True
    read: dict[Any, Any] = {}  # the object that was read last: all frames of one lie in it
    for file in slices:
        if file.source not in read:
            read = {file.source: read_header(file.source, pixels=True)}
        dataset = read[file.source]
        check_codestream(dataset, file.source, file.frame)
        values, whole = values_of(file, dataset, file.source)
        all_whole = all_whole and whole
        planes.append(_narrow(values, whole=whole))
    kind = np.result_type(*planes) if all_whole else np.dtype(np.float32)
    return np.stack([plane.astype(kind, copy=False) for plane in planes], axis=-1)


def _narrow(values: Array, *, whole: bool) -> Array:
    if not whole:
        return values.astype(np.float32)
    low, high = int(values.min()), int(values.max())
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.float64)


def _tilt_note(slices: Sequence[DicomFile]) -> list[str]:
    tilt = slices[0].number("GantryDetectorTilt", 0)
    return [f"the header gives a gantry tilt of {tilt:g} degrees"] if abs(tilt) > 0.1 else []


def write_dicom_seg(path: str | Path, volume: Volume, masks: Mapping[str, Array]) -> Path:
    """Write DICOM-SEG objects with one binary segment a label, that refer to the slices of `volume`.

    One object holds labels that share no voxel, so that one label map is all that is held in memory; labels that overlap with
    them go into further files, `NAME_2.dcm` and so on. Masks are asked for one at a time.

    Args:
        path: the (first) file.
        volume: read from DICOM.
        masks: label -> Boolean x y z on the grid of `volume`; empty ones are left out by the caller.

    Returns:
        The first file.

    Raises:
        MissingExtraError: highdicom is not installed.
        InputError: the volume did not come from DICOM, or there is no mask.
        DataError: the headers of the slices do not allow one.
    """
    path = Path(path)
    left = list(masks)
    if not volume.slices or not left:
        came = "an image that is not DICOM" if not volume.slices else "no label with a voxel"
        raise InputError("DICOM-SEG", came, "a DICOM series and at least one mask that is not empty", "leave dicom-seg out of --format")
    number = 1
    while left:
        chosen, pixels, left = _layer(left, masks, volume.shape)
        with _refused_by_highdicom(volume):
            made = _layer_object(volume, chosen, pixels, 899 + number)
        with atomic_path(path if number == 1 else path.with_stem(f"{path.stem}_{number}")) as temporary:
            made.save_as(temporary)
        number += 1
    return path


def check_dicom_seg(volume: Volume) -> None:
    """Make a DICOM-SEG of one voxel in memory, so that what its slices lack is said before a network runs for hours.

    Raises:
        MissingExtraError: highdicom is not installed.
        InputError: the volume did not come from DICOM.
        DataError: the headers of the slices do not allow one.
    """
    if not volume.slices:
        raise InputError(str(volume.path), "an image that is not DICOM", "a DICOM series", "give --dicom-reference, or leave dicom-seg out")
    x, y, z = volume.shape
    pixels: Array = np.zeros((z, y, x), np.uint8)
    pixels[0, 0, 0] = 1
    with _refused_by_highdicom(volume):
        _layer_object(volume, ["voxel"], pixels, 900).save_as(io.BytesIO())


@contextlib.contextmanager
def _refused_by_highdicom(volume: Volume) -> Iterator[None]:
    """What highdicom and pydicom say of the slices, as an error of ours."""
    try:
        yield
    except (MedloreError, OSError):  # a full disk is no fault of the slices
        raise
    except Exception as error:  # highdicom and pydicom share no parent of their errors
        accepted, fix = "the attributes that the standard asks for", "leave dicom-seg out, or export the series with its attributes"
        raise DataError(str(volume.path), f"no DICOM-SEG can refer to its slices ({reason_of(error)})", accepted, fix) from error


def _layer(labels: Sequence[str], masks: Mapping[str, Array], shape: Sequence[int]) -> tuple[list[str], Array, list[str]]:
    """Labels that share no voxel, their label map (slices, rows, columns), and the labels that overlap with them."""
    pixels: Array = np.zeros((shape[2], shape[1], shape[0]), np.uint8 if len(labels) < 256 else np.uint16)
    chosen: list[str] = []
    left = []
    for label in labels:
        mask = np.transpose(masks[label], (2, 1, 0))
        if chosen and pixels[mask].any():
            left.append(label)
        else:
            chosen.append(label)
            pixels[mask] = len(chosen)
    return chosen, pixels, left


def _layer_object(volume: Volume, labels: Sequence[str], pixels: Array, series_number: int) -> Any:
    highdicom = require("highdicom", "DICOM-SEG")
    from highdicom.sr.coding import CodedConcept

    from medlore import __version__

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="MedLoRE", version=__version__, family=CodedConcept("123109", "DCM", "Artificial Intelligence")
    )
    segments = [_described(number, structure_of(label), algorithm) for number, label in enumerate(labels, start=1)]
    return highdicom.seg.Segmentation(
        source_images=_sources(volume),
        pixel_array=pixels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=series_number,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="MedLoRE",
        manufacturer_model_name="medlore segment",
        software_versions=__version__,
        device_serial_number="0",
        series_description="MedLoRE segmentation (research, not for diagnosis)",
        omit_empty_frames=True,
        **_places(volume),
    )


def _described(number: int, structure: CodedStructure, algorithm: Any) -> Any:
    """A segment: what it is, on which side, where it lies, and its colour."""
    import highdicom
    from pydicom.sr.coding import Code as Coded

    made = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=structure.label[:64],
        segmented_property_category=Coded(structure.kind.value, "SCT", structure.kind.meaning),
        segmented_property_type=Coded(structure.code.value, "SCT", structure.code.meaning),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        anatomic_regions=None if structure.site is None else [Coded(structure.site.value, "SCT", structure.site.meaning)],
        display_color=highdicom.color.CIELabColor.from_rgb(*structure.colour),
    )
    if structure.side is not None:
        side = highdicom.sr.CodedConcept(structure.side.value, "SCT", structure.side.meaning)
        made.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return made


def _places(volume: Volume) -> dict[str, Any]:
    """Where the slices lie, said outright where they are frames: those of one volume of several, in the order of z."""
    import highdicom

    if not _in_frames(volume):
        return {}
    row, column, between = (float(v) for v in (*volume.slices[0].PixelSpacing, spacing_of(volume.affine)[2]))
    thick = float(volume.slices[0].get("SliceThickness") or between)
    return {
        "plane_positions": [highdicom.PlanePositionSequence("PATIENT", list(map(float, h.ImagePositionPatient))) for h in volume.slices],
        "plane_orientation": highdicom.PlaneOrientationSequence("PATIENT", list(map(float, volume.slices[0].ImageOrientationPatient))),
        "pixel_measures": highdicom.PixelMeasuresSequence([row, column], thick, between),
    }


def _in_frames(volume: Volume) -> bool:
    return any("ReferencedFrameNumber" in header for header in volume.slices)


def _objects(volume: Volume) -> Sequence[Any]:
    """Headers of the objects that the slices are, or of the one whose frames they are."""
    if not _in_frames(volume):
        return volume.slices
    wanted = {header.SOPInstanceUID for header in volume.slices}
    files, _ = _files_of(volume.path, None)
    return [file.header for file in files if file.header.get("SOPInstanceUID") in wanted]


def _sources(volume: Volume) -> list[Any]:
    """Headers of the slices with all that a DICOM-SEG takes over: what is absent and may be empty by the standard (type 2) is empty."""
    spacing = float(spacing_of(volume.affine)[2])
    found = []
    for header in _objects(volume):
        whole = copy.copy(header)
        for name in _MAY_BE_EMPTY:
            if name not in whole:
                setattr(whole, name, None if name.endswith(("Date", "Time")) else "")
        if whole.get("SliceThickness") in (None, ""):
            whole.SliceThickness = round(spacing, 6)
        found.append(whole)
    return found
