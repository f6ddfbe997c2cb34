"""`medlore predict`: scores for unlabelled images."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def predict(
    tuned: Path = typer.Argument(..., metavar="RUN_OR_ADAPTER", help="Folder of `medlore finetune`, or the adapter in it."),
    images: list[Path] = typer.Argument(..., help="Image files (also 16-bit PNG, DICOM), folders, zips, or a .txt list of names."),
    out: Path = typer.Option(Path("predictions.csv"), help="The CSV."),
    model: str | None = typer.Option(None, help="Where the backbone lies now, if it was moved."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or mps."),
    precision: str = typer.Option("auto", help="auto, fp32, bf16 or fp16."),
    keep_going: bool = typer.Option(False, "--keep-going", help="Leave images out that cannot be read (exit status 1 then)."),
    medfmc: str | None = typer.Option(None, help="Write the challenge's file too: chest, colon or endo, with shots, e.g. endo:5."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Score unlabelled images with a tuned model and write one CSV row an image."""
    from medlore.commands.screens.tuning import print_json, print_notes
    from medlore.runs.settings import read_settings
    from medlore.tuning.predict import PredictSettings, write_medfmc
    from medlore.tuning.predict import predict as score

    chosen = read_settings(PredictSettings, device=device, precision=precision, model=model, keep_going=keep_going, medfmc=medfmc)
    predicted = score(tuned, images, out, chosen)
    written = {"predictions": out, "images": len(predicted.images), "left_out": predicted.faults}
    if chosen.medfmc is not None:
        written["submission"] = write_medfmc(predicted, out.parent, chosen.medfmc)
    if as_json:
        print_json(written)
    else:
        print_notes([f"left out: {fault}" for fault in predicted.faults])
        typer.echo(f"{len(predicted.images)} images: {out}" + (f", {written['submission']}" if "submission" in written else ""))
    if predicted.faults:
        raise typer.Exit(1)
