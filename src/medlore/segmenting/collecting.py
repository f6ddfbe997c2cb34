"""The cases of a run: a list, a folder of volumes, a series, or one image, under what the flags say for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medlore.data.formats import find_images, modality_of
from medlore.data.volumes.cases import Case, read_cases
from medlore.errors import InputError
from medlore.files import existing_path
from medlore.segmenting.settings import SegmentSettings


def collect_cases(settings: SegmentSettings) -> list[Case]:
    """All cases of a run.

    Raises:
        InputError: neither or both of a list and an image; no labels; no modality; nothing in a folder.
        DataError: broken lines in a jsonl.
    """
    if (settings.cases is None) == (settings.image is None):
        came = "neither a list of cases nor an image" if settings.cases is None else "a list of cases and an image"
        raise InputError("segment", came, "one of them", "give cases.jsonl, or --image FILE --labels NAMES --modality ct")
    source = existing_path(settings.cases or settings.image or Path(), "a jsonl, an image, or a folder of them")
    if source == settings.cases and source.is_file() and source.suffix.casefold() in (".jsonl", ".json"):
        return [_with_flags(case, settings) for case in read_cases(source)]
    images = (find_images(source) or [source]) if source.is_dir() else [source]
    if not settings.labels:
        fix = "give --labels liver,spleen, a region's name, or all"
        raise InputError("--labels", "none were given", "names of structures, beside an image or a folder", fix)
    modality = settings.modality or _modality_recorded_by(source)
    return [Case(image, settings.labels, modality, frame=settings.frame, series=settings.series) for image in images]


def _with_flags(case: Case, settings: SegmentSettings) -> Case:
    """A line of a list under what the flags say for all lines; its own frame and series stay."""
    frame = settings.frame if case.frame is None else case.frame
    labels, modality = settings.labels or case.labels, settings.modality or case.modality
    return replace(case, labels=labels, modality=modality, frame=frame, series=case.series or settings.series)


def _modality_recorded_by(source: Path) -> str:
    found = modality_of(source)
    if found is not None:
        return found
    raise InputError("--modality", "none was given", "ct, mri, pet or us", "give --modality; only DICOM files record it")
