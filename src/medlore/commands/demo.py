"""`medlore demo`: what MedLoRE does, on data that is already installed."""

from __future__ import annotations

from pathlib import Path

from medlore.commands.flags import Given, Output, command
from medlore.demo.settings import DemoSettings
from medlore.runs.settings import setting


class DemoOutput(Output):
    """Where the demo writes."""

    out: Path = setting(Path("medlore-demo"), "Folder for the report, the pictures, the masks and page.html.")


def demo(given: Given) -> None:
    """Show what MedLoRE does, in about four minutes and without a download.

    Ranks of the shipped ViT, few-shot tuning on handwritten digits with those ranks, with one rank of equal cost, and with the head
    alone, and a brain segmented by text prompts. page.html in --out shows all of it.
    """
    settings, output = given.read(DemoSettings, DemoOutput)
    from medlore.commands.screens.answers import progress_lines
    from medlore.commands.screens.demo import print_demo
    from medlore.demo.demo import run_demo

    result = run_demo(settings, output.out, say=progress_lines(quiet=output.as_json))
    print_demo(result, as_json=output.as_json)


app = command(demo, DemoOutput, DemoSettings)
