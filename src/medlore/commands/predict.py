"""`medlore predict`: scores for unlabelled images."""

from __future__ import annotations

from pathlib import Path

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import setting
from medlore.tuning.scoring_settings import PredictSettings


class PredictCall(Output):
    """What is scored, and where the table goes."""

    tuned: Path = setting(..., "Folder of `medlore finetune`, or the adapter in it.", argument="RUN_OR_ADAPTER")
    images: tuple[Path, ...] = setting(
        ...,
        "Image files (also 16-bit PNG, DICOM), folders, zips, or a .txt list of names.",
        argument="IMAGES...",
        repeated=True,
        min_length=1,
    )
    out: Path = setting(Path("predictions.csv"), "CSV file to write.")


def predict(given: Given) -> None:
    """Score unlabelled images with a tuned model and write one CSV row per image."""
    settings, call = given.read(PredictSettings, PredictCall)
    from medlore.commands.screens.answers import print_json, print_line, print_notes
    from medlore.runs.output_lock import OutputLock
    from medlore.tuning.predict import predict as score
    from medlore.tuning.predict import write_medfmc

    with OutputLock.beside(call.out):
        predicted = score(call.tuned, call.images, call.out, settings)
        written = {"predictions": call.out, "images": len(predicted.images), "left_out": predicted.faults}
        if settings.medfmc is not None:
            written["submission"] = write_medfmc(predicted, call.out.parent, settings.medfmc)
    if call.as_json:
        print_json(written)
    else:
        print_notes([f"left out: {fault}" for fault in predicted.faults])
        print_line(f"{len(predicted.images)} images: {call.out}" + (f", {written['submission']}" if "submission" in written else ""))
    if predicted.faults:
        raise typer.Exit(1)


app = command(predict, PredictCall, PredictSettings)
