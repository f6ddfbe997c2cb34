"""What the demo prints: plan, tables, and the commands to go on with; or one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json
from medlore.commands.screens.ranks import print_plan
from medlore.demo.demo import DemoResult
from medlore.demo.tuning import LABELS

_NEXT = """
With your own images (a folder with one subfolder for each class):
  medlore finetune --data FOLDER --shots 5 --method sr-lora --out runs/mine
  medlore predict runs/mine NEW_IMAGES --out predictions.csv
Ranks for a model of your own, and a PEFT configuration with them:
  medlore ranks model.safetensors --plot ranks.png --out plan.json --peft lora
Masks of your own volumes, by the names of structures, and a page to look at them:
  medlore segment --image IMAGE.nii.gz --labels "grey matter,hippocampus" --modality mri --model medlore:seg-mini --out masks
  medlore view masks --open"""


def print_demo(result: DemoResult, *, as_json: bool) -> None:
    """Plan, table and the commands to go on with; or one JSON object."""
    if as_json:
        print_json(_as_json(result))
        return
    print_plan(result.plan, {}, full=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    console.print(_table(result))
    if result.settings.draws > 1:
        console.print(f"Where the interval of a difference includes zero, {result.settings.draws} draws do not separate the two methods.")
    console.print()
    _print_segmentation(console, result.segmentation)
    memory = f"{result.peak_memory_bytes / 2**30:.2f} GiB at most"
    console.print(f"{result.seconds:.0f} s, {memory}; everything on one page: {result.files['page']}", markup=False)
    console.print(_NEXT, markup=False)


def _print_segmentation(console: Console, segmentation: dict[str, Any]) -> None:
    if "left_out" in segmentation:
        console.print(f"Segmentation: left out. {segmentation['left_out']}.", markup=False)
        return
    table = Table(title=f"ICBM152 template by text prompts, {segmentation['seconds']:.0f} s", title_justify="left")
    table.add_column("label", no_wrap=True)
    for head in ("volume", "Dice", "Dice of k-means"):
        table.add_column(head, justify="right")
    for row in segmentation["labels"]:
        numbers = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("dice", "kmeans_dice")]
        table.add_row(row["label"], f"{row['volume_ml']:,.1f} ml", *numbers)
    console.print(table)


def _table(result: DemoResult) -> Table:
    settings, measure = result.settings, result.cells[0].measure.replace("_", " ")
    draws = f"{settings.draws} draw" + ("s" if settings.draws > 1 else "")
    table = Table(title=f"{measure}, {settings.shots} labelled images per digit, {draws}", title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("trained", justify="right")
    table.add_column("mean (95 %)", no_wrap=True)
    table.add_column("sr-lora minus it", no_wrap=True)
    for row in result.table:
        table.add_row(LABELS[row.contender], f"{row.trained:,}", str(row.score), "" if row.difference is None else str(row.difference))
    if result.majority is not None:
        table.add_row("majority class", "0", f"{result.majority:.3f}", "")
    return table


def _as_json(result: DemoResult) -> dict[str, Any]:
    return {
        "settings": result.settings.model_dump(mode="json"),
        "ranks": {layer.name: layer.rank for layer in result.plan.layers},
        "factor_parameters": result.plan.parameters,
        "uniform_rank": result.plan.uniform_rank,
        "table": [asdict(row) for row in result.table],
        "cells": [asdict(cell) for cell in result.cells],
        "majority": result.majority,
        "segmentation": result.segmentation,
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": result.seconds,
        "files": result.files,
    }
