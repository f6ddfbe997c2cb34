"""Reference masks of a case as one label map: codes on the image's grid, and which codes belong to each label.

Four layouts are read: a label map with values (`mask_values`, `label_values`, the file's own label table, or the order of
`label`); a folder with one file a label; `mask` as a mapping label -> file; and the stack of SAT-DS, one volume a label in
the order of `label`. A label may be a union of values and labels may overlap: files that overlap become one map whose
codes stand for combinations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medlore.data.volumes.cases import Case
from medlore.data.volumes.geometry import Array, Shape
from medlore.data.volumes.nifti import Volume, read_grid, read_label_table
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, MedloreError, nearest_names
from medlore.files import read_json

MASK_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".npy")
_SAME_MM = 1e-2
_LARGEST_CODE = 65535
_GRID_FIX = "give the mask of this very image, or resample it to the image's grid (nearest neighbour)"


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Labels of one image.

    Args:
        codes: x y z, uint8 or uint16, on the image's grid; 0 is background.
        members: label -> the codes that belong to it, ascending; two labels may share codes.
    """

    codes: Array
    members: Mapping[str, tuple[int, ...]]

    def mask(self, label: str) -> Array:
        """The label as a Boolean volume."""
        return np.asarray(code_table(self.members, (label,), int(self.codes.max(initial=0)) + 1)[0][self.codes])


def code_table(members: Mapping[str, tuple[int, ...]], labels: Sequence[str], codes: int) -> Array:
    """For each label and each code below `codes`: whether the code belongs to the label (q x codes, Boolean).

    Example:
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
            all labels' faults are told at once.
    """
    files = case.other.get("mask")
    if case.mask is None and not isinstance(files, Mapping):
        fix = 'add "mask": "FILE" (a label map), a folder with one file a label, or {"label": "FILE", ...}'
        raise DataError(_where(case), "a case without a mask", "reference masks", fix)
    if isinstance(files, Mapping):
        return _separate(case, volume, {label: Path(file) for label, file in files.items()})
    path = Path(case.mask)  # type: ignore[arg-type]
    if path.is_dir():
        return _separate(case, volume, _files_of(path))
    if not path.is_file():
        raise DataError(_where(case), f"the mask {path} does not exist", "an existing file or folder", "check the key `mask`")
    if _is_stack(path):
        return _stack(case, volume, path)
    return _map_with_values(case, volume, path)


def combine(masks: Iterable[tuple[str, Array]], shape: Shape) -> LabelMap:
    """Boolean masks, which may overlap, as one map: every combination of labels that occurs has a code of its own.

    Args:
        masks: label and its mask (x y z), one at a time; a generator keeps only one of them in memory.
        shape: of the masks.

    Raises:
        DataError: more than 65,535 combinations.

    Example:
        >>> found = combine([("a", np.array([[[1, 1, 0]]])), ("b", np.array([[[0, 1, 0]]]))], (1, 1, 3))
        >>> found.codes.tolist(), dict(found.members)
        ([[[1, 2, 0]]], {'a': (1, 2), 'b': (2,)})
    """
    codes = np.zeros(shape, np.uint16)
    meaning: list[frozenset[str]] = [frozenset()]
    known = {meaning[0]: 0}
    labels = []
    for label, mask in masks:
        labels.append(label)
        inside = np.asarray(mask) != 0
        before = codes[inside]
        renamed = np.arange(len(meaning), dtype=np.uint16)
        for code in np.unique(before):
            wanted = meaning[code] | {label}
            if wanted not in known:
                known[wanted] = len(meaning)
                meaning.append(wanted)
            if known[wanted] > _LARGEST_CODE:
                raise DataError("masks", f"more than {_LARGEST_CODE:,} combinations of labels", "fewer overlaps", "split the case")
            renamed[code] = known[wanted]
        codes[inside] = renamed[before]
    members = {label: tuple(code for code, combination in enumerate(meaning) if label in combination) for label in labels}
    return LabelMap(_narrow(codes), members)


def check_mask_grid(shape: Sequence[int], affine: Array, volume: Volume, where: str) -> None:
    """Compare a mask's grid with the image's.

    Raises:
        DataError: another shape, or an affine that differs by more than a hundredth of a millimetre.
    """
    told = tuple(int(n) for n in shape)
    if told != volume.shape:
        came, accepted = f"a mask of {_by(told)} voxels", f"the grid of {volume.path}: {_by(volume.shape)}"
        raise DataError(where, came, accepted, _GRID_FIX)
    apart = float(np.abs(np.asarray(affine) - volume.affine).max())
    if apart > _SAME_MM:
        came = f"a mask of the same shape whose affine differs by up to {apart:.3g} mm: {_numbers(affine)}"
        raise DataError(where, came, f"the affine of {volume.path}: {_numbers(volume.affine)}", _GRID_FIX)


# -- one map with values -----------------------------------------------------------------------------------------------


def _map_with_values(case: Case, volume: Volume, path: Path) -> LabelMap:
    found = read_volume(path)
    check_mask_grid(found.shape, found.affine, volume, str(path))
    codes = _whole_numbers(found.array, path)
    return LabelMap(codes, _values_of(case, path))


def _values_of(case: Case, path: Path) -> dict[str, tuple[int, ...]]:
    """Label -> codes, as the line, the file's table, or the order of the labels says."""
    told = case.other.get("mask_values", case.other.get("label_values"))
    if isinstance(told, str):
        told = read_json(told)
    if told is not None and not isinstance(told, Mapping):
        raise DataError(_where(case), f"mask_values is a {type(told).__name__}", '{"liver": 1, "kidney": [2, 3]}', "mend the line")
    if told is None and path.name.casefold().endswith((".nii", ".nii.gz")):
        told = {name: value for value, name in (read_label_table(path) or {}).items()} or None
    if told is None:
        told = {label: index + 1 for index, label in enumerate(case.labels)}
    by_spelling = {_spelling(label): value for label, value in told.items()}
    faults: list[str] = []
    members: dict[str, tuple[int, ...]] = {}
    for label in case.labels:
        value = by_spelling.get(_spelling(label))
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        if value is None:
            faults.append(f"no value for {label!r}; the nearest are {', '.join(map(repr, nearest_names(label, told))) or 'none'}")
        elif not values or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= _LARGEST_CODE for v in values):
            faults.append(f"the value of {label!r} is {value!r}")
        else:
            members[label] = tuple(sorted(set(values)))
    if faults:
        accepted = "a whole number from 1, or a list of them, for every label"
        raise DataError(_where(case), f"{len(faults)} label(s) without a value", accepted, 'add "mask_values": {...}', faults=faults)
    return members


def _whole_numbers(array: Array, path: Path) -> Array:
    accepted, fix = f"whole numbers from 0 to {_LARGEST_CODE}", "name the label map, not the image; probabilities are thresholded first"
    if array.dtype.kind == "f" and (not np.isfinite(array).all() or not np.array_equal(array, np.rint(array))):
        raise DataError(str(path), "a mask with values that are not whole numbers", accepted, fix)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _LARGEST_CODE:
        raise DataError(str(path), f"a mask with values from {low} to {high}", accepted, fix)
    return _narrow(array)


# -- one file a label --------------------------------------------------------------------------------------------------


def _files_of(folder: Path) -> dict[str, Path]:
    """Label (as the file is named) -> file."""
    found = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in MASK_SUFFIXES if path.name.casefold().endswith(s)), None)
        if suffix is not None:
            found[path.name[: -len(suffix)]] = path
    return found


def _separate(case: Case, volume: Volume, files: Mapping[str, Path]) -> LabelMap:
    by_spelling = {_spelling(name): path for name, path in files.items()}
    missing = [label for label in case.labels if _spelling(label) not in by_spelling]
    faults = [f"no file for {label!r}; the nearest are {', '.join(map(repr, nearest_names(label, files))) or 'none'}" for label in missing]
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
        raise DataError(_where(case), f"{len(faults)} fault(s) in the masks", accepted, "mend what is listed", faults=faults)
    return combine(masks, volume.shape)


def _one_mask(path: Path, volume: Volume) -> Array:
    """A file's voxels above 0; a .npy file has no grid but its shape."""
    if path.suffix == ".npy":
        array = _read_npy(path)
        check_mask_grid(array.shape, volume.affine, volume, str(path))
        return np.asarray(array != 0)
    found = read_volume(path)
    check_mask_grid(found.shape, found.affine, volume, str(path))
    return np.asarray(found.array > 0)


# -- a stack -----------------------------------------------------------------------------------------------------------


def _is_stack(path: Path) -> bool:
    if path.suffix == ".npy":
        return True
    if not path.name.casefold().endswith((".nii", ".nii.gz")):
        return False
    try:
        shape = nib.load(path).shape
    except Exception:
        return False
    return len(shape) == 4 and shape[3] > 1


def _stack(case: Case, volume: Volume, path: Path) -> LabelMap:
    """NIfTI x y z q, or .npy q x y z."""
    if path.suffix == ".npy":
        array = _read_npy(path)
        masks = list(array) if array.ndim == 4 else [array]
        shape, affine = masks[0].shape, volume.affine
    else:
        shape, affine = read_grid(path)
        whole = np.asanyarray(nib.load(path).dataobj)
        masks = [whole[..., q] for q in range(whole.shape[3])]
    check_mask_grid(shape, affine, volume, str(path))
    if len(masks) != len(case.labels):
        accepted = f"one mask for each of the {len(case.labels)} labels of the line, in their order"
        raise DataError(str(path), f"a stack of {len(masks)} masks", accepted, "correct the list `label`")
    return combine(((label, mask > 0) for label, mask in zip(case.labels, masks, strict=True)), volume.shape)


def _read_npy(path: Path) -> Array:
    try:
        return np.asarray(np.load(path, allow_pickle=False, mmap_mode="r"))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(str(path), f"not an array ({error})", "a .npy file of numbers", "write it again with numpy.save") from error


# -- words -------------------------------------------------------------------------------------------------------------


def _narrow(codes: Array) -> Array:
    return np.asarray(codes, np.uint8 if codes.max(initial=0) < 256 else np.uint16)


def _spelling(label: Any) -> str:
    """One form for a label and for the name of its file, in which some characters cannot stand."""
    return " ".join(re.sub(r"[^\w.,+()-]|_", " ", str(label)).split()).casefold()


def _where(case: Case) -> str:
    return f"line {case.line}: {case.image}" if case.line else str(case.image)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape)


def _numbers(affine: Array) -> str:
    return str(np.round(np.asarray(affine, float)[:3], 3).tolist())
