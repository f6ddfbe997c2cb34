"""The plot of a run: losses on the left axis, the validation score on the right, the kept epoch marked."""

from __future__ import annotations

from pathlib import Path

from medlore.extras import require
from medlore.files import atomic_path
from medlore.tuning.training import TuningHistory


def plot_curves(history: TuningHistory, path: str | Path, *, score_name: str) -> Path:
    """Write a PNG of losses and scores by epoch."""
    require("matplotlib", "curves.png")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record["epoch"] for record in history.epochs]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, [r["train_loss"] for r in history.epochs], color="#4c72b0", label="training loss")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if any("validation_score" in r for r in history.epochs):
        axes.plot(epochs, [r["validation_loss"] for r in history.epochs], color="#4c72b0", linestyle="--", label="validation loss")
        right = axes.twinx()
        right.plot(
            epochs, [r["validation_score"] for r in history.epochs], color="#dd8452", label=f"validation {score_name.replace('_', ' ')}"
        )
        right.set(ylabel=score_name.replace("_", " "), ylim=(0, 1.02))
        right.plot([], [], color="#55a868", linestyle=":", label=f"kept: epoch {history.best_epoch}")
        axes.axvline(history.best_epoch, color="#55a868", linestyle=":")
        lines = [*axes.get_lines()[:2], *right.get_lines()]
    else:
        lines = list(axes.get_lines())
    figure.legend(handles=lines, loc="outside upper center", ncols=min(4, len(lines)), frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)
