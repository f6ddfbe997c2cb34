"""`medlore info`: what is this file or folder, and which labels are there?"""

from __future__ import annotations

from pathlib import Path

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting


class InfoCall(Settings):
    """What is looked at."""

    path: Path | None = setting(None, "Weights (.pth, .safetensors), pack, plan, adapter, run, images.", argument="PATH")
    labels: bool = setting(False, "List the labels of the vocabulary, or those for which PATH has prompts.")
    modality: str | None = setting(None, "With --labels: ct, mri, us or pet.")
    region: str | None = setting(None, "With --labels: abdomen, brain, 'head and neck', ...")
    lora_alpha: float | None = setting(None, "Alpha of a LoRKD file with equal ranks, which does not record it; default 16.")


def info(given: Given) -> None:
    """Identify a weights file, pack, plan, adapter, run or folder of images; --labels lists what can be segmented."""
    call, output = given.read(InfoCall, Output)
    from medlore.commands.screens.info import print_facts
    from medlore.errors import InputError
    from medlore.inspecting.files import count_faults, describe, describe_labels

    if not call.labels and (call.modality or call.region):
        raise InputError("--modality, --region", "given without --labels", "both choose among labels", "add --labels")
    if not call.labels and call.path is None:
        raise InputError("PATH", "nothing given", "a file or folder, or --labels", "run `medlore info FILE` or `medlore info --labels`")
    if call.labels:
        facts = describe_labels(modality=call.modality, region=call.region, pack=call.path)
    else:
        facts = describe(call.path or Path(), lora_alpha=call.lora_alpha)
    print_facts(facts, as_json=output.as_json)
    if faults := count_faults(facts):
        typer.echo(f"{faults} of the above cannot be used as they are", err=True)
        raise typer.Exit(1)


app = command(info, InfoCall, Output)
