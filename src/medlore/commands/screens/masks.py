"""What `medlore evaluate` prints of measured masks."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json


def print_masks(results: dict[str, Any], *, as_json: bool) -> None:
    """A row per label, or one JSON object."""
    if as_json:
        print_json(results)
        return
    table = Table("label", "modality", "region", "Dice", "surface Dice", box=None, pad_edge=False)
    for row in results.get("by_label", []):
        table.add_row(row["label"], row["modality"], row["region"], f"{row['dice']:.4f}", f"{row['surface_dice']:.4f}")
    if "mean" in results:
        table.add_row("mean", "", "", f"{results['mean']['dice']:.4f}", f"{results['mean']['surface_dice']:.4f}")
    console = Console()
    console.print(table)
    console.print(f"empty masks: {results['empty_masks']}; surface tolerance {results['tolerance_mm']:g} mm; {results['cases']} case(s)")
