"""Few-shot tuning in the demo: three methods on the same draws of handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medlore.data.images.imageset import ImageSet
from medlore.extras import require
from medlore.files import atomic_path
from medlore.tuning.comparison import Cell, Standing, compare
from medlore.tuning.settings import FinetuneSettings

CONTENDERS = ("sr-lora", "lora", "linear-probe")
LABELS = {"sr-lora": "sr-lora", "lora": "lora, equal size", "linear-probe": "linear probe"}
_COLOURS = {"sr-lora": "#d55e00", "lora": "#0072b2", "linear-probe": "#777777"}


def tune_contenders(
    tuning: FinetuneSettings, pool: ImageSet, test: ImageSet, *, shots: int, draws: int, say: Callable[[str], None]
) -> list[Cell]:
    """All contenders on the same draws, with a line for each.

    Args:
        tuning: model and training.
        pool: images to draw from.
        test: images that judge.
        shots: labelled images per class.
        draws: how many.
        say: hears each line.
    """
    total = draws * len(CONTENDERS)
    say(f"tuning {len(CONTENDERS)} methods on {draws} draws of {shots} images per digit")
    done: list[Cell] = []

    def watch(cell: Cell) -> None:
        done.append(cell)
        score = "not defined" if cell.score is None else f"{cell.score:.3f}"
        say(f"  {len(done)}/{total}  draw {cell.draw}  {cell.contender:<13} {score}  ({cell.seconds:.0f} s)")

    return compare(CONTENDERS, tuning, pool=pool, test=test, shots=shots, draws=draws, watch=watch)


def draw_scores(cells: Sequence[Cell], table: Sequence[Standing], path: Path, *, measure: str) -> Path:
    """One dot per draw, the mean and its interval beside them."""
    require("matplotlib", "digits.png")
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
    axes.set_yticks(range(len(table)), [LABELS.get(row.contender, row.contender) for row in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"{measure.replace('_', ' ')} on the test images")
    axes.set_title("dots: draws, diamond and line: mean with 95 % interval, dotted: majority class", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path
