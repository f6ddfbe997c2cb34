"""Several methods on the same images: one run each, the backbone read and its features computed once, one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlore.data.images.imageset import ImageSet
from medlore.data.images.splits import ImageSplits
from medlore.errors import InputError, nearest_names
from medlore.files import made_folder
from medlore.layers.tuning.methods import METHODS
from medlore.models.backbones.store import BackboneStore
from medlore.runs.report import Run
from medlore.training.watching import Watcher
from medlore.tuning.facts import score_name
from medlore.tuning.finetune import finetune, splits_of
from medlore.tuning.idle_settings import without_idle
from medlore.tuning.settings import AUTO, FinetuneSettings


@dataclass(frozen=True)
class SideBySide:
    """Methods on the same images.

    Attributes:
        measure: of the scores.
        images: test images.
        majority: what a constant answer reaches.
        probe: score of the logistic regression on the frozen features, with its interval.
        rows: one a method: `method`, `score` with its interval, `difference` from that regression with its interval, `trained_parameters`,
            `seconds`.
        verdict: in a sentence.
    """

    measure: str
    images: int
    majority: float | None
    probe: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""


def known_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The methods of a list, found without regard to case.

    Raises:
        InputError: unknown ones, all at once, none, or one twice.
    """
    known = {name.casefold(): name for name in (*METHODS, AUTO)}
    faults = [
        f"{name}: no such method; the nearest are {', '.join(nearest_names(name, known))}" for name in names if name.casefold() not in known
    ]
    found = [known.get(name.casefold(), name) for name in names]
    faults += [f"{name}: named twice" for name in dict.fromkeys(found) if found.count(name) > 1]
    if faults or not names:
        raise InputError(
            "--compare", f"{len(faults)} faults" if faults else "no method", "methods of `medlore finetune`", "correct them", faults=faults
        )
    return tuple(found)


def compare_methods(
    settings: FinetuneSettings,
    methods: Sequence[str],
    out: str | Path | None = None,
    *,
    train: ImageSet | None = None,
    validation: ImageSet | None = None,
    test: ImageSet | None = None,
    watcher: Watcher | None = None,
) -> SideBySide:
    """Run each method on the same parts and put the results beside each other.

    Args:
        settings: for all; what acts on nothing in a method is left out for it.
        methods: names.
        out: gets a folder for each method and a report; None keeps everything in memory.
        train: images in memory, as for `finetune`.
        validation: likewise.
        test: likewise.
        watcher: looks on.

    Raises:
        InputError: unknown methods, no test images, wrong settings or data.
    """
    names, watcher = known_methods(methods), watcher or Watcher()
    store = BackboneStore()
    splits = splits_of(settings, train, validation, test)
    if splits.test is None:
        raise InputError("--compare", "no test images", "images that judge", "give --test-data, or a --test-fraction above 0")
    folder = None if out is None else made_folder(out)
    if folder is None:
        return _compared(settings, names, splits, None, store, watcher)
    with Run("finetune", folder, settings=settings, seed=settings.training.seed) as run:
        found = _compared(settings, names, splits, folder, store, watcher)
        run.results |= {
            "verdict": found.verdict,
            "table": found.rows,
            "measure": found.measure,
            "probe": found.probe,
            "notes": list(splits.notes),
        }
        for row in found.rows:
            run.add_output(row["method"], folder / row["method"])
    return found


def _compared(
    settings: FinetuneSettings, names: Sequence[str], splits: ImageSplits, folder: Path | None, store: BackboneStore, watcher: Watcher
) -> SideBySide:
    assert splits.test is not None  # noqa: S101  # nosec B101 # asked by the caller
    # parts are made: nothing may be drawn or held out again
    plain = settings.changed(shots=None, validation_fraction=0.0, test_fraction=0.0)
    rows: list[dict[str, Any]] = []
    probe: dict[str, Any] = {}
    majority, measure = None, score_name(splits.train)
    for name in names:
        begun = time.perf_counter()
        watcher.note(f"{name} ({len(rows) + 1} of {len(names)})")
        own = without_idle(plain.changed(method=name))
        place = None if folder is None else folder / name
        result = finetune(own, place, train=splits.train, validation=splits.validation, test=splits.test, watcher=watcher, backbones=store)
        report = result.report
        majority, probe = report["test"]["majority"][measure], report["probe"]["test"]["metrics"][measure]
        rows.append(
            {
                "method": name,
                "score": report["test"]["metrics"][measure],
                "difference": report["probe"]["difference"],
                "trained_parameters": report["trainable_parameters"],
                "seconds": round(time.perf_counter() - begun, 1),
            }
        )
    return SideBySide(measure, len(splits.test), majority, probe, rows, _verdict(rows))


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Which methods are better than the regression, as far as the test images can show."""
    better = [row["method"] for row in rows if (row["difference"]["low"] or 0) > 0]
    worse = [row["method"] for row in rows if (row["difference"]["high"] or 0) < 0]
    words = []
    if better:
        words.append(f"Better than the logistic regression on the frozen features, as far as these images can show: {', '.join(better)}.")
    else:
        words.append(
            "No method is better than the logistic regression on the frozen features, as far as these images can show: use linear-probe."
        )
    if worse:
        words.append(f"Worse: {', '.join(worse)}.")
    return " ".join(words)
