"""`medlore view`: the results of a run as one HTML page."""

from __future__ import annotations

from pathlib import Path

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting


class ViewCall(Settings):
    """What is shown, and where the page goes."""

    source: Path = setting(..., "The --out folder of a run, a folder with image.nii.gz and masks, or plan.json.", argument="RUN_OR_FOLDER")
    out: Path | None = setting(None, "The HTML file; default page.html in the folder.")
    show: bool = setting(False, "Open it in the browser.", flags=("--open",))


def view(given: Given) -> None:
    """Make one HTML page from the folder of any run, or from a folder with an image and its masks.

    Settings, tables, pictures, and three planes through the volume with the masks in colour. The page is whole by itself and opens
    without a network.
    """
    call, output = given.read(ViewCall, Output)
    from medlore.commands.screens.answers import print_json, print_line
    from medlore.pages.view import view as make

    page = make(call.source, call.out)
    size = page.stat().st_size
    if output.as_json:
        print_json({"page": str(page), "bytes": size})
    else:
        print_line(f"{page} ({size / 1e6:.1f} MB)")
    if call.show:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            typer.echo(f"no browser was found; open {page} by hand", err=True)


app = command(view, ViewCall, Output)
