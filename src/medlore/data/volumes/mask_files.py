"""A file of masks as it is: layers of values on one grid, and the names of the values where the file has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.volumes.dicom_files import DicomFile, find_files, read_header
from medlore.data.volumes.geometry import Array, Shape, check_affine
from medlore.data.volumes.label_tables import read_label_table
from medlore.data.volumes.nifti import Volume, read_nifti, read_stack
from medlore.data.volumes.nifti import read_header as read_nifti_header
from medlore.data.volumes.nrrd import NrrdHeader, affine_of, directions_of, grid_of, read_voxels, sizes_of
from medlore.data.volumes.nrrd import read_header as read_nrrd_header
from medlore.data.volumes.voxel_bytes import check_memory
from medlore.errors import DataError

_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SEGMENT = re.compile(r"Segment(\d+)_(Name|LabelValue|Layer)")
_ON_PLANE = 0.02  # of a spacing


@dataclass(frozen=True, eq=False)
class MaskFile:
    """What a file of masks holds.

    Args:
        path: the file.
        layers: x y z arrays of values on one grid; several where masks overlap.
        affine: voxel index -> RAS+ mm; None where the file has no position in space.
        names: label -> where it is: layer and value; None where the file names nothing.
        part: the grid may be a part of the image's: empty slices or borders were left out.
        series: UIDs of the DICOM series that the masks were drawn on.
    """

    path: Path
    layers: tuple[Array, ...]
    affine: Array | None
    names: Mapping[str, tuple[tuple[int, int], ...]] | None = None
    part: bool = False
    series: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """Voxels along x, y and z."""
        x, y, z = self.layers[0].shape
        return x, y, z

    @staticmethod
    def of(volume: Volume) -> MaskFile:
        """A label map without names."""
        return MaskFile(volume.path, (volume.array,), volume.affine)


def nifti_masks(path: Path) -> MaskFile:
    """A NIfTI label map with the names of its table, or a stack of one volume a label (x y z q)."""
    shape = tuple(int(n) for n in read_nifti_header(path).get_data_shape())
    if len(shape) == 4 and shape[3] > 1:
        stack, affine = read_stack(path)
        return MaskFile(path, tuple(stack[..., q] for q in range(stack.shape[3])), affine)
    volume = read_nifti(path)
    table = read_label_table(path)
    names = None if table is None else _by_name({value: (0, value, name) for value, name in table.items()}, path)
    return MaskFile(path, (volume.array,), volume.affine, names)


def npy_masks(path: Path) -> MaskFile:
    """One mask (x y z), or a stack (q x y z); never anything pickled."""
    try:
        array = np.asarray(np.load(path, allow_pickle=False, mmap_mode="r"))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(str(path), f"not an array ({error})", "a .npy file of numbers", "write it again with numpy.save") from error
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf" or not array.size:
        came = f"an array of {array.dtype} and shape {array.shape}"
        raise DataError(str(path), came, "numbers in x y z, or one mask per label in q x y z", "write it again with numpy.save")
    return MaskFile(path, tuple(array) if array.ndim == 4 else (array,), None)


def nrrd_masks(path: Path) -> MaskFile:
    """A NRRD label map, or the segmentation of Slicer (.seg.nrrd): named segments, in layers where they overlap."""
    header = read_nrrd_header(path)
    sizes, vectors = sizes_of(header), directions_of(header)
    if len(sizes) == 4 and len(vectors) == 4 and vectors[0] is None:  # layers come first and vary fastest
        affine, _ = affine_of(header, [v for v in vectors[1:] if v is not None])
        layers = tuple(read_voxels(header, tuple(sizes)))
    else:
        shape, affine, _ = grid_of(header)
        layers = (read_voxels(header, shape),)
    return MaskFile(path, layers, affine, _segments_of(header, len(layers)), part=bool(header.keys))


def _segments_of(header: NrrdHeader, layers: int) -> dict[str, tuple[tuple[int, int], ...]] | None:
    found: dict[int, dict[str, str]] = {}
    for key, value in header.keys.items():
        if match := _SEGMENT.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    entries: dict[int, tuple[int, int, str]] = {}
    for number, fields in found.items():
        name, value, layer = fields.get("Name", ""), fields.get("LabelValue", ""), fields.get("Layer", "0")
        if not name or not value.isdecimal() or not layer.isdecimal() or int(layer) >= layers:
            came = f"segment {number} without a name, a value, or a layer that is there ({fields})"
            raise header.refuse(came, "Segment0_Name, Segment0_LabelValue, Segment0_Layer", "save it again with Slicer")
        entries[number] = (int(layer), int(value), name)
    return _by_name(entries, header.path) if entries else None


def _by_name(entries: Mapping[Any, tuple[int, int, str]], path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """Label -> its places; one place has one name."""
    places: dict[tuple[int, int], str] = {}
    names: dict[str, tuple[tuple[int, int], ...]] = {}
    for layer, value, name in entries.values():
        if places.setdefault((layer, value), name) != name:
            came = f"two names for value {value}: {places[layer, value]!r} and {name!r}"
            raise DataError(str(path), came, "one name per value", "correct the table of labels")
        names[name] = (*names.get(name, ()), (layer, value))
    return names


# -- DICOM-SEG ---------------------------------------------------------------------------------------------------------


def dicom_masks(path: Path) -> MaskFile:
    """One DICOM-SEG object with binary segments, in a file, or alone in a folder or zip.

    Slices without a voxel are often left out; the grid is that of the frames that are there.
    """
    files = find_files(path, modality="SEG")
    if len(files) != 1:
        came = f"{len(files)} DICOM-SEG objects"
        raise DataError(str(path), came, "one segmentation", "name its file; an image series is no mask")
    file = files[0]
    dataset: Any = read_header(file.source, pixels=True)
    if str(dataset.get("SegmentationType")) not in ("BINARY", "LABELMAP"):
        came = f"a segmentation of type {dataset.get('SegmentationType')}"
        raise DataError(str(path), came, "binary segments, or a label map", "export it as binary segments")
    frames = list(dataset.PerFrameFunctionalGroupsSequence)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    check_memory(len(frames) * rows * columns * 2, f"{len(frames)} frames of {rows} x {columns}", path)
    places, affine = _frame_places(frames, shared, path)
    pixels = np.asarray(dataset.pixel_array).reshape(len(frames), rows, columns)
    segments = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
    shape = (columns, rows, int(places.max()) + 1)
    if str(dataset.SegmentationType) == "LABELMAP":
        layers = [_layer_of(pixels, places, range(len(frames)), shape)]
        entries = {number: (0, number, label) for number, label in segments.items() if number > 0}
    else:
        numbers = [_number_of(frame, shared, file) for frame in frames]
        layers = [_layer_of(pixels, places, [k for k, n in enumerate(numbers) if n == number], shape) for number in segments]
        entries = {number: (index, 1, label) for index, (number, label) in enumerate(segments.items())}
    drawn_on = tuple(str(item.SeriesInstanceUID) for item in dataset.get("ReferencedSeriesSequence") or ())
    return MaskFile(path, tuple(layers), affine, _by_name(entries, path), part=True, series=drawn_on)


def _number_of(frame: Any, shared: Any, file: DicomFile) -> int:
    try:
        group = frame.get("SegmentIdentificationSequence") or shared.get("SegmentIdentificationSequence")
        return int(group[0].ReferencedSegmentNumber)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            str(file.source), "a frame without the number of its segment", "SegmentIdentification", "export it again"
        ) from error


def _layer_of(pixels: Array, places: Array, chosen: Any, shape: Shape) -> Array:
    layer = np.zeros(shape, pixels.dtype)
    for k in chosen:
        np.maximum(layer[:, :, places[k]], pixels[k].T, out=layer[:, :, places[k]])
    return layer


def _frame_places(frames: list[Any], shared: Any, path: Path) -> tuple[Array, Array]:
    """Slice of every frame, and index -> RAS+ mm."""

    def group(name: str, frame: Any) -> Any:
        found = frame.get(name) or shared.get(name)
        if not found:
            raise DataError(str(path), f"frames without {name}", "frames with a position in space", "export it again")
        return found[0]

    directions = np.array([[float(v) for v in group("PlaneOrientationSequence", f).ImageOrientationPatient] for f in frames])
    positions = np.array([[float(v) for v in group("PlanePositionSequence", f).ImagePositionPatient] for f in frames])
    measures = group("PixelMeasuresSequence", frames[0])
    if np.abs(directions - directions[0]).max() > 1e-4:
        raise DataError(str(path), "frames of several directions", "one stack of frames", "export it again")
    across, down = directions[0].reshape(2, 3)
    along = positions @ np.cross(across, down)
    spacing = float(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 0)
    gaps = np.diff(np.unique(np.round(along, 4)))
    spacing = float(gaps.min()) if len(gaps) and (spacing <= 0 or gaps.min() < spacing * 0.9) else spacing
    if spacing <= 0:
        raise DataError(str(path), "frames without a distance between slices", "SpacingBetweenSlices", "export it again")
    first = int(np.argmin(along))
    places = (along - along[first]) / spacing
    if np.abs(places - np.rint(places)).max() > max(_ON_PLANE, 0.05 / spacing):
        raise DataError(str(path), "frames that lie on no even stack of slices", "evenly spaced slices", "export it again")
    places = np.rint(places).astype(int)
    last = int(np.argmax(places))
    step = (positions[last] - positions[first]) / places[last] if places[last] else np.cross(across, down) * spacing
    row_mm, column_mm = (float(v) for v in measures.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = across * column_mm, down * row_mm, step, positions[first]
    affine = _TO_RAS @ affine
    check_affine(affine, str(path))
    return places, affine
