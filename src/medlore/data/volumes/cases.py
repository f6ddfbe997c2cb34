"""The list of cases: one JSON object per line, as LoRKD and SAT publish it.

``{"image": "ct.nii.gz", "label": ["liver", "spleen"], "modality": "ct", "dataset": "AMOS22_CT_abdomen"}``

`image`, `label` and `modality` are needed. `dataset`, `orientation_code` (the network's orientation, RAS unless given),
`mask` (a reference label map, a folder with one file per label, or {label: file}; `mask_values` gives the values of a map,
inline or as a JSON file's name), `frame` (which volume of a 4D file) and `series` (which DICOM series) may be there; other
keys are kept. Paths may be relative to the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlore.data.formats import stem_of
from medlore.errors import DataError, MedloreError, StepError, reason_of
from medlore.files import existing_file, write_text

# what else lies in a folder of results
RESERVED = ("report.json", "report.cases.jsonl", "statistics.csv", "statistics.json", "shards", "page.html", "evaluation")
_LONGEST = 230  # bytes of a folder's name
_TEXT_FIELDS = ("dataset", "orientation_code", "series")


@dataclass(frozen=True)
class Case:
    """One image and what is to be found in it.

    Args:
        image: file or folder.
        labels: prompts, in the order of the label map's values.
        modality: as written.
        dataset: the published data set's name; it may choose the expert.
        orientation_code: the orientation in which the network sees the volume.
        mask: reference label map.
        frame: which volume of a 4D file.
        series: which DICOM series of a folder.
        line: line of the jsonl, from 1; 0 without one.
        other: further keys, kept as they are.
    """

    image: Path
    labels: tuple[str, ...]
    modality: str
    dataset: str | None = None
    orientation_code: str | None = None
    mask: Path | None = None
    frame: int | None = None
    series: str | None = None
    line: int = 0
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the image without its suffixes.

        Examples:
            >>> Case(Path("a/ct.nii.gz"), ("liver",), "ct").name
            'ct'
        """
        return stem_of(self.image.name).lstrip(".") or "image"  # `..` would lead out of the output folder

    def to_dict(self) -> dict[str, Any]:
        """The line's values."""
        values = {
            "image": str(self.image), "label": list(self.labels), "modality": self.modality, "dataset": self.dataset,
            "orientation_code": self.orientation_code, "mask": None if self.mask is None else str(self.mask),
            "frame": self.frame, "series": self.series,
        }  # fmt: skip
        return {**{k: v for k, v in values.items() if v is not None}, **self.other}


def read_cases(path: str | Path) -> list[Case]:
    """All cases of a jsonl file.

    Raises:
        DataError: some lines are broken; every one is named with its number. Missing images are not a fault of the list:
            they fail when their turn comes.
    """
    path = existing_file(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # no other character ends a line of JSON
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"not UTF-8 text ({error})", "a jsonl file", "name the list of cases, not an image") from error
    cases: list[Case] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _line_faults(line)
        faults += [f"line {number}: {fault}" for fault in found]
        if not found:
            cases.append(_case_of(json.loads(line), path.parent, number))
    if not cases and not faults:
        faults = ["no line holds a case"]
    if faults:
        accepted = 'one JSON object per line with "image", "label" (a list of names) and "modality"'
        raise DataError(str(path), f"{len(faults)} fault(s)", accepted, "correct the lines that are listed", faults=faults)
    return cases


def write_cases(path: str | Path, cases: Iterable[Case]) -> Path:
    """Write a jsonl file."""
    return write_text(path, "".join(json.dumps(case.to_dict(), ensure_ascii=False) + "\n" for case in cases))


def folder_names(cases: Sequence[Case]) -> list[str]:
    """A folder name for each case: the image's name, with its folder's name or a number where two share it, none longer than 240 bytes.

    Examples:
        >>> folder_names([Case(Path("a/ct.nii"), (), "ct"), Case(Path("b/ct.nii"), (), "ct"), Case(Path("b/mr.nii"), (), "mri")])
        ['a_ct', 'b_ct', 'mr']
    """
    short = [_shortened(case.name) for case in cases]
    count = Counter(name.casefold() for name in short)
    pairs = zip(cases, short, strict=True)
    wanted = [name if count[name.casefold()] == 1 else _shortened(f"{_folder_of(case.image)}_{name}") for case, name in pairs]
    used = set(RESERVED)
    names = []
    for name in wanted:
        numbered = (name if number == 1 else f"{name}_{number}" for number in itertools.count(1))
        names.append(next(candidate for candidate in numbered if candidate.casefold() not in used))
        used.add(names[-1].casefold())
    return names


def _folder_of(image: Path) -> str:
    try:
        return image.resolve().parent.name
    except (OSError, ValueError, RuntimeError):  # no name that the system takes: the case fails when its turn comes
        return image.parent.name


def _shortened(name: str) -> str:
    """A name that leaves room for a number and for what is put before it while the folder is made, unique by its hash."""
    if len(_bytes(name)) <= _LONGEST:
        return name
    mark, kept = hashlib.sha256(_bytes(name)).hexdigest()[:8], name
    while len(_bytes(kept)) > _LONGEST - 9:
        kept = kept[:-1]
    return f"{kept}-{mark}"


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


@contextmanager
def only_known_faults(image: Path) -> Iterator[None]:
    """Whatever goes wrong with a case inside, also in a library, is a `MedloreError` that names its image: others can go on."""
    try:
        yield
    except MedloreError:
        raise
    except MemoryError as error:
        accepted, fix = "a case that fits the memory", "give a smaller --memory, so that labels go in smaller groups, or fewer --workers"
        raise StepError(str(image), "out of memory", accepted, fix) from error
    except OSError as error:
        place = str(error.filename or image)
        raise DataError(place, error.strerror or str(error), "files that can be read", "check the name and its permissions") from error
    except Exception as error:
        raise DataError(
            str(image), f"cannot be used ({reason_of(error)})", "a sound image, and masks of it", "look at the file, or convert it"
        ) from error


def _line_faults(line: str) -> list[str]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"not JSON ({error.msg} at character {error.pos + 1})"]
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested without end
        return [f"not JSON that can be read ({error})"]
    if not isinstance(value, dict):
        return [f"a {type(value).__name__}, not an object"]
    faults = [f'no "{name}"' for name in ("image", "modality") if not isinstance(value.get(name), str) or not value[name].strip()]
    faults += _label_faults(value.get("label"))
    faults += [f'"{name}" is not text' for name in _TEXT_FIELDS if not isinstance(value.get(name), (str, type(None)))]
    faults += _mask_faults(value.get("mask"))
    if not (value.get("frame") is None or (isinstance(value["frame"], int) and not isinstance(value["frame"], bool))):
        faults.append('"frame" is not a whole number')
    return faults


def _mask_faults(mask: Any) -> list[str]:
    by_label = isinstance(mask, dict) and bool(mask) and all(isinstance(file, str) for file in mask.values())
    return [] if mask is None or isinstance(mask, str) or by_label else ['"mask" is not text, nor {label: file}']


def _label_faults(labels: Any) -> list[str]:
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        return ['"label" is not a list of names']
    twice = [label for label, count in Counter(_spelling(label) for label in labels).items() if count > 1]
    return [f"label {label!r} comes twice" for label in twice]


def _spelling(label: str) -> str:
    return " ".join(label.replace("_", " ").split()).casefold()


def _case_of(value: dict[str, Any], folder: Path, line: int) -> Case:
    known = {"image", "label", "modality", "dataset", "orientation_code", "mask", "frame", "series"}
    mask = value.get("mask")
    other = {k: v for k, v in value.items() if k not in known}
    if isinstance(mask, dict):  # one file per label: it stays among the other keys
        other["mask"] = {label: str(folder / file) for label, file in mask.items()}
    if isinstance(other.get("mask_values"), str):
        other["mask_values"] = str(folder / other["mask_values"])
    return Case(
        image=folder / value["image"],  # an absolute path stays as it is
        labels=tuple(" ".join(label.split()) for label in value["label"]),
        modality=value["modality"],
        dataset=value.get("dataset"),
        orientation_code=value.get("orientation_code"),
        mask=folder / mask if isinstance(mask, str) else None,
        frame=value.get("frame"),
        series=value.get("series"),
        line=line,
        other=other,
    )
