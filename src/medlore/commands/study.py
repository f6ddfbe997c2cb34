"""`medlore study`: a grid of tuning runs from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

app = typer.Typer()


@app.command()
def study(
    file: Path = typer.Argument(..., metavar="FILE", help="The study; see docs/studies.md and studies/quick.yaml."),
    out: Path = typer.Option(..., "--out", help="Folder of the cells, the report and the page."),
    only: list[str] = typer.Option(
        [], "--only", metavar="NAME=VALUE", help="Run these cells (again): data, shots, draw, method or seed; can be given several times."
    ),
    engine: Literal["local", "ray"] = typer.Option("local", help="Processes of this machine, or Ray (RAY_ADDRESS names a cluster)."),
    workers: int = typer.Option(1, min=0, help="Cells at a time; 0 runs them in this process."),
    resume: bool = typer.Option(False, "--resume", help="Keep what is finished in --out; run what failed or is missing."),
    budget_trials: int | None = typer.Option(
        None, "--budget-trials", min=1, help="At most so many settings tried for each method; 1 takes each method's own learning rate."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Look for all faults, print cells and trainings; run nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Run a grid of data sets, shots, draws and methods from one YAML file, and compare the methods draw by draw."""
    from medlore.commands.screens.study import plan_on_screen, run_on_screen

    if dry_run:
        plan_on_screen(file, out, as_json=as_json, only=only, trials=budget_trials)
        return
    status = run_on_screen(file, out, as_json=as_json, only=only, engine=engine, workers=workers, resume=resume, trials=budget_trials)
    if status:
        raise typer.Exit(status)
