"""`medlore study`: a grid of tuning runs from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting


class StudyCall(Settings):
    """Which cells of which study are run, and how."""

    file: Path = setting(..., "YAML file of the study; see docs/studies.md and studies/quick.yaml.", argument="FILE")
    out: Path = setting(..., "Folder of the cells, the report and the page.")
    only: tuple[str, ...] = setting(
        (), "NAME=VALUE: run only these cells (again); NAME is data, shots, draw, method or seed; may be repeated.", repeated=True
    )
    engine: Literal["local", "ray"] = setting("local", "Local processes, or Ray (RAY_ADDRESS names a cluster).")
    workers: int = setting(1, "Cells that run at the same time; 0 runs them in this process.", ge=0)
    resume: bool = setting(False, "Keep the finished cells in --out; run failed and missing ones.")
    budget_trials: int | None = setting(None, "Largest number of learning rates tried for each method; 1 uses the method's own.", ge=1)
    dry_run: bool = setting(False, "Check for all faults and print the cells and trainings; run nothing.")


def study(given: Given) -> None:
    """Run a grid of data sets, shots, draws and methods from one YAML file, and compare the methods draw by draw."""
    call, output = given.read(StudyCall, Output)
    from medlore.commands.screens.study import plan_on_screen, run_on_screen

    only = list(call.only)
    if call.dry_run:
        plan_on_screen(call.file, call.out, as_json=output.as_json, only=only, trials=call.budget_trials)
        return
    how = {"only": only, "engine": call.engine, "workers": call.workers, "resume": call.resume, "trials": call.budget_trials}
    status = run_on_screen(call.file, call.out, as_json=output.as_json, **how)
    if status:
        raise typer.Exit(status)


app = command(study, StudyCall, Output)
