"""The demo: ranks from weights alone, few-shot tuning with them, and segmentation by text, on what the installed packages bring along."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from rich.console import Console

from medlore.data.images.digits import digits
from medlore.demo.segmentation import SHIPPED, segment_template, why_left_out
from medlore.demo.tuning import draw_scores, tune_contenders
from medlore.inspecting.ranks import draw_profile
from medlore.pages.view import view
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan
from medlore.runs.settings import Run, Settings, peak_memory_bytes
from medlore.tuning.comparison import Cell, Standing, measure_of, standings
from medlore.tuning.settings import FinetuneSettings


class DemoSettings(Settings):
    """What the demo does; the defaults take less than four minutes on two cores."""

    model: str = "medlore:vit-mini"
    segmenter: str = SHIPPED
    shots: int = pydantic.Field(default=5, ge=1, le=50)
    draws: int = pydantic.Field(default=3, ge=1)
    epochs: int = pydantic.Field(default=12, ge=1)
    batch_size: int = pydantic.Field(default=8, ge=1)
    test_images: int = pydantic.Field(default=400, ge=50, le=1000)
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and wrote.

    Attributes:
        plan: ranks of the shipped model.
        cells: one entry for each method and draw.
        table: means, intervals and differences.
        majority: score of the most frequent class.
        segmentation: a row a label, or why there is none.
        settings: what was run.
        seconds: wall time of all of it.
        peak_memory_bytes: largest resident memory.
        files: what was written, by name.
    """

    plan: RankPlan
    cells: list[Cell]
    table: list[Standing]
    majority: float | None
    segmentation: dict[str, Any]
    settings: DemoSettings
    seconds: float
    peak_memory_bytes: int
    files: dict[str, Path] = field(default_factory=dict)


def run_demo(settings: DemoSettings, out: str | Path, *, quiet: bool = False) -> DemoResult:
    """Rank plan of the shipped model, three tuning methods on the same draws of digits, and the ICBM152 template by text prompts.

    Args:
        settings: draws, shots, length of training, and the segmenter. The default segmenter is left out where it is not
            installed, and the result says so.
        out: folder for `report.json`, `plan.json`, the pictures, the folder `template` with the masks, and `page.html`.
        quiet: no progress on stderr.

    Raises:
        InputError: a segmenter was asked for that is not there.
        StepError: the folder cannot be written.
    """
    out, started = Path(out), time.perf_counter()
    notes = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    left_out = why_left_out(settings.segmenter)
    pool, test = digits(settings.test_images, seed=settings.seed)
    with Run("demo", out, settings=settings, seed=settings.seed, device="cpu") as run:
        plan = plan_ranks(settings.model)
        files = {"plan": plan.save(out / "plan.json"), "ranks": draw_profile(plan, out / "ranks.png")}
        cells = tune_contenders(_tuning(settings), pool, test, shots=settings.shots, draws=settings.draws, notes=notes)
        table = standings(cells)
        files["digits"] = draw_scores(cells, table, out / "digits.png", measure=measure_of(test))
        segmentation = {"left_out": left_out} if left_out else segment_template(settings.segmenter, out, notes=notes)
        if "folder" in segmentation:
            files["masks"] = out / segmentation["folder"]
        for name, path in files.items():
            run.add_output(name, path)
        run.results = {
            "ranks": {layer.name: layer.rank for layer in plan.layers},
            "factor_parameters": plan.parameters,
            "uniform_rank": plan.uniform_rank,
            "measure": measure_of(test),
            "majority": cells[0].majority,
            "table": [asdict(row) for row in table],
            "cells": [asdict(cell) for cell in cells],
            "segmentation": segmentation,
        }
    files |= {"report": out / "report.json", "page": view(out)}
    seconds = round(time.perf_counter() - started, 1)
    return DemoResult(plan, cells, table, cells[0].majority, segmentation, settings, seconds, peak_memory_bytes(), files)


def _tuning(settings: DemoSettings) -> FinetuneSettings:
    return FinetuneSettings(
        model=settings.model,
        data_seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        crop=(0.8, 1.0),  # half a digit is another digit
        device="cpu",  # the same numbers on every machine, and small enough
    )
