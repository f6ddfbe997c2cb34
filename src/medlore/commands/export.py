"""`medlore export`: weights become a pack that says what it is, or one merged expert."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command(help="Convert a published SAT or LoRKD file into a pack; write one merged expert; embed the vocabulary with a text encoder.")
def export(
    source: Path = typer.Argument(help="Published file, pack, or text encoder.", show_default=False),
    out: Path = typer.Option(..., "--out", help="Folder of the pack; for a text encoder the .safetensors file of the prompt table."),
    expert: str | None = typer.Option(None, help="Write only this expert, merged: a plain network without factors."),
    text: Path | None = typer.Option(None, help="Text encoder file that belongs to these weights; the whole vocabulary is embedded."),
    tokenizer: Path | None = typer.Option(None, help="vocab.txt or tokenizer.json of BioLORD, MPNet or bert-base-uncased, or its folder."),
    prompt_embeddings: Path | None = typer.Option(None, help="Ready table of prompts instead of a text encoder."),
    lora_alpha: float | None = typer.Option(None, help="Alpha of a LoRKD file with equal ranks, which does not say it [16]."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    from medlore.recipes.export import export as run
    from medlore.recipes.export import print_export

    summary = run(source, out, expert=expert, text=text, tokenizer=tokenizer, prompt_embeddings=prompt_embeddings, lora_alpha=lora_alpha)
    print_export(summary, as_json=as_json)
