"""`medlore demo`: what MedLoRE does, on data that is already installed."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command(
    help="Show what MedLoRE does, in about two minutes and without a download: ranks of the shipped ViT, then few-shot tuning on "
    "handwritten digits with those ranks, with one rank of equal cost, and with the head alone."
)
def demo(
    out: Path = typer.Option(Path("medlore-demo"), help="Folder for the report and the pictures."),
    draws: int = typer.Option(3, min=1, help="Few-shot draws for each method."),
    shots: int = typer.Option(5, min=1, max=50, help="Labelled images a class."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    from medlore.recipes.demo import DemoSettings, print_demo, run_demo

    result = run_demo(DemoSettings(draws=draws, shots=shots), out, quiet=as_json)
    print_demo(result, as_json=as_json)
