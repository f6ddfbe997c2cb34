"""A folder with an image and its masks -> sections of a page: the slice viewer and the volumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medlore.data.formats import is_volume_name, read_mask_file, stem_of
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.label_tables import BESIDE, read_table
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.errors import DataError, MedloreError
from medlore.files import read_json
from medlore.pages import Facts, Notes, Piece, Section, Slices, Table, slices_of
from medlore.pages.colours import label_colour
from medlore.pages.report import flat

_IMAGE, _MAP = "image", "prediction"  # stems: a folder may hold them in any format
_NO_MASKS = (_IMAGE, _MAP, "uncertainty", "brain_mask")
_SAME_MM = 1e-3


@dataclass(frozen=True)
class MaskSource:
    """Where a label's mask comes from: a file of its own, else a value of the label map."""

    label: str
    file: Path | None = None
    value: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def is_case_folder(folder: Path) -> bool:
    """Whether a folder holds masks of one image."""
    if (folder / "case.json").is_file() or _called(folder, _MAP) is not None:
        return True
    return _called(folder, _IMAGE) is not None and any(_is_mask(path) for path in folder.iterdir())


def case_sections(folder: Path) -> list[Section]:
    """The viewer, a table of the volumes, and how the masks were made.

    Raises:
        DataError: a file that is damaged, or on another grid than the image; masks in other formats than NIfTI alone.
    """
    record = _record(folder)
    formats = record.get("formats")
    if isinstance(formats, Mapping) and formats and "nifti" not in formats:
        came, fix = f"masks as {', '.join(map(str, formats))} alone", "segment again with nifti in --format, or open them in 3D Slicer"
        raise DataError(str(folder), came, "masks in NIfTI", fix)
    sources = mask_sources(folder, record)
    label_map = None if (file := _called(folder, _MAP)) is None else read_volume(file)
    image, notes = _image(folder, record, label_map, sources)
    slices = slices_of(
        image.array,
        image.affine,
        _masks(sources, label_map, image),
        colours=[label_colour(index) for index in range(max(1, len(sources)))],
        modality=record.get("modality"),
    )
    notes += [str(note) for note in record.get("notes", ())]
    if record.get("overlap_rule"):
        notes.append(f"In the label map: {record['overlap_rule']}. The viewer shows every mask completely, with the smallest on top.")
    says = _says(record)
    doubts: list[Piece] = [Notes(says, warning=True)] if says else []
    slices_and_notes: list[Piece] = [*doubts, slices, *([Notes(notes)] if notes else [])]
    sections = [Section("Slices", slices_and_notes)]
    if sources:
        sections.append(Section("Volumes", (_volumes(sources, slices, _check(record)),)))
    if made := _origin(record):
        sections.append(Section("How the masks were made", made))
    return sections


def mask_sources(folder: Path, record: Mapping[str, Any]) -> list[MaskSource]:
    """The labels of a folder: from `case.json`, else from the table of the label map, else one for each mask file."""
    labels = record.get("labels")
    if isinstance(labels, list):
        return [_recorded_source(folder, entry) for entry in labels if isinstance(entry, Mapping)]
    table = _label_table(folder)
    if table:
        return [MaskSource(label, _own_file(folder, label), value) for value, label in sorted(table.items())]
    files = sorted(path for path in folder.iterdir() if _is_mask(path))
    return [MaskSource(stem_of(path.name), path) for path in files]


def _recorded_source(folder: Path, entry: Mapping[str, Any]) -> MaskSource:
    name = Path(str(entry.get("file") or "")).name  # never a path out of the folder
    file = folder / name if name and (folder / name).is_file() else None
    value = entry.get("value")
    return MaskSource(str(entry.get("label", name)), file, value if isinstance(value, int) else None, entry)


def _own_file(folder: Path, label: str) -> Path | None:
    return _called(folder, label) if Path(label).name == label else None


def _called(folder: Path, stem: str) -> Path | None:
    """The volume of this name, in whatever format; packed before plain."""
    found = [path for path in folder.iterdir() if is_volume_name(path.name) and stem_of(path.name) == stem and path.is_file()]
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def _is_mask(path: Path) -> bool:
    shown = is_volume_name(path.name) and not path.name.startswith(".")
    return shown and stem_of(path.name) not in _NO_MASKS and path.is_file()


def _record(folder: Path) -> Mapping[str, Any]:
    path = folder / "case.json"
    record = read_json(path) if path.is_file() else {}
    if not isinstance(record, Mapping):
        raise DataError(str(path), f"a {type(record).__name__}", "the record of a case", "segment the case again")
    return record


def _label_table(folder: Path) -> dict[int, str]:
    path = folder / BESIDE
    if path.is_file():
        return read_table(path)
    label_map = _called(folder, _MAP)
    if label_map is None:
        return {}
    if table := _table_inside(label_map):
        return table
    if any(_is_mask(path) for path in folder.iterdir()):
        return {}
    values = np.unique(read_volume(label_map).array)
    return {int(value): f"label {int(value)}" for value in values if value > 0}


def _table_inside(label_map: Path) -> dict[int, str] | None:
    try:
        names = read_mask_file(label_map).names
    except MedloreError:  # what is wrong with the file is said where its voxels are read
        return None
    return None if names is None else {value: name for name, places in names.items() for layer, value in places if layer == 0}


def _image(folder: Path, record: Mapping[str, Any], label_map: Volume | None, sources: list[MaskSource]) -> tuple[Volume, list[str]]:
    """The image on the grid of the masks; a black one, and a note, where there is none."""
    grid = label_map or next((read_volume(source.file) for source in sources if source.file), None)
    tried = _called(folder, _IMAGE)
    if tried is not None:
        return read_volume(tried), []
    if grid is None:
        raise DataError(str(folder), "neither an image nor a mask", "image.nii.gz with prediction.nii.gz or masks", "name another folder")
    original = Path(str(record.get("image", "")))
    if original.exists() and (original.is_dir() or is_volume_name(original.name)):
        try:
            found = read_volume(original)
        except MedloreError:
            found = None
        if found is not None and found.shape == grid.shape and np.abs(found.affine - grid.affine).max() <= _SAME_MM:
            return found, []
    black = np.broadcast_to(np.uint8(0), grid.shape)
    return Volume(black, grid.affine, grid.header, grid.file_shape, grid.path), [
        "There is no image in this folder: the masks are shown on black."
    ]


def _masks(sources: list[MaskSource], label_map: Volume | None, image: Volume) -> Iterator[tuple[str, Array]]:
    for source in sources:
        yield source.label, _mask(source, label_map, image)


def _mask(source: MaskSource, label_map: Volume | None, image: Volume) -> Array:
    if source.record.get("voxels") == 0:
        return np.broadcast_to(np.bool_(False), image.shape)
    volume = read_volume(source.file) if source.file is not None else label_map
    if volume is None:
        return np.broadcast_to(np.bool_(False), image.shape)
    if volume.shape != image.shape or np.abs(volume.affine - image.affine).max() > _SAME_MM:
        came = f"a grid of {volume.shape}, the image has {image.shape}" if volume.shape != image.shape else "another affine than the image"
        raise DataError(str(volume.path), came, "the grid of the image", "segment the image that lies in the folder")
    return np.asarray(volume.array != 0 if source.file is not None else volume.array == source.value)


def _check(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The verdict in the record of a case; nothing where it has none."""
    record_of_check = record.get("check")
    return record_of_check if isinstance(record_of_check, Mapping) else {}


def _says(record: Mapping[str, Any]) -> list[str]:
    said = _check(record).get("says")
    return [str(line) for line in said] if isinstance(said, list) else []


def _expected(check: Mapping[str, Any], label: str) -> tuple[str | None, str | None]:
    """The expected range of a label, and what its flags say."""
    measured, flags = check.get("measured"), check.get("flags")
    own = measured.get(label) if isinstance(measured, Mapping) else None
    span = own.get("expected_ml") if isinstance(own, Mapping) else None
    ranged = isinstance(span, list) and len(span) == 2 and all(isinstance(v, int | float) for v in span)
    said = [str(f.get("says")) for f in flags if isinstance(f, Mapping) and f.get("label") == label] if isinstance(flags, list) else []
    return f"{span[0]:g} to {span[1]:g}" if ranged and span is not None else None, "; ".join(said) or None


def _volumes(sources: list[MaskSource], slices: Slices, check: Mapping[str, Any]) -> Table:
    there = [name for name in ("value", "expert", "voxels") if any(name in source.record for source in sources)]
    rows = []
    for source, label in zip(sources, slices.labels, strict=True):
        ml = source.record.get("volume_ml", label.volume_ml)
        rows.append([label.name, *(source.record.get(name) for name in there), float(ml) if ml is not None else None])
    if not check:
        return Table(("label", *there, "volume in ml"), rows)
    rows = [[*row, *_expected(check, source.label)] for row, source in zip(rows, sources, strict=True)]
    return Table(("label", *there, "volume in ml", "expected ml", "check"), rows)


def _origin(record: Mapping[str, Any]) -> list[Piece]:
    wanted = ("image", "modality", "model", "precision", "grid", "windows", "experts", "intensity", "seconds")
    facts = flat({name: record[name] for name in wanted if name in record})
    pieces: list[Piece] = [Facts(facts, "Model and windows", folded=True)] if facts else []
    if isinstance(record.get("geometry"), Mapping):
        pieces.append(Facts(flat(record["geometry"]), "Grid", folded=True))
    return pieces
