"""`medlore evaluate --pred DIR --truth cases.jsonl`: Dice and surface Dice of segmented cases against reference masks.

Reference masks are named by the key `mask` of a case, in any layout that `medlore.data.volumes.masks` reads: a label map, a folder
with one file per label, {label: file}, or a stack. Predictions are the folders that `medlore segment` wrote for the same list.
Each case is measured on its own grid with the spacing of its header.

Means are taken as LoRKD and SAT take them: over cases for each data set and label, over labels for a data set, over
data sets for a label, over labels for a region.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.formats import ReadOptions, content_hash, read_grid, slice_headers
from medlore.data.volumes.cases import Case, folder_names, only_known_faults, read_cases
from medlore.data.volumes.geometry import Array, Crop, spacing_of
from medlore.data.volumes.masks import check_mask_grid, read_masks, read_segments
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, InputError, MedloreError, StepError
from medlore.files import read_json
from medlore.metrics.masks import EMPTY_RULE, dice, surface_dice
from medlore.models.segmenter.vocabulary import canonical_modality, default_vocabulary
from medlore.runs.report import Run
from medlore.segmenting.case_folders import folder_found, speaks_of
from medlore.segmenting.evaluation_tables import summarise, write_tables
from medlore.segmenting.mask_formats import NIFTI, MaskFormat, formats_named
from medlore.segmenting.outputs import file_names


def evaluate_masks(
    pred: str | Path,
    truth: str | Path,
    *,
    out: str | Path | None = None,
    tolerance_mm: float = 1.0,
    show: Callable[[dict[str, Any]], None] = lambda _results: None,
) -> dict[str, Any]:
    """Measure, and write tables and box plots.

    Args:
        pred: folder of `medlore segment`.
        truth: jsonl whose cases have a `mask`.
        out: folder of the results; `PRED/evaluation` unless given.
        tolerance_mm: of the surface Dice.
        show: is given the results, before cases that could not be measured are refused.

    Raises:
        InputError: no such folder, or no case has a mask.
        StepError: some cases could not be measured; the others were, and are written.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise InputError("--tolerance", f"got {tolerance_mm:g}", "millimetres from 0", "give --tolerance 1")
    pred = Path(pred)
    if not pred.is_dir():
        raise InputError(f"--pred {pred}", "is not a folder", "the --out folder of medlore segment", "check the spelling")
    cases = read_cases(truth)
    if not any(_has_mask(case) for case in cases):
        raise InputError(f"--truth {truth}", 'no case has a "mask"', "cases with reference masks", 'add "mask": "FILE" to the lines')
    out = Path(out) if out is not None else pred / "evaluation"
    with Run("evaluate", out, settings={"pred": str(pred), "truth": str(truth), "tolerance_mm": tolerance_mm}) as run:
        rows, faults = _measure_all(pred, cases, tolerance_mm)
        run.results = {"empty_masks": EMPTY_RULE, "tolerance_mm": tolerance_mm, "cases": len({r["case"] for r in rows}), "faults": faults}
        if rows:
            run.results |= summarise(rows)
            for path in write_tables(out, rows, run.results):
                run.add_output(path.name, path)
    show(run.results)
    if faults:
        accepted, fix = "a mask and a prediction on one grid for every case", "see the list; the other cases are written"
        raise StepError(str(truth), f"{len(faults)} case(s) could not be measured", accepted, fix, faults=faults)
    return run.results


def measure_case(folder: Path, case: Case, tolerance_mm: float) -> list[dict[str, Any]]:
    """One row a label.

    Raises:
        DataError: another grid, or a label without a value.
        InputError: a file that is missing.
    """
    modality = canonical_modality(case.modality)
    words = default_vocabulary()
    record = _record_of(folder)
    _check_speaks_of(case, record, folder)
    first, predict = _predictions(folder, case, record)
    if case.image.exists():
        check_mask_grid(*read_grid(case.image, ReadOptions(frame=case.frame, series=case.series)), first, str(case.image), what="an image")
        first = replace(first, slices=slice_headers(case.image, ReadOptions(frame=case.frame, series=case.series)))
    truth = read_masks(case, first)  # the masks of the image lie on the grid of what was predicted for it
    spacing = spacing_of(first.affine)
    rows = []
    for label in case.labels:
        mine, theirs = predict(label), truth.mask(label)
        rows.append(
            {
                "case": folder.name,
                "dataset": f"{case.dataset or 'none'} ({modality})",
                "modality": modality,
                "label": label,
                "region": words.lookup(label, modality, allow_unknown=True).region,
                "dice": dice(mine, theirs),
                "surface_dice": surface_dice(mine, theirs, spacing_mm=list(spacing), tolerance_mm=tolerance_mm),
                "predicted_voxels": int(np.count_nonzero(mine)),
                "true_voxels": int(np.count_nonzero(theirs)),
                "notes": " | ".join(truth.notes),
            }
        )
    return rows


def _measure_all(pred: Path, cases: Sequence[Case], tolerance_mm: float) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for case, name in zip(cases, folder_names(cases), strict=True):
        if not _has_mask(case):
            faults.append(f"line {case.line}: no mask")
            continue
        try:
            with only_known_faults(case.image):
                rows += measure_case(folder_found(pred, name, case), case, tolerance_mm)
        except MedloreError as error:
            place = f"line {case.line}: "
            faults.append(place + str(error).removeprefix(place))
    return rows, faults


def _has_mask(case: Case) -> bool:
    return case.mask is not None or "mask" in case.other


def _record_of(folder: Path) -> Any | None:
    """What `case.json` says; None where there is none, as with masks of other programs."""
    path = folder / "case.json"
    return read_json(path) if path.is_file() else None


def _check_speaks_of(case: Case, record: Any | None, folder: Path) -> None:
    """Refuse the prediction of another image: two patients' files may have one name."""
    if not isinstance(record, Mapping):
        return
    if not speaks_of(record, case, content_hash(case.image) if case.image.is_file() else None):
        made = record.get("case")
        frame = made.get("frame") if isinstance(made, Mapping) else None
        came = f"a prediction of {record['image']}" + (f", volume {frame}" if frame else "")
        accepted, fix = f"one of {case.image}, of which the list speaks", "segment the cases of this list, or name the folder of its masks"
        raise DataError(str(folder / "case.json"), came, accepted, fix)


def _predictions(folder: Path, case: Case, record: Any | None) -> tuple[Volume, Callable[[str], Array]]:
    """The grid of the masks of a case, and each of them when it is asked for."""
    written = record.get("formats") if isinstance(record, Mapping) else None
    if isinstance(written, Mapping) and written and NIFTI.name not in written:
        return _segments_of(folder, case, formats_named(list(written))[0], record)
    files = _predicted_files(folder, case.labels, record)
    crop = record.get("crop") if isinstance(record, Mapping) else None
    first = _uncropped(read_volume(folder / files[case.labels[0]]), crop)

    def mask(label: str) -> Array:
        predicted = _uncropped(read_volume(folder / files[label]), crop)
        check_mask_grid(predicted.shape, predicted.affine, first, str(predicted.path))
        return np.asarray(predicted.array > 0)

    return first, mask


def _uncropped(volume: Volume, crop: Any) -> Volume:
    """A part of the grid in its place, as `case.json` says; what is no part stays as it is."""
    if crop is None:
        return volume
    try:
        box, shape = Crop(tuple(crop["start"]), tuple(crop["stop"])), tuple(crop["shape"])
        array = box.undo(volume.array, shape)
    except (KeyError, TypeError, ValueError) as error:
        came = "no part of the grid that case.json names"
        raise DataError(str(volume.path), came, "files as they were written", "segment the case again") from error
    affine = Crop(tuple(-n for n in box.start), shape).apply_to_affine(volume.affine)  # type: ignore[arg-type]
    return replace(volume, array=array, affine=affine)


def _segments_of(folder: Path, case: Case, made: MaskFormat, record: Any) -> tuple[Volume, Callable[[str], Array]]:
    """The masks of one file of all labels, and of those beside it that hold what overlaps."""
    image = case.image if case.image.exists() else folder / "image.nii.gz"
    volume = read_volume(image, frame=case.frame, series=case.series)
    stem, _, suffix = made.file.partition(".")
    found = [read_segments(file, volume) for file in (folder / made.file, *sorted(folder.glob(f"{stem}_[0-9]*.{suffix}")))]

    def mask(label: str) -> Array:
        known = default_vocabulary().lookup(label, str(record["modality"]), allow_unknown=True).label
        parts = [part.mask(name) for part in found for name in dict.fromkeys((label, known)) if name in part.members]
        if parts:
            return parts[0]
        if known in {entry.get("label") for entry in record["labels"]}:
            return np.zeros(volume.shape, np.bool_)  # a label without a voxel has no segment
        raise DataError(str(folder / made.file), f"no segment for {label!r}", "a mask for every label", "segment the case again with it")

    return volume, mask


def _predicted_files(folder: Path, labels: Sequence[str], record: Any | None) -> dict[str, str]:
    """File of each label: as `case.json` says, under the label's own or the vocabulary's spelling; never out of the folder."""
    names = file_names(labels)
    if record is not None:
        try:
            written = {entry["label"]: Path(str(entry["file"])).name for entry in record["labels"]}
            modality = str(record["modality"])
        except (KeyError, TypeError) as error:
            where = str(folder / "case.json")
            raise DataError(where, "not the record of a case", "case.json as it was written", "segment the case again") from error
        for label in labels:
            known = default_vocabulary().lookup(label, modality, allow_unknown=True).label
            names[label] = written.get(label) or written.get(known) or names[label]
    return names
