"""What `medlore export` prints."""

from __future__ import annotations

import shlex
from typing import Any

from medlore.commands.screens.answers import print_json, print_line, print_notes


def print_export(summary: dict[str, Any], *, as_json: bool) -> None:
    """The summary for people on stdout and the notes on stderr, or one JSON object."""
    if as_json:
        print_json(summary)
        return
    print_notes(summary["notes"])
    what = f"{summary['name']}, {summary['parameters']:,} parameters" if "parameters" in summary else summary["name"]
    print_line(f"{summary['out']}: {what}, {summary['prompts']} prompts")


def print_bundle(summary: dict[str, Any], *, as_json: bool) -> None:
    """What a MONAI bundle holds and how it is run, or one JSON object."""
    if as_json:
        print_json(summary)
        return
    print_notes(summary["notes"])
    print_line(f"{summary['out']}: {len(summary['labels'])} labels of {summary['expert'] or 'all regions'} ({summary['modality']})")
    print_line(
        f"run: cd {shlex.quote(summary['out'])} && python -m monai.bundle run --config_file configs/inference.json --image IMAGE.nii.gz"
    )


def print_classifier_export(summary: dict[str, Any], *, as_json: bool) -> None:
    """One line per file for people, or one JSON object."""
    if as_json:
        print_json(summary)
        return
    print_line(f"{summary['out']}: expert {summary['expert']}, {summary['format']}")
    for name in summary["files"]:
        print_line(f"  {name}")
    print_line(f"largest difference from the pack's own output: {summary['largest_difference']:.1e}")
