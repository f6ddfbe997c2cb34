"""Training volumes prepared once: network orientation, spacing and grey values, kept in memory-mapped files.

A case becomes three files named by a key: `KEY.codes.npy` (label codes, x y z), `KEY.image.npy` (normalised float16, x y z;
absent where the image is to be synthesised from the codes) and `KEY.json`, written last. The key is the SHA-256 of the
inputs' bytes, of what was asked of them, and of the format's version, so nothing stale is ever read. An entry that was cut
off is recognised by its sizes and built again; a case that cannot be prepared is reported and left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import scipy

from medlore.data.formats import files_of
from medlore.data.volumes.cases import Case, folder_names, only_known_faults
from medlore.data.volumes.geometry import Array, Crop, GridPath, Shape, bounding_box, reorientation_to, resampling_to, spacing_for
from medlore.data.volumes.intensity import Modality, rule_of
from medlore.data.volumes.label_tables import BESIDE
from medlore.data.volumes.masks import LabelMap, read_masks
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import NETWORK_SPACING_MM, prepare, read_volume
from medlore.errors import DataError, MedloreError
from medlore.files import atomic_path, existing_path, sha256_of, write_json

FORMAT = "medlore/training-case/1"
SPLITS = ("train", "validation", "test")
Box = tuple[Shape, Shape]
_POINTS = 128  # voxels kept for each label, at which a patch may be centred
_MARGIN = 8  # voxels of background that stay around a label map whose image is synthesised
_SEED = 20_240


@dataclass(frozen=True, eq=False)
class CachedCase:
    """One prepared case. It holds paths and numbers only, so it travels to worker processes; arrays are mapped on first use.

    Args:
        key: of its files.
        folder: of the cache.
        name: the image's name, unique in the list.
        dataset: as the line says, or the empty string.
        patient: as the line says, or `name`.
        modality: ct, mri, pet or us.
        labels: that the case annotates.
        absent: labels that the case does not annotate and of which the line says that they cannot be in it.
        members: label -> codes.
        shape: x y z of the network's grid.
        affine: voxel -> RAS+ mm of that grid.
        air: what lies outside of the volume, in normalised grey values.
        boxes: label -> corner (inclusive) and opposite corner (exclusive), for labels that have voxels.
        points: label -> some of its voxels, drawn evenly.
        voxels: label -> how many voxels it has.
        synthesise: the image is drawn from the codes.
        split: train, validation or test.
        notes: what was odd and how it was handled.
    """

    key: str
    folder: Path
    name: str
    dataset: str
    patient: str
    modality: str
    labels: tuple[str, ...]
    absent: tuple[str, ...]
    members: Mapping[str, tuple[int, ...]]
    shape: Shape
    affine: Array
    air: float
    boxes: Mapping[str, Box]
    points: Mapping[str, tuple[Shape, ...]]
    voxels: Mapping[str, int]
    synthesise: bool
    split: str
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> Array | None:
        """Normalised grey values, float16 (x y z); None where they are to be synthesised."""
        return None if self.synthesise else _mapped(self.folder / f"{self.key}.image.npy")

    @property
    def codes(self) -> Array:
        """Label codes, uint8 or uint16 (x y z)."""
        return _mapped(self.codes_file)

    @property
    def codes_file(self) -> Path:
        """The file of the codes."""
        return self.folder / f"{self.key}.codes.npy"

    @property
    def present(self) -> frozenset[str]:
        """Labels with voxels."""
        return frozenset(self.boxes)


@dataclass(frozen=True)
class CacheReport:
    """What `build_cache` did.

    Args:
        cases: in the order of the list, without the broken ones.
        faults: one sentence for each case that was left out.
        built: how many were prepared now.
        reused: how many lay in the cache.
    """

    cases: list[CachedCase]
    faults: list[str]
    built: int
    reused: int


def build_cache(
    cases: Sequence[Case],
    folder: str | Path,
    preprocessing: Mapping[str, Any],
    *,
    on_case: Callable[[int, int, str], None] | None = None,
) -> CacheReport:
    """Prepare what the cache does not hold yet.

    Args:
        cases: with masks; `modality` is one of ct, mri, pet and us, labels are spelt as the prompts of the training.
            Further keys that are read: `patient`, `split`, `absent`, `synthesise`, and those of `read_masks`.
        folder: of the cache.
        preprocessing: `orientation`, `spacing_mm` (one, or one for each modality) and `intensity`, as a pack states them.
        on_case: called after each case with cases done, cases in all, and its name.

    Raises:
        DataError: no case could be used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done: list[CachedCase] = []
    faults: list[str] = []
    built = 0
    for number, (case, name) in enumerate(zip(cases, folder_names(cases), strict=True), start=1):
        try:
            with only_known_faults(case.image):
                _check_line(case)
                key = _key(case, preprocessing)
                found = _read_entry(folder, key, case, name)
                if found is None:
                    _build_entry(folder, key, case, preprocessing)
                    built += 1
                    found = _read_entry(folder, key, case, name)
            if found is not None:
                done.append(found)
        except MedloreError as error:
            faults.append(f"{f'line {case.line}, ' if case.line else ''}{name}: {error}")
        if on_case is not None:
            on_case(number, len(cases), name)
    if not done:
        raise DataError(str(folder), "no case could be prepared", "at least one image with masks", "correct what is listed", faults=faults)
    return CacheReport(done, faults, built, len(done) - built)


def _check_line(case: Case) -> None:
    faults = []
    if case.modality not in get_args(Modality):
        faults.append(f"modality {case.modality!r} is none of {', '.join(get_args(Modality))}")
    if case.other.get("split", "train") not in SPLITS:
        faults.append(f"split {case.other['split']!r} is none of {', '.join(SPLITS)}")
    if not isinstance(case.other.get("synthesise", False), bool):
        faults.append(f"synthesise {case.other['synthesise']!r} is neither true nor false")
    absent = case.other.get("absent", [])
    if not isinstance(absent, (list, tuple)) or not all(isinstance(label, str) for label in absent):
        faults.append(f"absent {absent!r} is not a list of names")
    elif both := sorted(set(absent) & set(case.labels)):
        faults.append(f"{', '.join(both)} cannot be annotated and absent at once")
    if faults:
        accepted = f"modality, split ({', '.join(SPLITS)}), absent (names) and synthesise (true or false) as documented"
        raise DataError(str(case.image), "; ".join(faults), accepted, "correct the line")


# -- keys --------------------------------------------------------------------------------------------------------------


def _key(case: Case, preprocessing: Mapping[str, Any]) -> str:
    """SHA-256 over everything that the entry's arrays and numbers depend on."""
    files = case.other.get("mask")
    values = case.other.get("mask_values", case.other.get("label_values"))
    named = sorted(files.items()) if isinstance(files, Mapping) else [("mask", case.mask)] if case.mask is not None else []
    identity = {
        "format": FORMAT,
        "image": _hash(case.image),
        "masks": {str(label): _hash(Path(file)) for label, file in named},
        "values": _hash(Path(values)) if isinstance(values, str) else values,
        **_names_beside(case, values),
        "labels": case.labels,
        "modality": case.modality,
        "frame": case.frame,
        "series": case.series,
        "synthesise": case.other.get("synthesise", False),
        "orientation": _orientation(case, preprocessing),
        "spacing_mm": _spacing(case, preprocessing),
        "intensity": repr(rule_of(preprocessing)),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _names_beside(case: Case, values: Any) -> dict[str, str]:
    """The hash of the table that names a label map's values, where there is one and nothing goes before it."""
    table = Path(case.mask).parent / BESIDE if case.mask is not None and values is None else None
    return {"names": _hash(table)} if table is not None and table.is_file() else {}


def _hash(path: Path) -> str:
    existing_path(path, "an existing image or mask; paths count from the list")
    if path.is_dir():
        return sha256_of(path)
    return "".join(_hash_of(file, (status := file.stat()).st_size, status.st_mtime_ns) for file in files_of(path))


@functools.lru_cache(maxsize=4096)
def _hash_of(path: Path, size: int, modified: int) -> str:  # size and time show whether the file is still the same
    return sha256_of(path)


def _orientation(case: Case, preprocessing: Mapping[str, Any]) -> str:
    return case.orientation_code or str(preprocessing.get("orientation", "RAS"))


def _spacing(case: Case, preprocessing: Mapping[str, Any]) -> tuple[float, float, float]:
    return spacing_for(preprocessing.get("spacing_mm", NETWORK_SPACING_MM), case.modality, where="preprocessing: spacing_mm")


# -- building ----------------------------------------------------------------------------------------------------------


def _build_entry(folder: Path, key: str, case: Case, preprocessing: Mapping[str, Any]) -> None:
    volume = read_volume(case.image, frame=case.frame, series=case.series)
    masks = read_masks(case, volume)
    image: Array | None = None
    air, notes = 0.0, (*volume.notes, *masks.notes)
    if case.other.get("synthesise", False):
        path = _path_of_codes(volume, masks, case, preprocessing)
    else:
        prepared = prepare(
            volume,
            case.modality,  # type: ignore[arg-type]
            orientation_code=_orientation(case, preprocessing),
            spacing_mm=_spacing(case, preprocessing),
            rule=rule_of(preprocessing),
        )
        path, air, notes = prepared.path, prepared.intensity.air, (*prepared.notes, *masks.notes)
        image = prepared.pixels[0].numpy().astype(np.float16)
    codes = codes_on_grid(masks.codes, path)
    facts = _facts(codes, masks.members)
    if not facts["boxes"]:
        fix = "check `mask_values`, and that the mask belongs to this image"
        raise DataError(str(case.image), "none of its labels has a voxel", "a mask with at least one label in it", fix)
    sizes = {"codes": _save(folder / f"{key}.codes.npy", codes)}
    if image is not None:
        sizes["image"] = _save(folder / f"{key}.image.npy", image)
    record = {"schema": FORMAT, "bytes": sizes, "shape": list(codes.shape), "affine": path.network_affine.tolist(), "air": air}
    write_json(folder / f"{key}.json", {**record, "members": masks.members, **facts, "notes": list(notes)})


def _path_of_codes(volume: Volume, masks: LabelMap, case: Case, preprocessing: Mapping[str, Any]) -> GridPath:
    """The way of a label map that has no image: the crop is its own box with a margin."""
    turn = reorientation_to(_orientation(case, preprocessing), volume.affine, volume.shape)
    change = resampling_to(_spacing(case, preprocessing), turn.apply_to_affine(volume.affine), turn.new_shape)
    whole = GridPath(volume.affine, turn, change, Crop((0, 0, 0), change.new_shape))
    box = bounding_box(codes_on_grid(masks.codes, whole) > 0)
    if box is None:
        raise DataError(str(case.image), "an empty label map", "a label map to synthesise an image from", "check the file")
    start = tuple(max(a - _MARGIN, 0) for a in box.start)
    stop = tuple(min(b + _MARGIN, n) for b, n in zip(box.stop, change.new_shape, strict=True))
    return GridPath(volume.affine, turn, change, Crop(start, stop))  # type: ignore[arg-type]


def codes_on_grid(codes: Array, path: GridPath) -> Array:
    """A label map taken along the way of its image: the nearest voxel, no interpolation."""
    turned = path.reorientation.apply(codes)
    change = path.resampling
    index = [_nearest(change.new_shape[a], change.step[a], change.shape[a])[path.crop.start[a] : path.crop.stop[a]] for a in range(3)]
    return np.ascontiguousarray(turned[np.ix_(*index)])


def _nearest(count: int, step: float, size: int) -> Array:
    return np.asarray(np.clip(np.rint(np.arange(count) * step), 0, size - 1), np.int64)


def _facts(codes: Array, members: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Boxes, voxel numbers and sample voxels of all labels that have any."""
    counts = np.bincount(codes.reshape(-1), minlength=int(codes.max(initial=0)) + 1)
    slices = scipy.ndimage.find_objects(codes)
    rng = np.random.default_rng(_SEED)
    boxes, points, voxels = {}, {}, {}
    for label, values in members.items():
        here = [v for v in values if v < len(counts) and counts[v]]
        if here:
            corners = [[(s.start, s.stop) for s in slices[v - 1]] for v in here]
            start = [min(c[a][0] for c in corners) for a in range(3)]
            stop = [max(c[a][1] for c in corners) for a in range(3)]
            boxes[label] = [start, stop]
            voxels[label] = int(counts[here].sum())
            points[label] = _sample(codes, here, start, stop, rng)
    return {"boxes": boxes, "voxels": voxels, "points": points}


def _sample(codes: Array, values: Sequence[int], start: Sequence[int], stop: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    table = np.zeros(int(codes.max()) + 1, np.bool_)
    table[list(values)] = True
    part = codes[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    inside = np.flatnonzero(table[part])
    chosen = rng.choice(inside, min(_POINTS, len(inside)), replace=False)
    return (np.stack(np.unravel_index(np.sort(chosen), part.shape), axis=1) + np.asarray(start)).tolist()  # type: ignore[no-any-return]


def _save(path: Path, array: Array) -> int:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    return path.stat().st_size


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_entry(folder: Path, key: str, case: Case, name: str) -> CachedCase | None:
    """The entry, or None where it is not there, cut off, or unreadable."""
    try:
        record = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        for part, size in record["bytes"].items():
            if (folder / f"{key}.{part}.npy").stat().st_size != size:
                return None
        return CachedCase(
            key=key,
            folder=folder,
            name=name,
            dataset=case.dataset or "",
            patient=str(case.other.get("patient", name)),
            modality=case.modality,
            labels=case.labels,
            absent=tuple(case.other.get("absent", ())),
            members={label: tuple(codes) for label, codes in record["members"].items()},
            shape=_triple(record["shape"]),
            affine=np.asarray(record["affine"], float),
            air=float(record["air"]),
            boxes={label: (_triple(a), _triple(b)) for label, (a, b) in record["boxes"].items()},
            points={label: tuple(_triple(p) for p in found) for label, found in record["points"].items()},
            voxels={label: int(count) for label, count in record["voxels"].items()},
            synthesise=bool(case.other.get("synthesise", False)),
            split=str(case.other.get("split", "train")),
            notes=tuple(record["notes"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _triple(values: Sequence[int]) -> Shape:
    x, y, z = (int(v) for v in values)
    return x, y, z


@functools.lru_cache(maxsize=512)
def _mapped(path: Path) -> Array:
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
