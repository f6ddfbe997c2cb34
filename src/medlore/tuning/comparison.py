"""Tuning methods side by side on the same few-shot draws: one cell is one method on one draw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medlore.data.images.fewshot import draw_shots
from medlore.data.images.imageset import ImageSet
from medlore.errors import InputError, UnknownNameError
from medlore.metrics.draws import DrawMean, mean_difference, mean_of_draws
from medlore.tuning.finetune import finetune
from medlore.tuning.idle_settings import without_idle
from medlore.tuning.settings import FinetuneSettings

# name in tables -> what it changes in the settings; `equal` is the one rank with about the parameters of the stable ranks
CONTENDERS: dict[str, Mapping[str, Any]] = {
    "sr-lora": {"method": "sr-lora"},
    "sr-lora nested": {"method": "sr-lora", "partial_update": "nested"},
    "lora": {"method": "lora", "rank": "equal"},
    "rslora": {"method": "rslora", "rank": "equal"},
    "linear-probe": {"method": "linear-probe"},
    "full": {"method": "full"},
}


@dataclass(frozen=True)
class Cell:
    """What one method reached on one draw.

    Attributes:
        contender: name of the method in tables.
        shots: labelled images per class.
        draw: number of the draw, from 1.
        score: test score; None where it is not defined.
        measure: name of that score.
        majority: the same score of a constant answer.
        trained: parameters that were trained, the head included.
        factors: parameters of the low-rank factors; None for methods without.
        learning_rate: peak rate.
        train_images: images that were learnt from.
        test_images: images that judged.
        seconds: wall time.
    """

    contender: str
    shots: int
    draw: int
    score: float | None
    measure: str
    majority: float | None
    trained: int
    factors: int | None
    learning_rate: float
    train_images: int
    test_images: int
    seconds: float


def run_cell(contender: str, settings: FinetuneSettings, *, pool: ImageSet, test: ImageSet, shots: int, draw: int) -> Cell:
    """Tune one method on one draw of `pool` and measure it on `test`.

    All labelled images train and the last epoch is kept: with five images per class there are none to spare for validation.

    Args:
        contender: a key of `CONTENDERS`.
        settings: model and training. The method is the contender's; seeds of head, factors and order are the number of the draw,
            so that all contenders of a draw share them.
        pool: images to draw from.
        test: images that judge.
        shots: labelled images per class; multi-label sets take what a rare class has.
        draw: number of the draw, from 1.

    Raises:
        UnknownNameError: no such contender.
        DataError: a class with too few images.
    """
    if contender not in CONTENDERS:
        raise UnknownNameError("contender", contender, CONTENDERS)
    begun = time.perf_counter()
    drawn = draw_shots(pool, shots=shots, draw=draw, seed=settings.parts.data_seed).train
    changes = {**CONTENDERS[contender], "shots": None, "seed": draw, "bootstrap": 0, "checkpoints": False}
    result = finetune(without_idle(settings.changed(**changes)), train=drawn, test=test)
    report, measure = result.report, measure_of(test)
    return Cell(
        contender=contender,
        shots=shots,
        draw=draw,
        score=result.metrics[measure],
        measure=measure,
        majority=report["test"]["majority"][measure],
        trained=report["trainable_parameters"],
        factors=report["factor_parameters"],
        learning_rate=report["learning_rate"],
        train_images=len(drawn),
        test_images=len(test),
        seconds=round(time.perf_counter() - begun, 2),
    )


def measure_of(images: ImageSet) -> str:
    """Macro AUC for several labels an image, balanced accuracy for one."""
    return "balanced_accuracy" if images.task == "single" else "macro_auc"


@dataclass(frozen=True)
class Standing:
    """One method over all draws of one number of shots.

    Attributes:
        contender: name of the method.
        score: mean over draws.
        difference: of the reference method minus this one, draw by draw; None for the reference itself.
        trained: parameters that were trained.
        factors: parameters of the low-rank factors.
    """

    contender: str
    score: DrawMean
    difference: DrawMean | None
    trained: int
    factors: int | None


def standings(cells: Sequence[Cell], *, reference: str = "sr-lora") -> list[Standing]:
    """Means and paired differences of cells of one data set and one number of shots, in the order in which methods first appear.

    A draw on which the score of a method is not defined is left out of its mean and of its differences.

    Raises:
        InputError: cells of several numbers of shots.
    """
    if len({cell.shots for cell in cells}) > 1:
        raise InputError("cells", "several numbers of shots", "cells of one table", "separate them by shots")
    first: dict[str, Cell] = {}
    scores: dict[str, dict[int, float]] = {}
    for cell in cells:
        if cell.score is not None:
            first.setdefault(cell.contender, cell)
            scores.setdefault(cell.contender, {})[cell.draw] = cell.score
    found = []
    for name, own in scores.items():
        best = scores.get(reference, {})
        shared = sorted(own.keys() & best.keys()) if name != reference else []
        difference = mean_difference([best[d] for d in shared], [own[d] for d in shared]) if shared else None
        found.append(Standing(name, mean_of_draws(list(own.values())), difference, first[name].trained, first[name].factors))
    return found


def compare(
    contenders: Sequence[str],
    settings: FinetuneSettings,
    *,
    pool: ImageSet,
    test: ImageSet,
    shots: int,
    draws: int,
    watch: Callable[[Cell], None] = lambda _: None,
) -> list[Cell]:
    """All contenders on draws 1 to `draws`.

    Args:
        contenders: keys of `CONTENDERS`.
        settings: as for `run_cell`.
        pool: images to draw from.
        test: images that judge.
        shots: labelled images per class.
        draws: how many.
        watch: hears of every finished cell.
    """
    cells = []
    for draw in range(1, draws + 1):
        for contender in contenders:
            cells.append(run_cell(contender, settings, pool=pool, test=test, shots=shots, draw=draw))
            watch(cells[-1])
    return cells
