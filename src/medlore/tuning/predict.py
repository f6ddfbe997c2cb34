"""Scores for unlabelled images: files, folders and archives, in whatever format they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from medlore.data.images.imageset import ImageItem, ImageSet
from medlore.data.images.lists import MEDFMC_CLASSES, MedfmcName
from medlore.data.images.pixels import check_pixels
from medlore.data.images.submission import write_submission
from medlore.data.images.trees import is_image, tree_of
from medlore.errors import InputError, StepError
from medlore.files import made_folder
from medlore.training.accelerator import make_accelerator
from medlore.tuning.evaluate import score_images
from medlore.tuning.predictions import write_predictions
from medlore.tuning.scoring_settings import PredictSettings
from medlore.tuning.tuned import TunedCard, load_tuned


@dataclass(frozen=True)
class Predicted:
    """Images with their scores, and the files that could not be read."""

    images: ImageSet
    scores: NDArray[np.float32]  # b c
    faults: tuple[str, ...] = ()


def predict(tuned: str | Path, sources: Sequence[str | Path], out: str | Path, settings: PredictSettings | None = None) -> Predicted:
    """Score images and write one table.

    Args:
        tuned: run folder of `medlore finetune`, or the adapter in it.
        sources: image files, folders or zips (searched to their depths), or a text file with one image name a line.
        out: the CSV.
        settings: device and what to do about bad images.

    Raises:
        InputError: no such model or image.
        DataError: images that cannot be read; all are named.
        StepError: not one image could be read.
    """
    settings = settings or PredictSettings()
    if Path(out).is_dir():
        raise InputError(f"--out {out}", "is a folder", "the CSV that is to be written", "name a file in it")
    made_folder(Path(out).parent)
    loaded = load_tuned(tuned, model=settings.model)
    _check_challenge(settings, loaded.card)
    images = gather_images(sources, loaded.card)
    faults: tuple[str, ...] = ()
    if settings.keep_going:
        images, faults = _readable(images)
    scores = score_images(loaded, images, accelerator=make_accelerator(settings.device, settings.precision, None))
    write_predictions(out, images, scores)
    return Predicted(images, scores, faults)


def _check_challenge(settings: PredictSettings, card: TunedCard) -> None:
    """The challenge's file has one column per class; that is known before anything is scored."""
    if settings.medfmc is None:
        return
    dataset = cast("MedfmcName", settings.medfmc.split(":")[0])
    wanted = MEDFMC_CLASSES[dataset]
    if len(card.classes) != len(wanted):
        raise InputError(
            "--medfmc",
            f"{settings.medfmc!r} with a model of {len(card.classes)} classes",
            f"a model of the {len(wanted)} of {dataset}",
            "name the data set that it was tuned for",
        )


def gather_images(sources: Sequence[str | Path], card: TunedCard) -> ImageSet:
    """All images of files, folders, zips and lists, in the order given; a folder's in the order of their names.

    Raises:
        InputError: a source that is not there, or no image at all; all faults at once.
    """
    items: list[ImageItem] = []
    faults: list[str] = []
    for source in map(Path, sources):
        if not (source.is_file() or source.is_dir()):
            faults.append(f"{source}: {'is a device or a pipe' if source.exists() else 'no such file or folder'}")
        elif source.suffix.lower() == ".txt":
            items += _listed(source, faults)
        elif source.is_dir() or source.suffix.lower() == ".zip":
            tree = tree_of(source)
            found = [name for name in tree.names if is_image(tree, name)]
            items += [ImageItem(f"{source.name}/{name}" if len(sources) > 1 else name, tree.source(name), ()) for name in found]
            if not found:
                faults.append(f"{source}: no images in it")
        else:
            items.append(ImageItem(source.name if len(sources) == 1 else str(source), source, ()))
    if faults or not items:
        raise InputError(
            "IMAGES",
            f"{len(faults)} fault{'s' * (len(faults) > 1)}" if faults else "nothing",
            "image files, folders, zips or a .txt list",
            "correct them",
            faults=faults,
        )
    return ImageSet("images", card.classes, card.task, tuple(items), ", ".join(map(str, sources)))


def write_medfmc(predicted: Predicted, folder: str | Path, challenge: str) -> Path:
    """The challenge's result file of these predictions, in their order; `challenge` is e.g. `endo:5`."""
    dataset, shots = challenge.split(":")
    names = [Path(item.key).name for item in predicted.images.items]
    kind = cast("MedfmcName", dataset)
    return write_submission(folder, dataset=kind, shots=int(shots), files=names, scores=predicted.scores)


def _listed(file: Path, faults: list[str]) -> list[ImageItem]:
    """One image a line, beside the list or in `images/` beside it; order is kept."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        places = [file.parent / name, file.parent / "images" / name, Path(name)]
        place = next((p for p in places if p.is_file()), None)
        if place is None:
            faults.append(f"{file}, line {number}: no file {name!r} beside the list or in images/")
        else:
            found.append(ImageItem(name, place, ()))
    return found


def _readable(images: ImageSet) -> tuple[ImageSet, tuple[str, ...]]:
    kept, faults = [], []
    for item in images.items:
        fault = check_pixels([item])
        faults += fault
        kept += [] if fault else [item]
    if not kept:
        raise StepError("IMAGES", "not one image can be read", "at least one", "check the files", faults=faults)
    return replace(images, items=tuple(kept)), tuple(faults)
