"""`medlore export`: weights become a pack that says what it is, or one merged expert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def export(
    source: Path = typer.Argument(help="Published file, pack, or text encoder.", show_default=False),
    out: Path = typer.Option(..., "--out", help="Folder of the pack; for a text encoder the .safetensors file of the prompt table."),
    expert: str | None = typer.Option(None, help="Write only this expert, merged: a plain network without factors."),
    text: Path | None = typer.Option(None, help="Text encoder file that belongs to these weights; the whole vocabulary is embedded."),
    tokenizer: Path | None = typer.Option(None, help="vocab.txt or tokenizer.json of BioLORD, MPNet or bert-base-uncased, or its folder."),
    prompt_embeddings: Path | None = typer.Option(None, help="Ready table of prompts instead of a text encoder."),
    lora_alpha: float | None = typer.Option(None, help="Alpha of a LoRKD file with equal ranks, which does not say it [16]."),
    format: str | None = typer.Option(None, "--format", help="Of a classifier's expert: safetensors, onnx, torch-export or peft."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write one merged expert of a pack as a plain network; convert a published SAT or LoRKD file into a pack with its prompts."""
    from medlore.decomposing.classifiers.export import export_classifier, is_classifier_pack, print_classifier_export, required
    from medlore.segmenting.export import export as run
    from medlore.segmenting.export import print_export

    if is_classifier_pack(source):
        flags = {"--text": text, "--tokenizer": tokenizer, "--prompt-embeddings": prompt_embeddings, "--lora-alpha": lora_alpha}
        _refuse(flags, "given for the pack of a classifier", "--expert and --format")
        print_classifier_export(export_classifier(source, required(expert, "--expert"), format or "safetensors", out), as_json=as_json)
        return
    _refuse({"--format": format}, "given for a segmenter", "no format: a segmenter is written as a pack of safetensors files")
    summary = run(source, out, expert=expert, text=text, tokenizer=tokenizer, prompt_embeddings=prompt_embeddings, lora_alpha=lora_alpha)
    print_export(summary, as_json=as_json)


def _refuse(flags: Mapping[str, object], came: str, accepted: str) -> None:
    """Flags that could not act are refused rather than passed over."""
    from medlore.errors import InputError

    given = [name for name, value in flags.items() if value is not None]
    if given:
        raise InputError(", ".join(given), came, accepted, "leave it out")
