"""One cell, in whatever process or machine it is: tune on validation images, train, look at the test images once."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from pathlib import Path
from typing import Any

from medlore.errors import MedloreError
from medlore.recipes.comparison import measure_of
from medlore.recipes.finetune import FinetuneResult, finetune
from medlore.recipes.finetune_settings import FinetuneSettings
from medlore.recipes.image_splits import ImageSplits
from medlore.recipes.run import peak_memory_bytes
from medlore.recipes.study.cells import StudyCell
from medlore.recipes.study.parts import parts_of


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
    settings = FinetuneSettings.model_validate(cell.settings)
    begun = time.perf_counter()
    trials = [{"learning_rate": rate, "validation": tried_on_validation(settings, parts, rate)} for rate in cell.rates[: _needed(cell)]]
    chosen = best_rate(trials) if trials else cell.rates[0]
    tuned = time.perf_counter()
    result = finetune(_at(settings, chosen), train=parts.train, validation=parts.validation, test=parts.test)
    return _facts(cell, parts, result) | {
        "learning_rate": chosen,
        "trials": trials,
        "tuning_seconds": round(tuned - begun, 2),
        "training_seconds": round(time.perf_counter() - tuned, 2),
    }


def _needed(cell: StudyCell) -> int:
    """How many trials: where there is nothing to choose from, none."""
    return len(cell.rates) if len(cell.rates) > 1 else 0


def tried_on_validation(settings: FinetuneSettings, parts: ImageSplits, rate: float) -> float | None:
    """Validation score of the best epoch at one learning rate; the run is not even given the test images."""
    result = finetune(_at(settings, rate), train=parts.train, validation=parts.validation, test=None)
    return best_validation(result)


def best_validation(result: FinetuneResult) -> float | None:
    """Validation score of the epoch that was kept."""
    scores = {epoch["epoch"]: epoch.get("validation_score") for epoch in result.history.epochs}
    value = scores.get(result.history.best_epoch)
    return None if value is None or not math.isfinite(value) else float(value)


def best_rate(trials: list[dict[str, Any]]) -> float:
    """The learning rate with the highest validation score, the first of equals.

    Example:
        >>> best_rate([{"learning_rate": 1e-3, "validation": 0.7}, {"learning_rate": 3e-3, "validation": 0.7}])
        0.001
    """
    return float(max(trials, key=lambda trial: -math.inf if trial["validation"] is None else trial["validation"])["learning_rate"])


def _at(settings: FinetuneSettings, rate: float) -> FinetuneSettings:
    return settings.model_copy(update={"learning_rate": rate})


def _facts(cell: StudyCell, parts: ImageSplits, result: FinetuneResult) -> dict[str, Any]:
    measure = measure_of(parts.train) if cell.measure == "auto" else cell.measure
    report = result.report
    images = {name: None if part is None else len(part) for name, part in vars(parts).items() if name in ("train", "validation", "test")}
    return {
        "measure": measure,
        "score": result.metrics[measure],
        "majority": report["test"]["majority"][measure],
        "metrics": result.metrics,
        "validation": best_validation(result),
        "trained_parameters": report["trainable_parameters"],
        "head_parameters": report["head_parameters"],
        "factor_parameters": report["factor_parameters"],
        "steps": report["steps"],
        "best_epoch": report["best_epoch"],
        "images": images,
        "test_sha256": report["data"]["test"]["sha256"],
        "train_sha256": report["data"]["train"]["sha256"],
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
