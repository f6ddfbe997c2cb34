"""What a segmented case leaves on disk: one folder, whole or absent.

::

    OUT/NAME/
    ├── LABEL.nii.gz            one mask per label, uint8; overlapping labels keep all their voxels
    ├── prediction.nii.gz       label map in the smallest integer type, with its label table inside
    ├── image.nii.gz            the image, on the same grid
    ├── labels.json             value -> label
    ├── labels_itksnap.txt      the same for ITK-SNAP
    ├── labels.csv              value, label, file, SNOMED CT code, colour
    ├── union.nii.gz            all labels in one mask (--binary)
    ├── quality_control.png     three planes with outlines
    ├── uncertainty.nii.gz      entropy of every voxel in bits, the largest of all labels (--uncertainty)
    ├── probabilities/          LABEL.nii.gz, the network's probability of each label (--probabilities)
    ├── brain_mask.nii.gz       the brain that a first pass found
    ├── segmentation.dcm        DICOM-SEG (--format dicom-seg); overlapping labels in segmentation_2.dcm, ...
    ├── structures.dcm          RTSTRUCT (--format rtstruct)
    ├── segmentation.seg.nrrd   for 3D Slicer (--format seg-nrrd)
    └── case.json               the verdict, volumes, experts, windows, seconds, memory, what was odd
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlore.data.formats import write_volume
from medlore.data.volumes.cases import only_known_faults
from medlore.data.volumes.nifti import Volume, copy_image, label_table
from medlore.data.volumes.reference import ReferenceSeries
from medlore.data.volumes.structures import structure_of
from medlore.errors import MedloreError, StepError
from medlore.files import atomic_folder, write_json, write_text
from medlore.pages.colours import label_colour
from medlore.runs.report import peak_memory_bytes
from medlore.segmenting.case_masks import CaseMasks, OverlapRule, box_around, union
from medlore.segmenting.maps import map_names, write_maps
from medlore.segmenting.mask_formats import NIFTI, formats_named
from medlore.segmenting.quality_control import write_quality_control
from medlore.segmenting.segmentation import Segmentation
from medlore.segmenting.statistics import label_statistics

UNION = "union.nii.gz"
NameStyle = Literal["plain", "safe"]
RECORDS = ("case.json", "labels.json")
# what a voxel takes on disk, at least: a mask is mostly zeros, a map of many labels less so, grey values hardly
_MASK_PACKS, _MAP_PACKS, _IMAGE_PACKS, _SPARE_BYTES = 500, 200, 4, 1 << 20
_LONGEST_STEM = 60  # characters of a label in a file's name; each takes up to four of 255 bytes
CASE_SCHEMA = "medlore/case/1"
_RULE_WORDS = {
    "small-over-large": "where labels overlap, the smaller structure keeps the voxel",
    "given": "where labels overlap, the label that was named later keeps the voxel",
}


@dataclass(frozen=True, eq=False)
class Wanted:
    """What of a case is written, and how.

    Args:
        formats: names of `MASK_FORMATS`; the first of them in the table's order holds the masks.
        overlap_rule: who keeps a voxel of the label map.
        image: write `image.nii.gz`.
        picture: write `quality_control.png`, where matplotlib is installed (extra `plots`).
        reference: the DICOM series that DICOM-SEG and RTSTRUCT refer to, where the image is none.
        names: of files: as the labels are written, or of letters, digits, dots, hyphens and underscores alone.
        binary: write `union.nii.gz` too.
        crop_mm: write the box of all labels with so many millimetres around it; None for the whole grid.
    """

    formats: Sequence[str] = (NIFTI.name,)
    overlap_rule: OverlapRule = "small-over-large"
    image: bool = True
    picture: bool = True
    reference: ReferenceSeries | None = None
    names: NameStyle = "plain"
    binary: bool = False
    crop_mm: float | None = None

    def layout(self) -> dict[str, Any]:
        """What decides which files there are and which part of the grid they hold, beside formats, image and picture."""
        return {"names": self.names, "binary": self.binary, "crop_mm": self.crop_mm}


def write_outputs(
    folder: str | Path, result: Segmentation, *, about: Mapping[str, Any], wanted: Wanted | None = None, kept: list[str] | None = None
) -> dict[str, Any]:
    """Write the folder of a case and return what its `case.json` says.

    Args:
        folder: what an earlier run wrote there is replaced as a whole; what somebody added or changed is kept.
        result: of the model.
        about: further values for `case.json`.
        wanted: what is written, and how.
        kept: gets the names of files that the earlier run did not write.

    Raises:
        StepError: the folder cannot be written, or the geometry of a mask differs from the input's when it is read back. Image,
            picture and further formats may fail: the record then has the state `incomplete` and names them under `not_written`.
    """
    start = time.perf_counter()
    folder = Path(folder)
    wanted = wanted or Wanted()
    first, *further = formats_named(wanted.formats)
    files = file_names(result.routes.labels, style=wanted.names)
    crop = None if wanted.crop_mm is None else box_around(result, wanted.crop_mm)
    case = CaseMasks(result, files, wanted.overlap_rule, wanted.reference, crop)
    any_voxel = any(map(result.voxels, result.routes.labels))
    with atomic_folder(folder, kept=kept) as temporary:
        written = {made.name: made.file for made in (first, *further) if any_voxel or made.empty}
        if first.name in written:
            first.write(temporary, case)
        values = {index + 1: label for index, label in enumerate(result.routes.labels)}
        write_json(temporary / "labels.json", {**label_table(values), "overlap_rule": _RULE_WORDS[wanted.overlap_rule]})
        write_text(temporary / "labels_itksnap.txt", itksnap_labels(result.routes.labels))
        write_text(temporary / "labels.csv", labels_csv(result.routes.labels, files if first is NIFTI else {}))
        beside = _Beside(temporary)
        if wanted.image:
            beside.write("image.nii.gz", lambda path: _write_image(path, case))
        if wanted.binary:
            together = case.cut(union(result))
            beside.write(UNION, lambda path: write_volume(path, together, result.volume, labels={1: "union"}, affine=case.other_affine))
        if wanted.picture:
            beside.write("quality_control.png", lambda path: write_quality_control(path, result, folder.name))
        write_maps(temporary, case)
        for made in further:
            if made.name in written:
                beside.write(made.file, lambda path, made=made: made.write(path.parent, case))  # type: ignore[misc]
        notes = [f"no label has a voxel, so there is no {made.file}" for made in (first, *further) if made.name not in written]
        result.seconds["write"] = time.perf_counter() - start
        record = {
            **case_record(result, files if first is NIFTI else {}),
            "formats": written,
            "layout": wanted.layout(),
            "crop": None if crop is None else {"start": crop.start, "stop": crop.stop, "shape": result.reorientation.shape},
            "overlap_rule": _RULE_WORDS[wanted.overlap_rule],
            **about,
        }
        record["notes"] += notes
        record |= {"state": "incomplete" if beside.faults else "done", "not_written": beside.faults}
        write_json(temporary / "case.json", record)
    return record


def fault_of(record: Mapping[str, Any], folder: Path) -> StepError | None:
    """What the record of a case says is missing beside its masks."""
    if not record["not_written"]:
        return None
    names = ", ".join(record["not_written"])
    faults = [f"{name}: {reason}" for name, reason in record["not_written"].items()]
    accepted, fix = "all files that were asked for", f"use the masks, which are whole, and correct what is listed or leave {names} out"
    return StepError(str(folder), f"the masks are written, but not {names}", accepted, fix, faults=faults)


class _Beside:
    """Files beside the masks: one that cannot be written costs no mask, and is named.

    Args:
        folder: of the case, while it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, str] = {}
        self._folder = folder

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            with only_known_faults(self._folder / name):
                write(self._folder / name)
        except MedloreError as error:
            self.faults[name] = error.came
            stem, _, suffix = name.partition(".")
            for part in self._folder.glob(f"{stem}*.{suffix}"):  # half of several files would mislead
                part.unlink()


def check_room(out: Path, volume: Volume, labels: int, *, image: bool) -> None:
    """Refuse to begin where the disk cannot take what comes out.

    Args:
        out: folder of the run.
        volume: the image.
        labels: masks that are asked for.
        image: whether it is copied.

    Raises:
        StepError: too little is free.
    """
    voxels = int(np.prod(volume.shape))
    needed = _SPARE_BYTES + labels * voxels // _MASK_PACKS + voxels // _MAP_PACKS
    if image:
        file = volume.path
        needed += file.stat().st_size if file.is_file() else volume.array.nbytes // _IMAGE_PACKS
    free = shutil.disk_usage(out).free
    if free < needed:
        came = f"{free / 2**20:.0f} MiB are free, and the results of {volume.path.name} need about {needed / 2**20:.0f} MiB"
        raise StepError(str(out), came, "a disk with room", "free space, name another folder, or give --no-image-copy")


def case_record(result: Segmentation, files: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a finished case.

    Args:
        result: of the model.
        files: label -> file of its own mask; none where the masks lie in one file of another format.
    """
    ml, statistics = result.voxel_ml(), label_statistics(result)
    experts = {label: region for region, labels in result.routes.by_region.items() for label in labels}
    labels = [
        {
            "value": index + 1,
            "label": label,
            "expert": experts[label],
            "file": files.get(label),
            "voxels": result.voxels(label),
            "volume_ml": round(result.voxels(label) * ml, 4),
            "statistics": statistics.get(label),
        }
        for index, label in enumerate(result.routes.labels)
    ]
    return {
        "schema": CASE_SCHEMA,
        "modality": result.routes.modality,
        "labels": labels,
        "experts": {region: list(names) for region, names in result.routes.by_region.items()},
        "windows": {"all": result.windows, "skipped_without_body": result.skipped},
        "grid": "original" if result.affine is None else "processed",
        "geometry": result.prepared.path.record(),
        "intensity": result.prepared.intensity.record(),
        "notes": list(result.prepared.notes),
        "tissues": result.tissues,
        "check": None if result.verdict is None else result.verdict.record(),
        "maps": map_names(result.maps, files),
        "plan": result.plan.record(),
        "seconds": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def file_names(labels: Sequence[str], *, style: NameStyle = "plain") -> dict[str, str]:
    """A file name for each label: the label itself, with characters that a file system refuses replaced.

    Args:
        labels: of a case.
        style: `safe`: only what no shell takes apart.

    Examples:
        >>> file_names(["left kidney", "T1/T2"])
        {'left kidney': 'left kidney.nii.gz', 'T1/T2': 'T1_T2.nii.gz'}
        >>> file_names(["lumbar vertebrae 1 (l1)"], style="safe")
        {'lumbar vertebrae 1 (l1)': 'lumbar_vertebrae_1_l1.nii.gz'}
    """
    names: dict[str, str] = {}
    taken = {"prediction", "image", "uncertainty", "brain_mask", "union", "segmentation"}
    for label in labels:
        cleaned = re.sub(r"[^\w .,+()-]", "_", label)
        if style == "safe":
            cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", unicodedata.normalize("NFKD", cleaned)).strip("_-")
        plain = stem = cleaned.strip(" .")[:_LONGEST_STEM].rstrip(" .") or "label"
        number = 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{plain}_{number}"
        taken.add(stem.casefold())
        names[label] = f"{stem}.nii.gz"
    return names


def labels_csv(labels: Sequence[str], files: Mapping[str, str]) -> str:
    """Value, label, file, SNOMED CT code and colour of each label."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("value", "label", "file", "code", "meaning", "side", "site", "red", "green", "blue"))
    for value, label in enumerate(labels, start=1):
        found = structure_of(label)
        side, site = (None if part is None else part.meaning for part in (found.side, found.site))
        writer.writerow((value, label, files.get(label), *found.code, side, site, *found.colour))
    return text.getvalue()


def output_names(record: Mapping[str, Any], wanted: Wanted) -> list[str]:
    """What the folder of a finished case holds.

    Args:
        record: its `case.json`; a format that could not hold a case without a voxel is named neither there nor here.
        wanted: what was asked for.

    Examples:
        >>> record = {"labels": [{"file": "liver.nii.gz", "voxels": 3}]}
        >>> output_names(record, Wanted(["nifti", "rtstruct"], image=False, picture=False))
        ['liver.nii.gz', 'prediction.nii.gz', 'structures.dcm', 'labels.json', 'labels_itksnap.txt', 'case.json']
    """
    optional = {"image.nii.gz": wanted.image, "quality_control.png": wanted.picture, UNION: wanted.binary}
    any_voxel = any(entry["voxels"] for entry in record["labels"])
    formats = formats_named(wanted.formats)
    masks = [entry["file"] for entry in record["labels"]] if NIFTI in formats else []
    whole = [made.file for made in formats if made.empty or any_voxel]
    return [*masks, *whole, *(name for name, there in optional.items() if there), "labels.json", "labels_itksnap.txt", "case.json"]


def itksnap_labels(labels: Sequence[str]) -> str:
    """A label-description file of ITK-SNAP."""
    head = "# ITK-SnAP Label Description File\n# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL\n"
    lines = ['    0     0    0    0        0  0  0    "Clear Label"']
    for index, label in enumerate(labels):
        red, green, blue = label_colour(index)
        lines.append(f'{index + 1:>5} {red:>5} {green:>4} {blue:>4}        1  1  1    "{label}"')
    return head + "\n".join(lines) + "\n"


def _write_image(path: Path, case: CaseMasks) -> None:
    result = case.result
    if result.affine is None and case.crop is None:
        copy_image(result.volume, path)
        return
    voxels = result.volume.array if result.affine is None else result.prepared.pixels[0].numpy()
    write_volume(path, case.cut(voxels), result.volume, affine=case.other_affine)
