"""`medlore decompose`: a teacher becomes a light shared backbone and one low-rank expert per task."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command(help="Split a model into one light shared backbone and a low-rank expert per task, beside the networks it has to beat.")
def decompose(
    study: Path = typer.Argument(help="YAML file: tasks, teacher, student, ranks, losses; see docs/decompose.md."),
    out: Path = typer.Option(..., "--out", help="Folder of the expert pack, the report and the checkpoints."),
    steps: int | None = typer.Option(None, help="Optimiser steps of every student; overrides the study."),
    seed: int | None = typer.Option(None, help="Overrides the study."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or mps; overrides the study."),
    only: str | None = typer.Option(
        None, help="Of a segmenter's study: `teacher` trains the teacher alone; the same command without it goes on."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Read everything, print sizes, ranks and shares; train nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    from medlore.recipes.kinds import is_segmentation_study

    if is_segmentation_study(study):
        from medlore.recipes.segmentation import screen

        screen.run_on_screen(study, out, only=only, as_json=as_json, seed=seed, device=device)
        return
    from medlore.recipes.decomposition.screen import run_on_screen

    run_on_screen(study, out, dry_run=dry_run, as_json=as_json, steps=steps, seed=seed, device=device)
