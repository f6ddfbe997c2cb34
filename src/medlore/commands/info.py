"""`medlore info`: what is this file or folder, and which labels are there?"""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def info(
    path: Path | None = typer.Argument(None, help="Weights (.pth, .safetensors), pack, plan, adapter, run, images.", show_default=False),
    labels: bool = typer.Option(False, "--labels", help="List labels: of the vocabulary, or those that PATH has prompts for."),
    modality: str | None = typer.Option(None, help="With --labels: ct, mri, us or pet."),
    region: str | None = typer.Option(None, help="With --labels: abdomen, brain, 'head and neck', ..."),
    lora_alpha: float | None = typer.Option(None, help="Alpha of a LoRKD file with equal ranks, which does not say it [16]."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say what a weights file, pack, plan, adapter, run or folder of images is; --labels lists what can be segmented."""
    from medlore.errors import InputError
    from medlore.inspecting.files import count_faults, describe, describe_labels, print_facts

    if not labels and (modality or region):
        raise InputError("--modality, --region", "given without --labels", "both choose among labels", "add --labels")
    if not labels and path is None:
        raise InputError("PATH", "nothing given", "a file or folder, or --labels", "run `medlore info FILE` or `medlore info --labels`")
    place = path or Path()
    facts = describe_labels(modality=modality, region=region, pack=path) if labels else describe(place, lora_alpha=lora_alpha)
    print_facts(facts, as_json=as_json)
    if faults := count_faults(facts):
        typer.echo(f"{faults} of the above cannot be used as they are", err=True)
        raise typer.Exit(1)
