"""`medlore evaluate`: measure a tuned model on labelled images, or masks against true masks."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def evaluate(
    tuned: Path | None = typer.Argument(None, metavar="RUN_OR_ADAPTER", help="Folder of `medlore finetune`, or the adapter in it."),
    data: Path | None = typer.Option(None, help="Labelled images, in any format of `medlore finetune`."),
    format: str | None = typer.Option(None, help="Format of --data, where auto is wrong."),
    split: str | None = typer.Option(None, help="Part of --data; default its own test part, or all of a set without parts."),
    images: Path | None = typer.Option(None, help="Folder of the images, where the list lies elsewhere."),
    group_pattern: str | None = typer.Option(None, help="Regular expression on file names; its bracket is the patient."),
    model: str | None = typer.Option(None, help="Where the backbone lies now, if it was moved."),
    bootstrap: int | None = typer.Option(None, help="Resamples for the intervals; 0 for none."),
    seed: int | None = typer.Option(None, help="Seed of the resamples."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or mps."),
    pred: Path | None = typer.Option(None, help="Folder of predicted masks."),
    truth: Path | None = typer.Option(None, help="Case list (jsonl) with the true masks."),
    tolerance: float = typer.Option(1.0, "--tolerance", help="With --pred: distance in mm that counts as agreement of surfaces."),
    out: Path | None = typer.Option(None, help="Folder for report.json and predictions.csv."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Measure a tuned model on labelled images; with --pred and --truth, measure masks against the masks of a case list."""
    from medlore.errors import InputError

    if pred is not None or truth is not None:
        if pred is None or truth is None or tuned is not None or data is not None:
            raise InputError("evaluate", "only one of --pred and --truth, or images too", "both of them alone", "give --pred and --truth")
        from medlore.segmenting.evaluate import evaluate_masks

        evaluate_masks(pred, truth, out=out, as_json=as_json, tolerance_mm=tolerance)
        return
    if tuned is None or data is None:
        raise InputError("evaluate", "no model or no --data", "RUN --data SET, or --pred DIR --truth cases.jsonl", "name both")
    from medlore.commands.screens.tuning import print_json, print_report
    from medlore.runs.settings import read_settings
    from medlore.tuning.evaluate import EvaluateSettings
    from medlore.tuning.evaluate import evaluate as measure

    chosen = read_settings(
        EvaluateSettings,
        tuned=tuned,
        data=data,
        format=format,
        split=split,
        images=images,
        group_pattern=group_pattern,
        model=model,
        bootstrap=bootstrap,
        seed=seed,
        device=device,
    )
    result = measure(chosen, out)
    if as_json:
        print_json(result.report)
    else:
        print_report(result.report, title=f"{result.images.name}: {len(result.images)} images")
