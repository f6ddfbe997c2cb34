"""`medlore decompose`: a teacher becomes a light shared backbone and one low-rank expert per task."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def decompose(
    study: Path = typer.Argument(help="YAML file: tasks, teacher, student, ranks, losses; see docs/decompose.md."),
    out: Path = typer.Option(..., "--out", help="Folder of the expert pack, the report and the checkpoints."),
    steps: int | None = typer.Option(None, help="Optimiser steps of every student; overrides the study."),
    seed: int | None = typer.Option(None, help="Overrides the study."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or mps; overrides the study."),
    only: str | None = typer.Option(
        None, help="Of a segmenter's study: `teacher` trains the teacher alone; the same command without it goes on."
    ),
    add_expert: str | None = typer.Option(
        None, "--add-expert", help="Of a segmenter's study: train an expert of this region and add it to --pack; all else stays as it is."
    ),
    pack: Path | None = typer.Option(None, "--pack", help="With --add-expert: the pack that gets the expert; default OUT/pack."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Read everything, print sizes, ranks and shares; train nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Split a model into one light shared backbone and a low-rank expert per task, beside the networks it has to beat."""
    from medlore.decomposing.kinds import is_segmentation_study
    from medlore.errors import UnknownNameError

    if is_segmentation_study(study):
        from medlore.commands.screens import decomposing_segmenters as screen

        if only not in (None, "teacher"):
            raise UnknownNameError("--only", only, ["teacher"], "leave it out for the whole study")
        if add_expert is None:
            _refuse({"--pack": pack}, "a run with --add-expert")
            screen.run_on_screen(study, out, only=only, dry_run=dry_run, as_json=as_json, steps=steps, seed=seed, device=device)
        else:
            _refuse({"--only": only, "--dry-run": dry_run or None}, "a run without --add-expert")
            screen.add_on_screen(study, out, region=add_expert, pack=pack, as_json=as_json, steps=steps, seed=seed, device=device)
        return
    _refuse({"--only": only, "--add-expert": add_expert, "--pack": pack}, "a segmenter's study (kind: segmenter)")
    from medlore.commands.screens.decomposing_classifiers import run_on_screen

    run_on_screen(study, out, dry_run=dry_run, as_json=as_json, steps=steps, seed=seed, device=device)


def _refuse(flags: dict[str, object], accepted: str) -> None:
    """Flags that could not act are refused rather than passed over."""
    from medlore.errors import InputError

    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise InputError(", ".join(given), "given here", accepted, "leave it out")
