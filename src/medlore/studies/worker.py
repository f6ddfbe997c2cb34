"""One cell, in whatever process or machine it is: train at each learning rate, choose on validation, look at the test images once."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits
from medlore.errors import InputError, MedloreError
from medlore.metrics.classification import classification_report
from medlore.models.backbones.store import BackboneStore
from medlore.runs.report import peak_memory_bytes
from medlore.studies.cells import StudyCell
from medlore.studies.parts import parts_of
from medlore.tuning.comparison import measure_of
from medlore.tuning.examples import refuse_unreadable
from medlore.tuning.finetune import FinetuneResult, content_hash, finetune
from medlore.tuning.judging import HeldOutScores, judge
from medlore.tuning.settings import FinetuneSettings

BACKBONES = BackboneStore()  # of this process: its cells share what is read, none shares what is trained
_READABLE: set[str] = set()  # draws whose images have all been read once in this process


def work_on(cell: StudyCell, folder: str, threads: int) -> dict[str, Any]:
    """The record of a cell; whatever goes wrong in it becomes the reason of a record that says `failed`.

    Args:
        cell: what to run.
        folder: what paths of the data start from.
        threads: of torch in this process; 0 leaves them as they are.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    _forget_peak()
    begun = time.perf_counter()
    try:
        found = {"state": "done", **_measured(cell, folder)}
    except Exception as error:  # a cell may fail in any way without costing the others
        reason = str(error) if isinstance(error, MedloreError) else f"{type(error).__name__}: {error}"
        found = {"state": "failed", "reason": reason}
    gc.collect()
    seconds = round(time.perf_counter() - begun, 2)
    return record_of(cell) | found | {"seconds": seconds, "peak_memory_bytes": _peak(), "process": os.getpid()}


def lost_cell(job: tuple[Any, ...], reason: str) -> dict[str, Any]:
    """The record of a cell whose process died."""
    return record_of(job[0]) | {"state": "failed", "reason": reason}


def record_of(cell: StudyCell) -> dict[str, Any]:
    """What names a cell in `cells.jsonl`."""
    return {**cell.key, "fingerprint": cell.fingerprint}


def _measured(cell: StudyCell, folder: str) -> dict[str, Any]:
    parts = parts_of(cell.entry, cell.rules, folder, shots=cell.shots, draw=cell.draw)
    _read_once(parts)
    settings = FinetuneSettings.model_validate(cell.settings)
    best, trials = tried_on_validation(settings, parts, cell.rates)
    if parts.test is None:
        raise InputError(str(cell), "no test images", "a set with test images", "give test_data, or a test_fraction above 0")
    judged = judge(best.result.model, best.result.backbone, parts.test, settings=settings)
    return (
        _facts(cell, parts, best, judged)
        | _beside(cell, parts.test, best)
        | {
            "learning_rate": best.rate,
            "trials": trials,
            "tuning_seconds": round(sum(trial["seconds"] for trial in trials), 2),
            "training_seconds": best.seconds,
        }
    )


def _beside(cell: StudyCell, test: ImageSet, best: Trial) -> dict[str, Any]:
    """The same score of the logistic regression with the same labels, whether or not it is a contender."""
    reference = best.result.reference
    if reference is None:
        return {"probe": None}
    how: dict[str, Any] = {"classes": test.classes, "task": test.task, "groups": test.groups, "bootstrap": 0}
    report = classification_report(test.targets(), reference.ask(test), **how)
    return {"probe": report["metrics"][_measure(cell, test)]["value"]}


def _measure(cell: StudyCell, images: ImageSet) -> str:
    return measure_of(images) if cell.measure == "auto" else cell.measure


def _read_once(parts: ImageSplits) -> None:
    """Refuse a draw with images that cannot be read before anything is trained on it; a draw that could be read is known again."""
    there = [part for part in (parts.train, parts.validation, parts.test) if part is not None]
    key = " ".join(f"{part.source} {content_hash(part)}" for part in there)
    if key not in _READABLE:
        refuse_unreadable(*there)
        _READABLE.add(key)


@dataclass(frozen=True)
class Trial:
    """A training at one learning rate.

    Attributes:
        rate: peak learning rate.
        validation: score of the epoch that was kept; None where not defined, or without validation images.
        seconds: of the training.
        result: what it left.
    """

    rate: float
    validation: float | None
    seconds: float
    result: FinetuneResult

    def as_values(self) -> dict[str, Any]:
        """Plain values for the record of a cell."""
        return {"learning_rate": self.rate, "validation": self.validation, "seconds": self.seconds}


def tried_on_validation(settings: FinetuneSettings, parts: ImageSplits, rates: Sequence[float]) -> tuple[Trial, list[dict[str, Any]]]:
    """Train at each learning rate; the trial with the highest validation score, the first of equals, and what all of them found.

    No training is given the test images. The networks of the others are let go, so two are in memory at most.
    """
    best = _trial(settings, parts, rates[0])
    trials = [best.as_values()]
    for rate in rates[1:]:
        trial = _trial(settings, parts, rate)
        trials.append(trial.as_values())
        best = trial if _rated(trial) > _rated(best) else best
        del trial  # not kept beside the next one
    return best, trials


def _trial(settings: FinetuneSettings, parts: ImageSplits, rate: float) -> Trial:
    # without test images here, and perhaps without any for validation: nothing may be held out of the training images in their place
    given = settings.changed(learning_rate=rate, test_fraction=0.0, validation_fraction=0.0)
    begun = time.perf_counter()
    result = finetune(given, train=parts.train, validation=parts.validation, test=None, backbones=BACKBONES)
    return Trial(rate, best_validation(result), round(time.perf_counter() - begun, 2), result)


def _rated(trial: Trial) -> float:
    # the same share of right answers may differ in its last digit
    return -math.inf if trial.validation is None else round(trial.validation, 9)


def best_validation(result: FinetuneResult) -> float | None:
    """Validation score of the epoch that was kept."""
    scores = {epoch["epoch"]: epoch.get("validation_score") for epoch in result.history.epochs}
    value = scores.get(result.history.best_epoch)
    return None if value is None or not math.isfinite(value) else float(value)


def _facts(cell: StudyCell, parts: ImageSplits, best: Trial, judged: HeldOutScores) -> dict[str, Any]:
    measure = _measure(cell, parts.train)
    report = best.result.report
    images = {name: None if part is None else len(part) for name, part in vars(parts).items() if name in ("train", "validation", "test")}
    return {
        "measure": measure,
        "score": judged.metrics[measure],
        "majority": judged.report["majority"][measure],
        "metrics": judged.metrics,
        "validation": best.validation,
        "trained_parameters": report["trainable_parameters"],
        "head_parameters": report["head_parameters"],
        "factor_parameters": report["factor_parameters"],
        "steps": report["steps"],
        "best_epoch": report["best_epoch"],
        "images": images,
        "test_sha256": None if parts.test is None else content_hash(parts.test),
        "train_sha256": content_hash(parts.train),
    }


def _forget_peak() -> None:
    """From here on, the largest memory is that of this cell (Linux); elsewhere it is that of the process so far."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    import torch

    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    if on_device:
        return on_device
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes()
