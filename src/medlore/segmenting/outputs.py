"""What a segmented case leaves on disk: one folder, whole or absent.

::

    OUT/NAME/
    ├── LABEL.nii.gz            one mask per label, uint8; overlapping labels keep all their voxels
    ├── prediction.nii.gz       label map in the smallest integer type, with its label table inside
    ├── image.nii.gz            the image, on the same grid
    ├── labels.json             value -> label
    ├── labels_itksnap.txt      the same for ITK-SNAP
    ├── quality_control.png     three planes with outlines
    ├── uncertainty.nii.gz      entropy of every voxel in bits, the largest of all labels (--uncertainty)
    ├── probabilities/          LABEL.nii.gz, the network's probability of each label (--probabilities)
    ├── brain_mask.nii.gz       the brain that a first pass found
    ├── segmentation.dcm        DICOM-SEG, on request, where the input was DICOM; overlapping labels in segmentation_2.dcm, ...
    └── case.json               the verdict, volumes, experts, windows, seconds, memory, what was odd
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medlore.data.formats import write_volume
from medlore.data.volumes.cases import only_known_faults
from medlore.data.volumes.dicom import write_dicom_seg
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import Volume, copy_image, label_table
from medlore.errors import MedloreError, StepError
from medlore.files import atomic_folder, write_json, write_text
from medlore.pages.colours import label_colour
from medlore.runs.report import peak_memory_bytes
from medlore.segmenting.maps import canvas_of, map_names, write_maps
from medlore.segmenting.quality_control import write_quality_control
from medlore.segmenting.segmentation import Segmentation

RECORDS = ("case.json", "labels.json")
# what a voxel takes on disk, at least: a mask is mostly zeros, a map of many labels less so, grey values hardly
_MASK_PACKS, _MAP_PACKS, _IMAGE_PACKS, _SPARE_BYTES = 500, 200, 4, 1 << 20
_LONGEST_STEM = 60  # characters of a label in a file's name; each takes up to four of 255 bytes
CASE_SCHEMA = "medlore/case/1"
OverlapRule = Literal["small-over-large", "given"]
_RULE_WORDS = {
    "small-over-large": "where labels overlap, the smaller structure keeps the voxel",
    "given": "where labels overlap, the label that was named later keeps the voxel",
}


def write_outputs(
    folder: str | Path,
    result: Segmentation,
    *,
    about: Mapping[str, Any],
    overlap_rule: OverlapRule = "small-over-large",
    image: bool = True,
    picture: bool = True,
    dicom_seg: bool = False,
    kept: list[str] | None = None,
) -> dict[str, Any]:
    """Write the folder of a case and return what its `case.json` says.

    Args:
        folder: what an earlier run wrote there is replaced as a whole; what somebody added or changed is kept.
        result: of the model.
        about: further values for `case.json`.
        overlap_rule: who keeps a voxel of the label map.
        image: write `image.nii.gz`.
        picture: write `quality_control.png`.
        dicom_seg: write `segmentation.dcm`.
        kept: gets the names of files that the earlier run did not write.

    Raises:
        StepError: the folder cannot be written, or the geometry of a mask differs from the input's when it is read back. Image,
            picture and DICOM-SEG may fail: the record then has the state `incomplete` and names them under `not_written`.
    """
    start = time.perf_counter()
    folder = Path(folder)
    files = file_names(result.routes.labels)
    with atomic_folder(folder, kept=kept) as temporary:
        _write_masks(temporary, result, files)
        values = {index + 1: label for index, label in enumerate(result.routes.labels)}
        grid = {"affine": result.affine}
        write_volume(temporary / "prediction.nii.gz", label_map(result, overlap_rule), result.volume, labels=values, **grid)
        write_json(temporary / "labels.json", {**label_table(values), "overlap_rule": _RULE_WORDS[overlap_rule]})
        write_text(temporary / "labels_itksnap.txt", itksnap_labels(result.routes.labels))
        beside = _Beside(temporary)
        if image:
            beside.write("image.nii.gz", lambda path: _write_image(path, result))
        if picture:
            beside.write("quality_control.png", lambda path: write_quality_control(path, result, folder.name))
        write_maps(temporary, result, files)
        notes = []
        if dicom_seg and (masks := _OneByOne(result)):
            beside.write("segmentation.dcm", lambda path: write_dicom_seg(path, result.volume, masks))
        elif dicom_seg:
            notes.append("no label has a voxel, so there is no segmentation.dcm")
        result.seconds["write"] = time.perf_counter() - start
        record = {**case_record(result, files), "overlap_rule": _RULE_WORDS[overlap_rule], **about}
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


def label_map(result: Segmentation, rule: OverlapRule = "small-over-large") -> Array:
    """One integer per voxel: the label's place in the list, from 1; 0 is background. The smallest type that holds all of them."""
    labels = result.routes.labels
    kind = np.uint8 if len(labels) < 256 else np.uint16
    values, view = canvas_of(result, kind)
    order = sorted(labels, key=result.voxels, reverse=True) if rule == "small-over-large" else list(labels)
    for label in order:  # later ones are painted over earlier ones
        if (found := result.boxed(label)) is not None:
            crop, mask = found
            np.copyto(crop.apply(view), labels.index(label) + 1, where=mask)
    return values


def case_record(result: Segmentation, files: Mapping[str, str]) -> dict[str, Any]:
    """The facts of a finished case."""
    ml = result.voxel_ml()
    experts = {label: region for region, labels in result.routes.by_region.items() for label in labels}
    labels = [
        {
            "value": index + 1,
            "label": label,
            "expert": experts[label],
            "file": files[label],
            "voxels": result.voxels(label),
            "volume_ml": round(result.voxels(label) * ml, 4),
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


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """A file name for each label: the label itself, with characters that a file system refuses replaced.

    Examples:
        >>> file_names(["left kidney", "T1/T2"])
        {'left kidney': 'left kidney.nii.gz', 'T1/T2': 'T1_T2.nii.gz'}
    """
    names: dict[str, str] = {}
    taken = {"prediction", "image", "uncertainty", "brain_mask"}
    for label in labels:
        plain = stem = re.sub(r"[^\w .,+()-]", "_", label).strip(" .")[:_LONGEST_STEM].rstrip(" .") or "label"
        number = 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{plain}_{number}"
        taken.add(stem.casefold())
        names[label] = f"{stem}.nii.gz"
    return names


def output_names(masks: Sequence[str], *, image: bool, picture: bool) -> list[str]:
    """What the folder of a finished case holds, DICOM-SEG apart.

    Examples:
        >>> output_names(["liver.nii.gz"], image=False, picture=False)
        ['liver.nii.gz', 'prediction.nii.gz', 'labels.json', 'labels_itksnap.txt', 'case.json']
    """
    optional = [*(["image.nii.gz"] if image else []), *(["quality_control.png"] if picture else [])]
    return [*masks, "prediction.nii.gz", *optional, "labels.json", "labels_itksnap.txt", "case.json"]


def itksnap_labels(labels: Sequence[str]) -> str:
    """A label-description file of ITK-SNAP."""
    head = "# ITK-SnAP Label Description File\n# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL\n"
    lines = ['    0     0    0    0        0  0  0    "Clear Label"']
    for index, label in enumerate(labels):
        red, green, blue = label_colour(index)
        lines.append(f'{index + 1:>5} {red:>5} {green:>4} {blue:>4}        1  1  1    "{label}"')
    return head + "\n".join(lines) + "\n"


class _OneByOne(Mapping[str, Array]):
    """The masks that have voxels, each made when it is asked for."""

    def __init__(self, result: Segmentation) -> None:
        self._result = result
        self._labels = [label for label in result.routes.labels if result.voxels(label)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, label: str) -> Array:
        return self._result.mask(label)


def _write_masks(folder: Path, result: Segmentation, files: Mapping[str, str]) -> None:
    values, view = canvas_of(result, np.uint8)
    for label in result.routes.labels:
        found = result.boxed(label)
        if found is not None:
            found[0].apply(view)[...] = found[1]
        write_volume(folder / files[label], values, result.volume, labels={1: label}, affine=result.affine)
        if found is not None:
            found[0].apply(view)[...] = 0


def _write_image(path: Path, result: Segmentation) -> None:
    volume = result.volume
    if result.affine is not None:
        write_volume(path, result.prepared.pixels[0].numpy(), volume, affine=result.affine)
    else:
        copy_image(volume, path)
