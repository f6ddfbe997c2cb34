"""`medlore demo`: what MedLoRE does, on data that is already installed."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def demo(
    out: Path = typer.Option(Path("medlore-demo"), help="Folder for the report, the pictures, the masks and page.html."),
    draws: int = typer.Option(3, min=1, help="Few-shot draws for each method."),
    shots: int = typer.Option(5, min=1, max=50, help="Labelled images a class."),
    segmenter: str | None = typer.Option(None, help="Pack that segments the brain; default medlore:seg-mini."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show what MedLoRE does, in less than four minutes and without a download.

    Ranks of the shipped ViT, few-shot tuning on handwritten digits with those ranks, with one rank of equal cost, and with the head
    alone, and a brain segmented by text prompts. page.html in --out shows all of it.
    """
    from medlore.commands.screens.demo import print_demo
    from medlore.demo.demo import DemoSettings, run_demo
    from medlore.runs.settings import read_settings

    result = run_demo(read_settings(DemoSettings, draws=draws, shots=shots, segmenter=segmenter), out, quiet=as_json)
    print_demo(result, as_json=as_json)
