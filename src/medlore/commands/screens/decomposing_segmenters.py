"""What a person sees of a segmentation study: progress on stderr, the table or one JSON object on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medlore.commands.screens.answers import print_json
from medlore.commands.screens.narration import Narrator
from medlore.commands.screens.voice import notes_console
from medlore.decomposing.segmenters.add_expert import add_expert
from medlore.decomposing.segmenters.dry_run import plan_segmenter
from medlore.decomposing.segmenters.study import SegmentationResult, decompose_segmenter


def run_on_screen(study: Path, out: Path, *, only: str | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Run a study and print its table, or print what it would do."""
    with Narrator(notes_console()) as narrator:
        if dry_run:
            found = plan_segmenter(study, out, say=narrator.say, **flags)
            print_plan(found, as_json=as_json)
            return
        done = decompose_segmenter(study, out, only=only, narrate=narrator, say=narrator.say, **flags)
    if as_json:
        print_json({"packs": done.packs, "table": done.table})
        return
    print_result(done)


def add_on_screen(study: Path, out: Path, *, region: str, pack: Path | None, as_json: bool, **flags: Any) -> None:
    """Add one expert to a pack and say where the new pack is."""
    with Narrator(notes_console()) as narrator:
        done = add_expert(study, out, region=region, pack=pack, narrate=narrator, say=narrator.say, **flags)
    if as_json:
        print_json({"packs": done.packs, "table": done.table})
        return
    print_result(done)


def print_plan(found: dict[str, Any], *, as_json: bool) -> None:
    """What a study would do, for people or as one JSON object."""
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False, width=max(Console().width, 100))
    for name, parts in found["cases"].items():
        console.print(f"{name}: " + ", ".join(f"{count} {part}" for part, count in parts.items()))
    for region, count in found["labels"].items():
        console.print(f"{region}: {count} labels, {found['patches'].get(region, 0):.1%} of the patches")
    for name, network in found["networks"].items():
        sizes = ", ".join(f"{part} {count:,}" for part, count in network["parameters"].items())
        console.print(
            f"{name}: {network['state']} ({network['identity']}), {network['steps']} steps, {network['patches']} patches; "
            f"parameters: {sizes}; {network['trainable']:,} trainable, {network['training_bytes'] / 1e6:.0f} MB without maps"
        )
    if "student_share_of_teacher" in found:
        console.print(f"the student has {found['student_share_of_teacher']:.1%} of the teacher's parameters")
        ranks = {region: sorted(layers.values()) for region, layers in found["ranks"].items()}
        console.print("ranks: " + "; ".join(f"{r} {v[0]} to {v[-1]}" for r, v in ranks.items()) + f" {found['ranks_note']}".rstrip())
    console.print(f"device {found['device']}; nothing was trained")


def print_result(done: SegmentationResult) -> None:
    """The table, and where the packs are."""
    console = Console(width=max(Console().width, 100))
    print_tables(done.table, console)
    for name, pack in done.packs.items():
        console.print(f"{name}: {pack}", highlight=False)
    if "pack" in done.packs:
        console.print(
            f"next: medlore info {done.packs['pack']}; medlore segment --model {done.packs['pack']} --image FILE", highlight=False
        )


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    """The test cases, and apart from them what was seen in training."""
    for note in dict.fromkeys(row["note"] for row in rows):
        console.print(_table([row for row in rows if row["note"] == note], note))


def _table(rows: list[dict[str, Any]], note: str) -> Table:
    """One row per label, one column per network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    title = f"Dice on training cases: {note}" if note else "Dice on the test cases"
    table = Table(title=f"{title}, on the network's grid")
    for column in ("list", "label", "cases", *networks):
        table.add_column(column)
    held: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        held.setdefault((row["list"], row["label"]), {"cases": row["cases"]})[row["network"]] = row["dice"]
    for (name, label), found in held.items():
        table.add_row(name, label, str(found["cases"]), *(f"{found[n]:.3f}" if n in found else "" for n in networks))
    return table
