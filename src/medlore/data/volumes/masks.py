"""Reference masks of a case as one label map: codes on the image's grid, and which codes belong to each label.

Layouts that are read: a label map with values (`mask_values` or `label_values` of the case, else the file's own table, else
`labels.json` beside it, and only then the order of `label`); named segments of Slicer (.seg.nrrd) and DICOM-SEG; a folder with
one file per label; `mask` as a mapping label -> file; and the stack of SAT-DS, one volume a label in the order of `label`. A
label may be a union of values and labels may overlap: files that overlap become one map whose codes stand for combinations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.formats import files_of_masks, read_mask_file
from medlore.data.volumes.cases import Case
from medlore.data.volumes.geometry import Array, Shape
from medlore.data.volumes.label_tables import table_beside
from medlore.data.volumes.mask_codes import LARGEST_CODE, combined_codes, narrow
from medlore.data.volumes.mask_files import MaskFile
from medlore.data.volumes.nifti import Volume
from medlore.errors import DataError, MedloreError, nearest_names
from medlore.files import read_json, refuse_device

_SAME_MM = 1e-2
_SAME_PART_MM = 0.05  # a part of the grid whose places went through the decimals of DICOM
_GRID_FIX = "give the mask of this very image, or resample it to the image's grid (nearest neighbour)"


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Labels of one image.

    Args:
        codes: x y z, uint8 or uint16, on the image's grid; 0 is background.
        members: label -> the codes that belong to it, ascending; two labels may share codes.
        notes: what was odd: where values came from if nothing names them, values of no label, labels without a voxel.
    """

    codes: Array
    members: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def mask(self, label: str) -> Array:
        """The label as a Boolean volume."""
        return np.asarray(code_table(self.members, (label,), int(self.codes.max(initial=0)) + 1)[0][self.codes])


def code_table(members: Mapping[str, tuple[int, ...]], labels: Sequence[str], codes: int) -> Array:
    """For each label and each code below `codes`: whether the code belongs to the label (q x codes, Boolean).

    Examples:
        >>> code_table({"head": (1, 2), "eye": (2,)}, ["eye", "head"], 3).astype(int).tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    table = np.zeros((len(labels), codes), np.bool_)
    for row, label in zip(table, labels, strict=True):
        row[[code for code in members[label] if code < codes]] = True
    return table


def read_masks(case: Case, volume: Volume) -> LabelMap:
    """The masks of a case.

    Args:
        case: with `mask` (file or folder), or with a mapping label -> file under `mask`.
        volume: the image; the masks must lie on its grid.

    Raises:
        DataError: no mask, a label without value or file, values that are not whole numbers, or another grid than the image's;
            the faults of all labels are reported at once.
    """
    files = case.other.get("mask")
    if case.mask is None and not isinstance(files, Mapping):
        fix = 'add "mask": "FILE" (a label map), a folder with one file per label, or {"label": "FILE", ...}'
        raise DataError(_where(case), "a case without a mask", "reference masks", fix)
    if isinstance(files, Mapping):
        found = _separate(case, volume, {label: Path(file) for label, file in files.items()})
    else:
        path = Path(case.mask)  # type: ignore[arg-type]
        refuse_device(path)
        if not path.exists():
            raise DataError(_where(case), f"the mask {path} does not exist", "an existing file or folder", "check the key `mask`")
        parts = files_of_masks(path) if path.is_dir() else {}
        alone = path.is_file() or (len(parts) <= 1 and not any(_spelling(label) in map(_spelling, parts) for label in case.labels))
        found = (
            _of_file(case, volume, read_mask_file(next(iter(parts.values()), path), on=volume)) if alone else _separate(case, volume, parts)
        )
    empty = [label for label in case.labels if not _has_voxels(found, label)]
    if empty:
        note = f"labels without a voxel in the reference: {', '.join(empty)}; they count as absent from this image"
        found = replace(found, notes=(*found.notes, note))
    return found


def read_segments(path: Path, volume: Volume) -> LabelMap:
    """All segments that a file names, on the image's grid.

    Raises:
        DataError: a file without names, or one of another grid or series than the image's.
    """
    found = _on_grid(read_mask_file(path, on=volume), volume)
    if found.names is None:
        raise DataError(str(path), "masks without names", "named segments", "name a .seg.nrrd, DICOM-SEG or RTSTRUCT file")
    return combine(((name, _segment(found, places)) for name, places in found.names.items()), volume.shape)


def _has_voxels(found: LabelMap, label: str) -> bool:
    there = np.unique(found.codes)
    return bool(np.isin(there, list(found.members[label])).any())


def combine(masks: Iterable[tuple[str, Array]], shape: Shape) -> LabelMap:
    """Boolean masks, which may overlap, as one map: every combination of labels that occurs has a code of its own.

    Args:
        masks: label and its mask (x y z), one at a time; a generator keeps only one of them in memory.
        shape: of the masks.

    Raises:
        DataError: more than 65,535 combinations.

    Examples:
        >>> found = combine([("a", np.array([[[1, 1, 0]]])), ("b", np.array([[[0, 1, 0]]]))], (1, 1, 3))
        >>> found.codes.tolist(), dict(found.members)
        ([[[1, 2, 0]]], {'a': (1, 2), 'b': (2,)})
    """
    codes, members = combined_codes(masks, shape)
    return LabelMap(codes, members)


def check_mask_grid(shape: Sequence[int], affine: Array, volume: Volume, where: str, *, what: str = "a mask") -> None:
    """Compare a mask's grid with the image's (or, the other way round, an image's with that of its mask).

    Raises:
        DataError: another shape, or an affine that differs by more than a hundredth of a millimetre.
    """
    size = tuple(int(n) for n in shape)
    if size != volume.shape:
        came, accepted = f"{what} of {_by(size)} voxels", f"the grid of {volume.path}: {_by(volume.shape)}"
        raise DataError(where, came, accepted, _GRID_FIX)
    apart = float(np.abs(np.asarray(affine) - volume.affine).max())
    if apart > _SAME_MM:
        came = f"{what} of the same shape whose affine differs by up to {apart:.3g} mm: {_numbers(affine)}"
        raise DataError(where, came, f"the affine of {volume.path}: {_numbers(volume.affine)}", _GRID_FIX)


# -- one file ----------------------------------------------------------------------------------------------------------


def _of_file(case: Case, volume: Volume, found: MaskFile) -> LabelMap:
    """A label map, named segments, or a stack."""
    found = _on_grid(found, volume)
    if len(found.layers) > 1 and found.names is None:
        return _stack(case, volume, found)
    if len(found.layers) > 1 or found.part:
        return _segments(case, volume, found)
    codes = _whole_numbers(found.layers[0], found.path)
    values, notes = _values_of(case, found)
    claimed = {value for label in values.values() for value in label}
    free = [int(value) for value in np.unique(codes) if value and value not in claimed]
    if free:
        shown = ", ".join(map(str, free[:10])) + (", ..." if len(free) > 10 else "")
        notes.append(f"values in the mask that belong to no label of the case: {shown}")
    return LabelMap(codes, values, tuple(notes))


def _on_grid(found: MaskFile, volume: Volume) -> MaskFile:
    """The masks on the image's grid; a part of it is put in its place."""
    if found.series and volume.slices:
        own = str(volume.slices[0].get("SeriesInstanceUID"))
        if own not in found.series:
            came = f"a segmentation of series {found.series[0]}"
            raise DataError(str(found.path), came, f"one of this image's series, {own}", "give the segmentation of this very image")
    if found.affine is None or not found.part:
        check_mask_grid(found.shape, volume.affine if found.affine is None else found.affine, volume, str(found.path))
        return found
    start = _place_of(found.shape, found.affine, volume)
    if start is None:
        check_mask_grid(found.shape, found.affine, volume, str(found.path))
        return found
    box = tuple(slice(a, a + n) for a, n in zip(start, found.shape, strict=True))
    layers = []
    for layer in found.layers:
        whole: Array = np.zeros(volume.shape, layer.dtype)
        whole[box] = layer
        layers.append(whole)
    return replace(found, layers=tuple(layers), affine=volume.affine)


def _place_of(shape: Shape, affine: Array, volume: Volume) -> Shape | None:
    """The first voxel of a part in the image's grid; None where it is no part of that grid."""
    within = np.linalg.inv(volume.affine) @ np.asarray(affine, float)
    start = np.rint(within[:3, 3])
    ends = np.array([shape[0] - 1, shape[1] - 1, shape[2] - 1, 0.0])
    drift = np.abs((within[:3, :3] - np.eye(3)) @ ends[:3]).max() if max(shape) > 1 else 0.0
    spacing = float(np.linalg.norm(volume.affine[:3, :3], axis=0).max())
    if (drift + np.abs(within[:3, 3] - start).max()) * spacing > _SAME_PART_MM:
        return None
    if (start < 0).any() or (start + shape > volume.shape).any():
        return None
    return int(start[0]), int(start[1]), int(start[2])


def _values_of(case: Case, found: MaskFile) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Label -> codes: as the line says, else the file's names, else those beside it, else the order of the labels."""
    stated = case.other.get("mask_values", case.other.get("label_values"))
    if isinstance(stated, str):
        stated = read_json(stated)
    if stated is not None and not isinstance(stated, Mapping):
        raise DataError(_where(case), f"mask_values is a {type(stated).__name__}", '{"liver": 1, "kidney": [2, 3]}', "correct the line")
    if stated is None and found.names is not None:
        stated = {name: [value for _, value in places] for name, places in found.names.items()}
    if stated is None and (beside := table_beside(found.path)) is not None:
        stated = {}
        for value, name in beside.items():
            stated.setdefault(name, []).append(value)
    if stated is not None:
        return _stated_values(case, stated), []
    note = "nothing names the values of the mask, so they were taken in the order of the labels"
    return {label: (index + 1,) for index, label in enumerate(case.labels)}, [note] if len(case.labels) > 1 else []


def _stated_values(case: Case, stated: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    by_spelling = {_spelling(label): value for label, value in stated.items()}
    faults: list[str] = []
    members: dict[str, tuple[int, ...]] = {}
    for label in case.labels:
        value = by_spelling.get(_spelling(label))
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        if value is None:
            faults.append(f"no value for {label!r}; the nearest are {_nearest(label, stated)}")
        elif not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= LARGEST_CODE for v in values):
            faults.append(f"the value of {label!r} is {value!r}")
        else:
            members[label] = tuple(sorted(set(values)))
    if faults:
        accepted = "a whole number from 1, or a list of them, for every label"
        raise DataError(_where(case), f"{len(faults)} label(s) without a value", accepted, 'add "mask_values": {...}', faults=faults)
    return members


def _nearest(label: str, known: Iterable[Any]) -> str:
    return ", ".join(map(repr, nearest_names(label, map(str, known)))) or "none"


def _whole_numbers(array: Array, path: Path) -> Array:
    accepted, fix = f"whole numbers from 0 to {LARGEST_CODE}", "name the label map, not the image; probabilities are thresholded first"
    if array.dtype.kind == "f" and (not np.isfinite(array).all() or not np.array_equal(array, np.rint(array))):
        raise DataError(str(path), "a mask with values that are not whole numbers", accepted, fix)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > LARGEST_CODE:
        raise DataError(str(path), f"a mask with values from {low} to {high}", accepted, fix)
    return narrow(array)


# -- named segments, and a stack ---------------------------------------------------------------------------------------


def _segments(case: Case, volume: Volume, found: MaskFile) -> LabelMap:
    """Named segments in layers; a file that names one layer's values by order alone is a label map."""
    if "mask_values" in case.other or "label_values" in case.other or found.names is None:
        if len(found.layers) > 1:
            raise DataError(_where(case), "mask_values for segments in several layers", "the names of the segments", "leave it out")
        return _of_file(case, volume, replace(found, part=False))
    names = {_spelling(name): places for name, places in found.names.items()}
    faults = [
        f"no segment for {label!r}; the nearest are {_nearest(label, found.names)}"
        for label in case.labels
        if _spelling(label) not in names
    ]
    if faults:
        accepted, fix = "a segment of the label's name", "rename the segments, or correct the list `label`"
        raise DataError(_where(case), f"{len(faults)} label(s) without a segment in {found.path}", accepted, fix, faults=faults)
    masks = ((label, _segment(found, names[_spelling(label)])) for label in case.labels)
    made = combine(masks, volume.shape)
    wanted = {_spelling(label) for label in case.labels}
    others = [name for name in found.names if _spelling(name) not in wanted]
    notes = (f"segments in the file that are no label of the case: {', '.join(others)}",) if others else ()
    return replace(made, notes=notes)


def _segment(found: MaskFile, places: Sequence[tuple[int, int]]) -> Array:
    inside: Array = np.zeros(found.layers[0].shape, np.bool_)
    for layer, value in places:
        inside |= found.layers[layer] == value
    return inside


def _stack(case: Case, volume: Volume, found: MaskFile) -> LabelMap:
    """One mask a label, in the order of the labels."""
    if len(found.layers) != len(case.labels):
        accepted = f"one mask for each of the {len(case.labels)} labels of the line, in their order"
        raise DataError(str(found.path), f"a stack of {len(found.layers)} masks", accepted, "correct the list `label`")
    pairs = zip(case.labels, found.layers, strict=True)
    return combine(((label, _binary(layer, f"{found.path}, mask of {label}")) for label, layer in pairs), volume.shape)


# -- one file per label --------------------------------------------------------------------------------------------------


def _separate(case: Case, volume: Volume, files: Mapping[str, Path]) -> LabelMap:
    by_spelling = {_spelling(name): path for name, path in files.items()}
    missing = [label for label in case.labels if _spelling(label) not in by_spelling]
    faults = [f"no file for {label!r}; the nearest are {_nearest(label, files)}" for label in missing]
    masks = []
    for label in case.labels:
        path = by_spelling.get(_spelling(label))
        if path is not None:
            try:
                masks.append((label, _one_mask(path, volume)))
            except MedloreError as error:
                faults.append(str(error))
    if faults:
        accepted = "one mask file for every label, on the image's grid"
        raise DataError(_where(case), f"{len(faults)} fault(s) in the masks", accepted, "correct what is listed", faults=faults)
    return combine(masks, volume.shape)


def _one_mask(path: Path, volume: Volume) -> Array:
    """A file's voxels above 0; a .npy file has no grid but its shape."""
    found = _on_grid(read_mask_file(path, on=volume), volume)
    if len(found.layers) > 1:
        raise DataError(str(path), f"{len(found.layers)} masks in one file", "one mask", "name a file with one mask for this label")
    return _binary(found.layers[0], str(path))


def _binary(layer: Array, where: str) -> Array:
    """What is above 0; numbers that are no number are no mask."""
    if layer.dtype.kind == "f" and not np.isfinite(layer).all():
        raise DataError(where, "a mask with values that are not finite", "0 and 1", "write the mask again")
    return np.asarray(layer > 0)


# -- words -------------------------------------------------------------------------------------------------------------


def _spelling(label: Any) -> str:
    """One form for a label and for the name of its file, in which some characters cannot stand."""
    return " ".join(re.sub(r"[^\w.,+()-]|_", " ", str(label)).split()).casefold()


def _where(case: Case) -> str:
    return f"line {case.line}: {case.image}" if case.line else str(case.image)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)


def _numbers(affine: Array) -> str:
    return str(np.round(np.asarray(affine, float)[:3], 3).tolist())
