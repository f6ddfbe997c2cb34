"""The demo: ranks from weights alone, then few-shot tuning with them, on what the installed packages bring along."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from rich.console import Console
from rich.table import Table

from medlore.data.imageset import ImageSet, from_arrays
from medlore.errors import DataError
from medlore.files import atomic_path, json_text, made_folder
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan
from medlore.recipes.comparison import Cell, Standing, compare, measure_of, standings
from medlore.recipes.finetune_settings import FinetuneSettings
from medlore.recipes.image_splits import hold_out
from medlore.recipes.ranks import draw_profile, print_plan
from medlore.recipes.run import Run, Settings

_CONTENDERS = ("sr-lora", "lora", "linear-probe")
_LABELS = {"sr-lora": "sr-lora", "lora": "lora, equal size", "linear-probe": "linear probe"}
_COLOURS = {"sr-lora": "#d55e00", "lora": "#0072b2", "linear-probe": "#777777"}


class DemoSettings(Settings):
    """What the demo does; the defaults take two to three minutes on two cores."""

    model: str = "medlore:vit-mini"
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
        settings: what was run.
        seconds: wall time.
        files: what was written, by name.
    """

    plan: RankPlan
    cells: list[Cell]
    table: list[Standing]
    majority: float | None
    settings: DemoSettings
    seconds: float
    files: dict[str, Path]


def run_demo(settings: DemoSettings, out: str | Path, *, quiet: bool = False) -> DemoResult:
    """Rank plan of the shipped model, then three tuning methods on the same draws of handwritten digits.

    Args:
        settings: draws, shots and length of training.
        out: folder for `report.json`, `plan.json`, `ranks.png` and `digits.png`.
        quiet: no progress on stderr.

    Raises:
        StepError: the folder cannot be written.
    """
    out = Path(out)
    pool, test = digits(settings.test_images, seed=settings.seed)
    made_folder(out)
    with Run("demo", out, settings=settings, seed=settings.seed, device="cpu") as run:
        plan = plan_ranks(settings.model)
        files = {"plan": plan.save(out / "plan.json"), "ranks": draw_profile(plan, out / "ranks.png")}
        cells = _tune(settings, pool, test, quiet=quiet)
        table = standings(cells)
        files["digits"] = draw_scores(cells, table, out / "digits.png", measure=measure_of(test))
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
        }
    seconds = round(sum(cell.seconds for cell in cells), 1)
    return DemoResult(plan, cells, table, cells[0].majority, settings, seconds, files | {"report": out / "report.json"})


def digits(test_images: int, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's handwritten digits (UCI test part, 1,797 images of 8x8 pixels): a pool to draw from and a test set.

    Args:
        test_images: about how many images judge.
        seed: of the split.

    Raises:
        DataError: more test images than there are.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)  # b 8 8, brightness 0 to 16
    if not 0 < test_images < len(images):
        raise DataError("digits", f"{test_images} test images", f"less than {len(images)}", "take fewer")
    everything = from_arrays(images, loaded.target, classes=[str(k) for k in range(10)], name="digits", source="scikit-learn digits")
    return hold_out(everything, test_images / len(images), seed=seed)


def _tune(settings: DemoSettings, pool: ImageSet, test: ImageSet, *, quiet: bool) -> list[Cell]:
    tuning = FinetuneSettings(
        model=settings.model,
        data_seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        crop=(0.8, 1.0),  # half a digit is another digit
        device="cpu",  # the same numbers on every machine, and small enough
    )
    notes = Console(stderr=True, quiet=quiet, highlight=False)
    total = settings.draws * len(_CONTENDERS)
    notes.print(f"tuning {len(_CONTENDERS)} methods on {settings.draws} draws of {settings.shots} images a digit")
    done: list[Cell] = []

    def watch(cell: Cell) -> None:
        done.append(cell)
        score = "not defined" if cell.score is None else f"{cell.score:.3f}"
        notes.print(f"  {len(done)}/{total}  draw {cell.draw}  {cell.contender:<13} {score}  ({cell.seconds:.0f} s)")

    return compare(_CONTENDERS, tuning, pool=pool, test=test, shots=settings.shots, draws=settings.draws, watch=watch)


def draw_scores(cells: Sequence[Cell], table: Sequence[Standing], path: Path, *, measure: str) -> Path:
    """One dot a draw, the mean and its interval beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.9 + 0.75 * len(table)), layout="constrained")
    axes = figure.subplots()
    if cells[0].majority is not None:
        axes.axvline(cells[0].majority, color="#444444", linestyle=":", linewidth=1)
    for place, row in enumerate(table):
        scores = [cell.score for cell in cells if cell.contender == row.contender and cell.score is not None]
        colour = _COLOURS.get(row.contender, "#333333")
        axes.plot(scores, [place + 0.16] * len(scores), "o", color=colour, alpha=0.55, markersize=6)
        if row.score.low is not None and row.score.high is not None:
            axes.plot([row.score.low, row.score.high], [place - 0.1] * 2, color=colour, linewidth=2)
        axes.plot(row.score.mean, place - 0.1, "D", color=colour, markersize=7)
    axes.set_yticks(range(len(table)), [_LABELS.get(row.contender, row.contender) for row in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{measure.replace('_', ' ')} on the test images")
    axes.set_title("dots: draws, diamond and line: mean with 95 % interval, dotted: majority class", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def print_demo(result: DemoResult, *, as_json: bool) -> None:
    """Plan, table and the commands to go on with; or one JSON object."""
    if as_json:
        sys.stdout.write(json_text(_as_json(result)) + "\n")
        return
    print_plan(result.plan, {})
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(_table(result))
    if result.settings.draws > 1:
        console.print(f"If the interval of a difference holds 0, {result.settings.draws} draws cannot tell the two apart.")
    console.print(f"{result.seconds:.0f} s of tuning; pictures and report in {result.files['report'].parent}", markup=False)
    console.print(_NEXT, markup=False)


def _table(result: DemoResult) -> Table:
    settings, measure = result.settings, result.cells[0].measure.replace("_", " ")
    draws = f"{settings.draws} draw" + ("s" if settings.draws > 1 else "")
    table = Table(title=f"{measure}, {settings.shots} labelled images a digit, {draws}", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("trained", justify="right")
    table.add_column("mean (95 %)", no_wrap=True)
    table.add_column("sr-lora minus it", no_wrap=True)
    for row in result.table:
        table.add_row(_LABELS[row.contender], f"{row.trained:,}", str(row.score), "" if row.difference is None else str(row.difference))
    if result.majority is not None:
        table.add_row("majority class", "0", f"{result.majority:.3f}", "")
    return table


_NEXT = """
With your own images (a folder with one subfolder for each class):
  medlore finetune --data FOLDER --shots 5 --method sr-lora --out runs/mine
  medlore predict runs/mine NEW_IMAGES --out predictions.csv
Ranks for a model of your own, and a PEFT configuration with them:
  medlore ranks model.safetensors --plot ranks.png --out plan.json --peft lora"""


def _as_json(result: DemoResult) -> dict[str, Any]:
    return {
        "settings": result.settings.model_dump(mode="json"),
        "ranks": {layer.name: layer.rank for layer in result.plan.layers},
        "factor_parameters": result.plan.parameters,
        "uniform_rank": result.plan.uniform_rank,
        "table": [asdict(row) for row in result.table],
        "cells": [asdict(cell) for cell in result.cells],
        "majority": result.majority,
        "seconds": result.seconds,
        "files": result.files,
    }
