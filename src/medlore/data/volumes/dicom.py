"""DICOM in (one series of single-frame images, in a folder or zip) and DICOM-SEG out. Needs the extra `dicom`."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.geometry import Array, check_affine
from medlore.data.volumes.nifti import Volume, header_for
from medlore.errors import DataError, InputError
from medlore.extras import require
from medlore.files import atomic_path

_MODALITIES = {"CT": "ct", "MR": "mri", "PT": "pet", "US": "us"}
_UNEVEN = 0.05  # slices may miss an even spacing by this share of it
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_dicom(path: str | Path, *, series: str | None = None) -> Volume:
    """Read one DICOM series.

    Args:
        path: a folder (searched through and through), a zip, or one file of a folder.
        series: SeriesInstanceUID, or its end, where there are several.

    Raises:
        MissingExtraError: pydicom is not installed.
        DataError: no image, several series, missing or doubled slices, uneven spacing, multi-frame, colour.
    """
    path = Path(path)
    chosen = _choose_series(_datasets(path), series, path)
    slices = _sorted_slices(chosen, path)
    affine, notes = _affine_of(slices, path)
    check_affine(affine, str(path))
    array = np.stack([_slice_values(s, path) for s in slices], axis=-1)  # x y z
    notes += _tilt_note(slices)
    shape = (array.shape[0], array.shape[1], array.shape[2])
    modality = _MODALITIES.get(str(slices[0].Modality))
    return Volume(array, affine, header_for(affine, shape), shape, path, tuple(notes), modality, tuple(slices))


def dicom_modality(path: str | Path) -> str | None:
    """`ct`, `mri`, `pet` or `us`, from the first DICOM image below a path; None where there is none."""
    first = next(_datasets(Path(path), pixels=False), None)
    return None if first is None else _MODALITIES.get(str(first.get("Modality", "")))


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
    """
    path = Path(path)
    left = list(masks)
    if not volume.slices or not left:
        came = "an image that is not DICOM" if not volume.slices else "no label with a voxel"
        raise InputError("--dicom-seg", came, "a DICOM series and at least one mask that is not empty", "leave --dicom-seg out")
    number = 1
    while left:
        chosen, pixels, left = _layer(left, masks, volume.shape)
        _write_layer(path if number == 1 else path.with_stem(f"{path.stem}_{number}"), volume, chosen, pixels, 899 + number)
        number += 1
    return path


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


def _write_layer(path: Path, volume: Volume, labels: Sequence[str], pixels: Array, series_number: int) -> None:
    highdicom = require("highdicom", "--dicom-seg")
    from highdicom.sr.coding import CodedConcept

    from medlore import __version__

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="MedLoRE", version=__version__, family=CodedConcept("123109", "DCM", "Artificial Intelligence")
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label[:64],
            segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical structure"),
            segmented_property_type=CodedConcept(f"label-{number}", "99MEDLORE", label[:64]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label in enumerate(labels, start=1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=list(volume.slices),
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
    )
    with atomic_path(path) as temporary:
        segmentation.save_as(temporary)


def _datasets(path: Path, *, pixels: bool = True) -> Iterator[Any]:
    """DICOM images below a path; other files are passed over."""
    pydicom = require("pydicom", f"reading DICOM from {path}")
    from pydicom.errors import InvalidDicomError

    for source in _sources(path):
        try:
            dataset = pydicom.dcmread(source, stop_before_pixels=not pixels)
        except (InvalidDicomError, EOFError, OSError, ValueError):
            continue
        if "Rows" in dataset and "SeriesInstanceUID" in dataset:
            yield dataset


def _sources(path: Path) -> Iterator[Any]:
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith("/"):
                    yield io.BytesIO(archive.read(name))  # read in memory: nothing is unpacked to the disk
        return
    folder = path if path.is_dir() else path.parent
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "DICOMDIR")


def _choose_series(datasets: Iterator[Any], series: str | None, path: Path) -> list[Any]:
    found: dict[str, list[Any]] = defaultdict(list)
    for dataset in datasets:
        found[str(dataset.SeriesInstanceUID)].append(dataset)
    if not found:
        raise DataError(str(path), "no DICOM image in it", "a folder or zip with one DICOM series", "check the path")
    if series is not None:
        found = {uid: items for uid, items in found.items() if uid == series or uid.endswith(series)}
    if len(found) == 1:
        return next(iter(found.values()))
    faults = [f"{uid}: {len(v)} x {v[0].get('Modality', '?')} {v[0].get('SeriesDescription', '')}".strip() for uid, v in found.items()]
    came = f"{len(found)} series" if found else f"no series {series!r}"
    raise DataError(str(path), came, "one series", 'name it with "series": "UID" in the case, or give its own folder', faults=faults)


def _sorted_slices(datasets: Sequence[Any], path: Path) -> list[Any]:
    """Slices along their normal; everything that would make a wrong volume is refused."""
    first = datasets[0]
    if int(first.get("NumberOfFrames", 1)) > 1:
        raise DataError(str(path), "an enhanced multi-frame image", "single-frame images", "convert it with dcm2niix")
    if int(first.get("SamplesPerPixel", 1)) != 1:
        raise DataError(str(path), "a colour image", "one grey value a pixel", "choose another series")
    without = [d for d in datasets if "ImagePositionPatient" not in d or "ImageOrientationPatient" not in d or "PixelSpacing" not in d]
    if without:
        raise DataError(
            str(path), f"{len(without)} images without position or spacing", "images with a place in space", "choose another series"
        )
    kinds = {(d.Rows, d.Columns, tuple(np.round([*d.ImageOrientationPatient, *d.PixelSpacing], 3))) for d in datasets}
    if len(kinds) > 1:
        raise DataError(str(path), f"images of {len(kinds)} sizes or directions (a localizer?)", "one stack of slices", "split the series")
    places = np.array([d.ImagePositionPatient for d in datasets], float) @ _normal(first)
    order = np.argsort(places, kind="stable")
    gaps = np.diff(places[order])
    if len(gaps):
        usual = float(np.median(gaps))
        if usual <= 0 or (gaps < usual * 0.5).any():
            raise DataError(str(path), "several images at one place", "one image for every slice", "split the series (phases, echoes)")
        if (np.abs(gaps - usual) > max(_UNEVEN * usual, 0.01)).any():
            worst = int(np.argmax(np.abs(gaps - usual)))
            came = f"slices {worst + 1} and {worst + 2} lie {gaps[worst]:.2f} mm apart, the others {usual:.2f} mm"
            raise DataError(str(path), came, "evenly spaced slices without a gap", "export the missing slices")
    return [datasets[int(i)] for i in order]


def _affine_of(slices: Sequence[Any], path: Path) -> tuple[Array, list[str]]:
    """Index (column, row, slice) -> RAS+ mm. The third column follows the positions, so a tilted gantry is kept."""
    first, last = slices[0], slices[-1]
    along_columns, along_rows = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = (float(v) for v in first.PixelSpacing)
    notes = []
    if len(slices) > 1:
        step = (np.array(last.ImagePositionPatient, float) - np.array(first.ImagePositionPatient, float)) / (len(slices) - 1)
    else:
        thickness = float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 0)
        if thickness <= 0:
            raise DataError(str(path), "one slice without a thickness", "a slice thickness", "mend the header")
        step, notes = _normal(first) * thickness, ["one slice; its thickness was taken for the spacing"]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = along_columns * column_mm, along_rows * row_mm, step
    affine[:3, 3] = first.ImagePositionPatient
    return _TO_RAS @ affine, notes


def _tilt_note(slices: Sequence[Any]) -> list[str]:
    tilt = float(slices[0].get("GantryDetectorTilt") or 0)
    return [f"the header gives a gantry tilt of {tilt:g} degrees"] if abs(tilt) > 0.1 else []


def _slice_values(dataset: Any, path: Path) -> Array:
    """Values of a slice (column, row); int16 where slope and intercept leave whole numbers."""
    try:
        raw = dataset.pixel_array
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        fix = "convert it with dcm2niix, or install pylibjpeg for compressed images"
        raise DataError(str(path), f"pixels that cannot be decoded ({error})", "images that pydicom decodes", fix) from error
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    whole = slope.is_integer() and intercept.is_integer()
    values = raw.astype(np.int32) * int(slope) + int(intercept) if whole else raw.astype(np.float32) * slope + intercept
    padding = dataset.get("PixelPaddingValue")
    if padding is not None and str(dataset.Modality) == "CT":
        values = np.where(raw == padding, np.minimum(values, -1024), values)  # outside the scanner's circle is air
    if whole and values.min() >= -32768 and values.max() <= 32767:
        return np.asarray(values.astype(np.int16).T)
    return np.asarray(values.astype(np.float32).T)


def _normal(dataset: Any) -> Array:
    along_columns, along_rows = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    return np.cross(along_columns, along_rows)
