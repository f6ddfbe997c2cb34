"""`medlore finetune`: tune a pre-trained network on a few labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

app = typer.Typer()

_SEGMENTER = "Segmenter: a pack and about five masks"
_IMAGES, _MODEL, _METHOD, _TRAINING, _RUN = "Images", "Backbone", "Method and ranks", "Training", "Run"
# Flags that stand for a setting of the same name; the rest say how the run goes.
_NOT_SETTINGS = {
    "settings",
    "out",
    "resume",
    "dry_run",
    "as_json",
    "no_augment",
    "no_checkpoints",
    "pack",
    "cases",
    "region",
    "steps",
    "overwrite",
}


@app.command()
def finetune(
    pack: Path | None = typer.Argument(None, help="Pack or file of a segmenter that is tuned on --cases; without it, images."),
    cases: Path | None = typer.Option(None, help="jsonl with masks; see docs/segmentation-training.md.", rich_help_panel=_SEGMENTER),
    region: str | None = typer.Option(None, help="Region whose expert is the start and answers later.", rich_help_panel=_SEGMENTER),
    steps: int | None = typer.Option(None, help="Optimiser steps.", rich_help_panel=_SEGMENTER),
    data: Path | None = typer.Option(
        None, help="Folder of class folders, MedFMC or VTAB-1k folder or list, CSV, .npz or .zip.", rich_help_panel=_IMAGES
    ),
    format: str | None = typer.Option(None, help="Format of --data, where auto is wrong.", rich_help_panel=_IMAGES),
    images: Path | None = typer.Option(None, help="Folder of the images, where the list lies elsewhere.", rich_help_panel=_IMAGES),
    test_data: Path | None = typer.Option(
        None, help="Test set of its own; default the test part of --data, else a share held out.", rich_help_panel=_IMAGES
    ),
    split: str | None = typer.Option(None, help="Part of --data to take the pool from.", rich_help_panel=_IMAGES),
    task: str | None = typer.Option(None, help="single or multi, where a table could be both.", rich_help_panel=_IMAGES),
    classes: str | None = typer.Option(None, help="Class names in label order, separated by commas.", rich_help_panel=_IMAGES),
    group_pattern: str | None = typer.Option(
        None, help="Regular expression on file names; its bracket is the patient.", rich_help_panel=_IMAGES
    ),
    shots: int | None = typer.Option(None, help="Labelled images a class; default all.", rich_help_panel=_IMAGES),
    draw: int | None = typer.Option(None, help="Number of the few-shot draw, from 1.", rich_help_panel=_IMAGES),
    official_draw: bool | None = typer.Option(
        None, "--official-draw", help="The published draw of MedFMC or VTAB-1k.", rich_help_panel=_IMAGES
    ),
    per: str | None = typer.Option(None, help="One shot is an image or a group (patient).", rich_help_panel=_IMAGES),
    data_seed: int | None = typer.Option(None, help="Seed of all draws of images.", rich_help_panel=_IMAGES),
    validation_shots: str | None = typer.Option(
        None, help="Validation images a class, or all; default as many as --shots.", rich_help_panel=_IMAGES
    ),
    model: str | None = typer.Option(
        None, help="medlore:vit-mini, a transformers folder, a weights file or a hub name.", rich_help_panel=_MODEL
    ),
    image_size: int | None = typer.Option(None, help="Side of the input in pixels.", rich_help_panel=_MODEL),
    mean: str | None = typer.Option(
        None, help="Mean of the images the backbone was trained on, three numbers from 0 to 1.", rich_help_panel=_MODEL
    ),
    std: str | None = typer.Option(None, help="Their standard deviation, three numbers.", rich_help_panel=_MODEL),
    heads: int | None = typer.Option(None, help="Attention heads of a ViT weights file; default width / 64.", rich_help_panel=_MODEL),
    method: str | None = typer.Option(
        None,
        help="sr-lora, lora, rslora, dora, adalora, eva, pissa, dylora, melora, moslora, capaboost, glora, adapter, adaptformer, "
        "repadapter, vpt-shallow, vpt-deep, ssf, layernorm, linear-probe, bitfit, partial, full.",
        rich_help_panel=_METHOD,
    ),
    plan: Path | None = typer.Option(None, help="Rank plan of `medlore ranks --out`.", rich_help_panel=_METHOD),
    ranks: str | None = typer.Option(None, help="List of given ranks: a file, or medlore:rank-lists/NAME.", rich_help_panel=_METHOD),
    targets: str | None = typer.Option(None, help="attention, attention+mlp, all-linear, conv, or a pattern.", rich_help_panel=_METHOD),
    granularity: str | None = typer.Option(None, help="projection or fused.", rich_help_panel=_METHOD),
    scale: float | None = typer.Option(None, help="Factor on the stable ranks.", rich_help_panel=_METHOD),
    budget: str | None = typer.Option(None, help="Parameters of all factors: 250000, 0.5M, 2%, uniform:8.", rich_help_panel=_METHOD),
    rank: str | None = typer.Option(
        None, help="Rank of methods with one rank; `equal` has the parameters of sr-lora.", rich_help_panel=_METHOD
    ),
    alpha: str | None = typer.Option(None, help="rank, rank*C, rslora*C or a number.", rich_help_panel=_METHOD),
    partial_update: str | None = typer.Option(None, help="off, nested or single.", rich_help_panel=_METHOD),
    component_masks: str | None = typer.Option(
        None, help="off or shapley: random masks over the components of sr-lora.", rich_help_panel=_METHOD
    ),
    bottleneck: int | None = typer.Option(None, help="Inner width of adapters.", rich_help_panel=_METHOD),
    prompt_length: int | None = typer.Option(None, help="Prompt tokens of vpt.", rich_help_panel=_METHOD),
    last_blocks: int | None = typer.Option(None, help="Blocks that `partial` trains.", rich_help_panel=_METHOD),
    dropout: float | None = typer.Option(None, help="Dropout before the factors.", rich_help_panel=_METHOD),
    epochs: int | None = typer.Option(None, help="Passes over the training images.", rich_help_panel=_TRAINING),
    batch_size: int | None = typer.Option(None, help="Images a step.", rich_help_panel=_TRAINING),
    learning_rate: float | None = typer.Option(
        None, "--learning-rate", "--lr", help="Peak rate; default the method's.", rich_help_panel=_TRAINING
    ),
    weight_decay: float | None = typer.Option(None, help="On matrices.", rich_help_panel=_TRAINING),
    patience: int | None = typer.Option(None, help="Stop after so many epochs without a better score.", rich_help_panel=_TRAINING),
    flip: str | None = typer.Option(None, help="none, horizontal, vertical or both.", rich_help_panel=_TRAINING),
    no_augment: bool = typer.Option(False, "--no-augment", help="Train on the images as they are.", rich_help_panel=_TRAINING),
    seed: int | None = typer.Option(None, help="Seed of head, factors, order and augmentation.", rich_help_panel=_TRAINING),
    precision: str | None = typer.Option(None, help="auto, fp32, bf16 or fp16.", rich_help_panel=_TRAINING),
    device: str | None = typer.Option(None, help="auto, cpu, cuda or mps.", rich_help_panel=_RUN),
    out: Path | None = typer.Option(None, help="Folder of the outputs.", rich_help_panel=_RUN),
    settings: Path | None = typer.Option(None, help="YAML file with any of the settings; flags go before it.", rich_help_panel=_RUN),
    resume: bool = typer.Option(
        False, "--resume", help="Go on after the last finished epoch of a run that was killed.", rich_help_panel=_RUN
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a finished run in --out.", rich_help_panel=_RUN),
    no_checkpoints: bool = typer.Option(False, "--no-checkpoints", help="Write no checkpoint after each epoch.", rich_help_panel=_RUN),
    track: str | None = typer.Option(None, help="none or tensorboard.", rich_help_panel=_RUN),
    track_stable_rank: bool | None = typer.Option(
        None, "--track-stable-rank", help="Follow stable ranks of weights and updates.", rich_help_panel=_RUN
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print settings, sizes and parameters; train nothing.", rich_help_panel=_RUN),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object.", rich_help_panel=_RUN),
) -> None:
    """Tune a pre-trained network on a few labelled images, or a segmenter on about five masks.

    The epoch is chosen on validation images; test images are measured once. With PACK and --cases it is a segmenter that is tuned.
    """
    values: dict[str, Any] = {name: value for name, value in locals().items() if name not in _NOT_SETTINGS}
    from medlore.errors import InputError

    if pack is not None or cases is not None:
        from medlore.commands.screens.tuning_segmenters import tune_on_screen

        named = values.pop("model")
        if pack is not None and named is not None:
            raise InputError("PACK, --model", "both", "one of them", "leave --model out")
        values |= {"region": region, "steps": steps, "patches": {"augment": False} if no_augment else None}
        values |= {"checkpoints": False if no_checkpoints else None}
        tune_on_screen(pack or named, cases, out, file=settings, flags=values, dry_run=dry_run, overwrite=overwrite, as_json=as_json)
        return
    from medlore.commands.screens.progress import ProgressBar
    from medlore.commands.screens.tuning import print_facts, print_json, print_notes, print_report
    from medlore.runs.settings import read_settings, refuse_finished
    from medlore.training.accelerator import is_main_process
    from medlore.tuning.finetune import FinetuneSettings
    from medlore.tuning.finetune import dry_run as look
    from medlore.tuning.finetune import finetune as tune

    for name, text in (("classes", classes), ("mean", mean), ("std", std)):
        values[name] = None if text is None else tuple(part.strip() for part in text.split(","))
    values |= {"augment": False if no_augment else None, "checkpoints": False if no_checkpoints else None}
    chosen = read_settings(FinetuneSettings, settings, **values)
    if dry_run:
        facts = look(chosen)
        if as_json:
            print_json(facts)
        else:
            print_facts(facts)
        return
    if out is None:
        raise InputError("--out", "nothing", "a folder for adapter, report, predictions and curves", "give --out runs/NAME")
    refuse_finished(out, overwrite=overwrite or resume)
    result = tune(chosen, out, resume=resume, watcher=ProgressBar(enabled=not as_json))
    if not is_main_process():
        return
    if as_json:
        print_json({"out": out, "metrics": result.metrics, **result.report})
        return
    print_notes(result.report["notes"])
    print_facts(result.report)
    if "test" in result.report:
        test = result.report["data"]["test"]
        print_report(result.report["test"], title=f"{test['name']}: {test['images']} test images")
