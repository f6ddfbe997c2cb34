"""What the shots chose, kept in the run's folder: a run that goes on after a kill goes on with the same choice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from medlore.data.images.splits import ImageSplits
from medlore.errors import CheckpointError
from medlore.files import read_json, write_json
from medlore.models.backbones.cutting import Cut
from medlore.training.watching import Watcher
from medlore.tuning.choosing import choose_on_shots
from medlore.tuning.facts import content_hash
from medlore.tuning.preparing import Workshop
from medlore.tuning.probing import Reading, all_labels
from medlore.tuning.settings import FinetuneSettings

CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class Chosen:
    """The run that follows a choice.

    Attributes:
        settings: with method, rate and length decided.
        splits: all labelled images train.
        reading: where the head reads.
        report: candidates and their estimates.
    """

    settings: FinetuneSettings
    splits: ImageSplits
    reading: Reading
    report: dict[str, Any]


def chosen_once(
    settings: FinetuneSettings, splits: ImageSplits, folder: Path | None, workshop: Workshop, *, resume: bool, watcher: Watcher
) -> Chosen | None:
    """Choose on all labelled images, or read what an earlier, killed run chose; None where nothing is to be chosen.

    Raises:
        InputError: the budget is too small for one fold.
        CheckpointError: the choice in the folder belongs to another run.
    """
    if not settings.chosen_on_shots():
        return None
    images = all_labels([splits.train, splits.validation])
    parts = ImageSplits(images, None, splits.test, splits.notes)
    facts = [settings.decisive(), content_hash(images)]
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = None if folder is None else folder / CHOICE_FILE
    if resume and file is not None and file.is_file():
        return _read(file, fingerprint, parts)
    found = choose_on_shots(settings, images, workshop, watcher=watcher)
    if file is not None and workshop.accelerator.is_main_process:
        cut = found.reading.cut
        write_json(
            file,
            {
                "fingerprint": fingerprint,
                "settings": found.settings.flat(stated=True, json=True),
                "cut": None if cut is None else [cut.block, cut.reading],
                "held_out": found.reading.held_out,
                "report": found.report,
            },
        )
    return Chosen(found.settings, parts, found.reading, found.report)


def _read(file: Path, fingerprint: str, parts: ImageSplits) -> Chosen:
    content = read_json(file)
    if not isinstance(content, dict) or content.get("fingerprint") != fingerprint:
        raise CheckpointError(
            str(file), "a choice of other settings or data", "the choice of this very run", "start again without --resume"
        )
    try:
        cut = None if content["cut"] is None else Cut(*content["cut"])
        settings = FinetuneSettings.model_validate(content["settings"])
        return Chosen(settings, parts, Reading(cut, content["held_out"]), content["report"])
    except (KeyError, TypeError, pydantic.ValidationError) as error:
        raise CheckpointError(str(file), "a damaged choice", "the file as it was written", "start again without --resume") from error
