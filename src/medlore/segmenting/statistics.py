"""What is measured of each mask, and the table of a whole cohort: volume, grey values, centre, box, and what the check says.

The numbers of a case stand in its `case.json`; the table is written from these, one case after the other, so that a cohort of any
size needs the memory of one case, and cases that an earlier run finished are in it too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medlore.data.volumes.geometry import Array, Crop
from medlore.errors import DataError, InputError
from medlore.files import atomic_path, json_text, read_json

if TYPE_CHECKING:
    from medlore.segmenting.segmentation import Segmentation

SCHEMA = "medlore/statistics/1"
CSV, JSON = "statistics.csv", "statistics.json"
PERCENTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}
_AXES = "xyz"
_STRANGE = "backslashreplace"  # names of files that are no UTF-8 stand as \\udcXX, in JSON an escape
GREY = ("mean", "sd", "min", *PERCENTILES, "max")
COLUMNS = (
    "case", "image", "modality", "label", "value", "voxels", "volume_ml", *GREY,
    *(f"centre_{axis}_mm" for axis in _AXES), *(f"{end}_{axis}" for axis in _AXES for end in ("first", "last")), "check",
)  # fmt: skip


def label_statistics(result: Segmentation) -> dict[str, dict[str, Any]]:
    """Label -> its numbers; a label without a voxel has none.

    Grey values are those of the image (HU in CT) at the voxels of the mask, without what is not finite; on another grid than the
    image's there are none. `sd` is that of the voxels themselves (n in the denominator). Centre: mean of the voxel centres in mm,
    RAS+. Box: first and last voxel along x, y and z of the output grid, from 0.
    """
    turn = result.reorientation
    on_image = result.affine is None
    affine = turn.apply_to_affine(np.asarray(result.volume.affine if result.affine is None else result.affine))
    grey = turn.apply(result.volume.array) if on_image else None
    found = {}
    for label in result.routes.labels:
        boxed = result.boxed(label)
        if boxed is not None:
            crop, mask = boxed
            values = {} if grey is None else grey_statistics(crop.apply(grey)[mask])
            found[label] = {**values, "centre_mm": _centre(crop, mask, affine), "box": _ends(result.box(label))}
    return found


def grey_statistics(values: Array) -> dict[str, float]:
    """Mean, sd, smallest, percentiles and largest of grey values; empty where none is finite.

    Example:
        >>> grey_statistics(np.array([1.0, 2.0, 3.0, np.nan]))["mean"]
        2.0
    """
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        return {}
    points = np.percentile(finite, [0, *PERCENTILES.values(), 100])
    numbers = [finite.mean(dtype=np.float64), finite.std(dtype=np.float64), *points]
    return {name: round(float(number), 4) for name, number in zip(GREY, numbers, strict=True)}


def _centre(crop: Crop, mask: Array, affine: Array) -> list[float]:
    planes = [mask.sum(axis=tuple(b for b in range(3) if b != axis)) for axis in range(3)]
    means = [float(counts @ np.arange(len(counts))) / float(counts.sum()) for counts in planes]
    centre = affine @ np.array([*(mean + first for mean, first in zip(means, crop.start, strict=True)), 1.0])
    return [round(float(v), 3) for v in centre[:3]]


def _ends(box: Crop | None) -> list[list[int]] | None:
    return None if box is None else [[first, stop - 1] for first, stop in zip(box.start, box.stop, strict=True)]


# -- the table of a cohort ---------------------------------------------------------------------------------------------


def write_cohort_table(out: Path, folders: Iterable[str], *, to: Path | None = None) -> list[Path]:
    """Write `statistics.csv` and `statistics.json`: a row for each case and label, from the `case.json` of every folder.

    Args:
        out: folder of the run.
        folders: of the cases, below it, in the order of the table; one without a readable record has no row.
        to: where the files lie; `out` unless given.

    Raises:
        StepError: a file cannot be written.
    """
    names, place = list(folders), to or out
    with atomic_path(place / CSV) as temporary, temporary.open("w", encoding="utf-8", errors=_STRANGE, newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows_of(out, names):
            writer.writerow({name: "" if value is None else value for name, value in row.items()})
    with atomic_path(place / JSON) as temporary, temporary.open("w", encoding="utf-8", errors=_STRANGE) as stream:
        stream.write(f'{{"schema": "{SCHEMA}", "rows": [')
        for number, row in enumerate(rows_of(out, names)):
            stream.write(("," if number else "") + "\n  " + json_text(row, indent=None))
        stream.write("\n]}\n")
    return [place / CSV, place / JSON]


def rows_of(out: Path, folders: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of the table, one case after the other; a folder without a readable record has none."""
    for folder in folders:
        try:
            record = read_json(out / folder / "case.json")
            yield from case_rows(folder, record)
        except (InputError, DataError, KeyError, TypeError):  # the case failed, and its entry in the report says why
            continue


def case_rows(name: str, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of one case.

    Args:
        name: of the case.
        record: its `case.json`; one of an earlier version has no grey values, centre and box.
    """
    verdicts, judged = _verdicts(record), record.get("check") is not None
    for entry in record["labels"]:
        own = entry.get("statistics") or {}
        centre, box = own.get("centre_mm") or [None] * 3, own.get("box") or [[None, None]] * 3
        places = [number for ends in box for number in ends]
        numbers = [entry["value"], entry["voxels"], entry["volume_ml"], *map(own.get, GREY), *centre, *places]
        check = verdicts.get(entry["label"], "ok" if judged else None)
        yield dict(zip(COLUMNS, (name, record.get("image"), record["modality"], entry["label"], *numbers, check), strict=True))


def _verdicts(record: Mapping[str, Any]) -> dict[str, str]:
    """Label -> what the check says of it; only those with something odd."""
    said: dict[str, list[str]] = {}
    for flag in (record.get("check") or {}).get("flags", ()):
        said.setdefault(flag["label"], []).append(flag["says"])
    return {label: "; ".join(lines) for label, lines in said.items()}
