"""`medlore view`: the results of a run as one HTML page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def view(
    source: Path = typer.Argument(
        metavar="RUN_OR_FOLDER", help="The --out folder of a run, a folder with image.nii.gz and masks, or plan.json."
    ),
    out: Path | None = typer.Option(None, "--out", help="The HTML file; default page.html in the folder."),
    show: bool = typer.Option(False, "--open", help="Open it in the browser."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Make one HTML page from the folder of any run, or from a folder with an image and its masks.

    Settings, tables, pictures, and three planes through the volume with the masks in colour. The page is whole by itself and opens
    without a network.
    """
    from medlore.pages.view import view as make

    page = make(source, out)
    size = page.stat().st_size
    sys.stdout.write(json.dumps({"page": str(page), "bytes": size}) + "\n" if as_json else f"{page} ({size / 1e6:.1f} MB)\n")
    if show:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            sys.stderr.write(f"no browser was found; open {page} by hand\n")
