"""One DICOM series: whose it is, where its slices lie, and what their numbers mean.

A series is one patient, one study, one frame of reference. Its slices are one straight, evenly spaced stack: every corner of
every slice lies where one affine puts it, up to what rounded headers leave, else the distance is reported in mm and nothing is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.images.trees import ArchiveMember
from medlore.data.volumes.dicom_files import DicomFile
from medlore.data.volumes.geometry import Array
from medlore.errors import DataError

_ONE_OF = ("PatientID", "PatientName", "PatientBirthDate", "StudyInstanceUID", "FrameOfReferenceUID")
_MOST_MM, _MOST_SHARE = 0.1, 0.25  # a corner may lie this far off (the smaller of mm and share of the shortest voxel edge)
_UNEVEN = 0.05  # along the stack a slice may be off by this share of the spacing
_ROUNDED_MM = 0.11  # two neighbours whose positions were rounded to 0.1 mm
_NOTED_MM = 0.01
_UNIT = 0.01  # directions may differ from unit length and a right angle by this
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def choose_series(files: Sequence[DicomFile], series: str | None, path: Path) -> list[DicomFile]:
    """The files of the one series, or of the one that is named by its UID or the end of it.

    Raises:
        DataError: no image, or several series.
    """
    found: dict[str, list[DicomFile]] = defaultdict(list)
    for file in files:
        found[file.text("SeriesInstanceUID")].append(file)
    if not found:
        raise DataError(str(path), "no DICOM image in it", "a folder or zip with one DICOM series", "check the path")
    if series is not None:
        found = {uid: items for uid, items in found.items() if uid == series or uid.endswith(series)}
    if len(found) != 1:
        faults = [
            f"{uid or 'no UID'}: {len(v)} x {v[0].text('Modality') or '?'} {v[0].text('SeriesDescription')}" for uid, v in found.items()
        ]
        came = f"{len(found)} series" if found else f"no series {series!r}"
        fix = 'name it with "series": "UID" in the case, or give its own folder'
        raise DataError(str(path), came, "one series", fix, faults=[fault.strip() for fault in faults])
    return next(iter(found.values()))


def check_one_owner(files: Sequence[DicomFile], path: Path) -> None:
    """A series that was put together of two patients or studies has one UID and two owners.

    Raises:
        DataError: several patients, studies or frames of reference.
    """
    faults = []
    for name in _ONE_OF:
        count: dict[str, int] = defaultdict(int)
        for file in files:
            count[" ".join(file.text(name).replace("^", " ").casefold().split())] += 1
        count.pop("", None)  # what an anonymiser took away contradicts nothing
        if len(count) > 1:
            faults.append(f"{name}: {len(count)} different ones, in {', '.join(map(str, count.values()))} images")
    if faults:
        accepted = "a series of one patient, study and frame of reference"
        raise DataError(str(path), "images that do not belong together", accepted, "export the series again", faults=faults)


def check_kind(files: Sequence[DicomFile], path: Path) -> None:
    """Refuse what is no stack of grey images with a position in space.

    Raises:
        DataError: colour, or images without position, direction or spacing.
    """
    if any(file.number("SamplesPerPixel", 1) != 1 or file.text("PhotometricInterpretation").startswith("PALETTE") for file in files):
        raise DataError(str(path), "a colour image", "one grey value per pixel", "choose another series")
    needed = (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2), ("Rows", 1), ("Columns", 1))
    without = [file for file in files if any(file.numbers(name, count) is None for name, count in needed)]
    if without:
        came = f"{len(without)} images without position or spacing"
        raise DataError(str(path), came, "images with a position in space", "choose another series")


def stack(files: Sequence[DicomFile], path: Path) -> tuple[list[DicomFile], Array, list[str]]:
    """The slices in order along their normal, index (column, row, slice) -> RAS+ mm, and what was odd.

    The third column of the affine follows the positions, so a tilted gantry is kept.

    Raises:
        DataError: several sizes or directions, doubled or missing slices, or slices that are no straight stack.
    """
    sizes = {(file.number("Rows", 0), file.number("Columns", 0)) for file in files}
    directions = np.array([file.numbers("ImageOrientationPatient", 6) for file in files]).reshape(-1, 2, 3)
    _check_directions(directions, path)
    if len(sizes) > 1 or np.abs(directions - directions[0]).max() > 0.05:
        kinds = {(*size, *np.round(d, 1).ravel()) for size in sizes for d in directions}
        came = f"images of {len(kinds)} sizes or directions (a localizer?)"
        raise DataError(str(path), came, "one stack of slices", "split the series")
    spacing = np.array([file.numbers("PixelSpacing", 2) for file in files])  # between rows, between columns
    positions = np.array([file.numbers("ImagePositionPatient", 3) for file in files])
    normal = np.cross(directions[0, 0], directions[0, 1])
    order = np.argsort(positions @ normal, kind="stable")
    files = [files[int(i)] for i in order]
    directions, spacing, positions = directions[order], spacing[order], positions[order]
    _check_gaps(positions @ normal, path)
    affine, notes = _affine_of(files[0], directions, spacing, positions, path)
    rows, columns = (int(v) for v in next(iter(sizes)))
    notes += _check_straight(affine, directions, spacing, positions, (columns, rows), path)
    return files, _TO_RAS @ affine, notes


def _check_directions(directions: Array, path: Path) -> None:
    lengths = np.linalg.norm(directions, axis=2)
    cosines = np.abs((directions[:, 0] * directions[:, 1]).sum(axis=1))
    if np.abs(lengths - 1).max() > _UNIT or cosines.max() > _UNIT:
        came = f"an ImageOrientationPatient of lengths {lengths.min():.3g} to {lengths.max():.3g}, cosine up to {cosines.max():.3g}"
        raise DataError(str(path), came, "two unit vectors at a right angle", "export the series again; it cannot be guessed")


def _check_gaps(places: Array, path: Path) -> None:
    gaps = np.diff(places)
    if not len(gaps):
        return
    usual = float(np.median(gaps))
    if usual <= 0 or (gaps < usual * 0.5).any():
        raise DataError(str(path), "several images at one place", "one image for every slice", "split the series (phases, echoes)")
    off = np.abs(gaps - usual)
    if (off > max(_UNEVEN * usual, min(_ROUNDED_MM, usual * 0.5))).any():
        worst = int(np.argmax(off))
        came = f"slices {worst + 1} and {worst + 2} lie {gaps[worst]:.2f} mm apart, the others {usual:.2f} mm"
        raise DataError(str(path), came, "evenly spaced slices without a gap", "export the missing slices")


def _affine_of(first: DicomFile, directions: Array, spacing: Array, positions: Array, path: Path) -> tuple[Array, list[str]]:
    """Index -> mm in DICOM's own frame; where headers differ by rounding, their mean and the line of least squares."""
    notes: list[str] = []
    direction, (row_mm, column_mm), origin = directions[0], spacing[0], positions[0]
    if len(positions) > 1:
        step = (positions[-1] - positions[0]) / (len(positions) - 1)
        index = np.arange(len(positions), dtype=float)
        if np.abs(positions - origin - index[:, None] * step).max() > 1e-4:
            centred = index - index.mean()
            step = centred @ positions / (centred @ centred)
            origin = positions.mean(axis=0) - index.mean() * step
        if not (directions == direction).all() or not (spacing == spacing[0]).all():
            direction, (row_mm, column_mm) = directions.mean(axis=0), spacing.mean(axis=0)
    else:
        thickness = first.number("SpacingBetweenSlices", 0) or first.number("SliceThickness", 0)
        if thickness <= 0:
            raise DataError(str(path), "one slice without a thickness", "a slice thickness", "correct the header")
        step, notes = np.cross(*direction) * thickness, ["one slice; its thickness was taken for the spacing"]
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = direction[0] * column_mm, direction[1] * row_mm, step, origin
    return affine, notes


def _check_straight(affine: Array, directions: Array, spacing: Array, positions: Array, size: tuple[int, int], path: Path) -> list[str]:
    """Refuse slices whose own corners lie elsewhere than the affine puts them."""
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    allowed = min(_MOST_MM, _MOST_SHARE * float(edges.min()))
    normal = np.cross(*directions[0])
    index = np.arange(len(positions), dtype=float)
    worst, at = 0.0, 0
    for i in (0, size[0] - 1):
        for j in (0, size[1] - 1):
            own = positions + directions[:, 0] * (spacing[:, 1:] * i) + directions[:, 1] * (spacing[:, :1] * j)
            off = own - (affine[:3, 3] + np.outer(index, affine[:3, 2]) + affine[:3, 0] * i + affine[:3, 1] * j)
            along = off @ normal
            in_plane = np.linalg.norm(off - np.outer(along, normal), axis=1)
            far = np.maximum(in_plane, np.maximum(np.abs(along) - max(_UNEVEN * edges[2] - allowed, 0), 0))
            if far.max() > worst:
                worst, at = float(far.max()), int(np.argmax(far))
    if worst > allowed:
        came = f"slices that are no straight stack: a corner of slice {at + 1} lies {worst:.2f} mm from where even slices would put it"
        shifted = np.linalg.norm(np.diff(positions, axis=0) - affine[:3, 2], axis=1) if len(positions) > 1 else np.zeros(1)
        if shifted.max() > allowed:
            came += f", slice {int(np.argmax(shifted)) + 2} is shifted by {shifted.max():.2f} mm against its neighbour"
        accepted = f"slices one above the other, up to {allowed:.2g} mm"
        raise DataError(str(path), came, accepted, "export it again, or resample it to a straight grid, e.g. with dcm2niix or Slicer")
    rounded = f"headers are rounded: corners of slices lie up to {worst:.3f} mm from an even stack, which was taken"
    return [rounded] if worst > _NOTED_MM else []


def values_of(file: DicomFile, dataset: Any, source: Path | ArchiveMember) -> tuple[Array, bool]:
    """Values of a slice (column, row) after its own slope and intercept, and whether they are whole numbers.

    Raises:
        DataError: pixels that cannot be decoded, a slope of 0, or a header that contradicts the pixels.
    """
    raw = _stored(file, dataset)
    if file.frame is None and dataset.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(raw, dataset)).T, True
    slope, intercept = file.number("RescaleSlope", 1), file.number("RescaleIntercept", 0)
    if slope == 0:
        raise DataError(str(source), "a RescaleSlope of 0", "a slope", "export the series again")
    whole = slope.is_integer() and intercept.is_integer() and raw.dtype.kind in "iu"
    if whole:
        values: Array = raw.astype(np.int64) * int(slope) + int(intercept)
    else:
        wide: Array = raw.astype(np.float32 if raw.dtype.itemsize <= 2 else np.float64)
        values = wide * slope + intercept
    if file.text("Modality") == "CT" and (outside := _padding(file, raw)) is not None:
        values = np.where(outside, np.minimum(values, -1024), values)  # outside the scanner's circle is air
    return values.T, whole


def _stored(file: DicomFile, dataset: Any) -> Array:
    """The stored numbers (row, column): bits beyond `BitsStored`, which may hold an overlay, do not count."""
    try:
        raw = np.asarray(dataset.pixel_array if file.frame is None else _frame(dataset, file.frame))
    except Exception as error:  # of decoders, which share no parent
        fix = "convert it with dcm2niix, or install pylibjpeg for compressed images"
        reason = f"{type(error).__name__}: {error}"
        raise DataError(str(file.source), f"pixels that cannot be decoded ({reason})", "images that pydicom decodes", fix) from error
    shape = (int(file.number("Rows", 0)), int(file.number("Columns", 0)))
    if raw.shape != shape:
        raise DataError(str(file.source), f"pixels of shape {raw.shape}", f"{shape}, as the header says", "export the series again")
    bits, stored = int(file.number("BitsAllocated", 16)), int(file.number("BitsStored", 0))
    if raw.dtype.kind not in "iu" or not 0 < stored < bits:
        return raw
    if int(file.number("HighBit", stored - 1)) != stored - 1:
        raise DataError(str(file.source), "a HighBit that is not BitsStored - 1", "pixels in the lowest bits", "export it again")
    shift = raw.dtype.itemsize * 8 - stored
    return np.asarray(np.right_shift(np.left_shift(raw, shift), shift))  # of signed numbers the sign is carried down


def _frame(dataset: Any, index: int) -> Array:
    from pydicom.pixels import pixel_array

    return np.asarray(pixel_array(dataset, index=index))


def _padding(file: DicomFile, raw: Array) -> Array | None:
    """Which pixels are padding; the value may be written signed or unsigned, whatever the pixels are."""
    low = file.numbers("PixelPaddingValue", 1)
    if low is None or raw.dtype.kind not in "iu":
        return None
    high = file.numbers("PixelPaddingRangeLimit", 1) or low
    bits = raw.dtype.itemsize * 8
    ends = sorted(_wrapped(int(end[0]), bits, signed=raw.dtype.kind == "i") for end in (low, high))
    return np.asarray((raw >= ends[0]) & (raw <= ends[1]))


def _wrapped(value: int, bits: int, *, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value
