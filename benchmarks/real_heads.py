"""Segmenters and what costs nothing, on ten real skull-stripped T1 of adults with manual labels (`brain35` of the shared data).

    python -m benchmarks.real_heads run seg-mini --data DIR --json docs/results/real-heads.json    (one method; goes on when run again)
    python -m benchmarks.real_heads table --json docs/results/real-heads.json --page docs/evidence.md
    python -m benchmarks.real_heads orient --data DIR         the public networks on the template, in several orientations

Nothing is tuned on these ten: development happens on synthetic heads and on the template, and the ten are read seldom. Each reading of a
pack is a row of its own (`--as NAME`), with its date. Seconds are of the processor, memory is the largest of the process.
"""

from __future__ import annotations

import argparse
import datetime as dt
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._head_labels import STRUCTURES, SUBJECTS, confusion, read_head, scores
from benchmarks._head_methods import Method, atlas_method, kmeans, masks_of_classes, meshnet_method, pack_method
from benchmarks._meshnet import classes_of, conformed, read_meshnet, restored
from benchmarks._page import put_section
from medlore.data.volumes.preparation import read_volume
from medlore.demo.segmentation import template_file, tissue_truth
from medlore.files import read_json, write_json
from medlore.metrics.masks import dice

HEADING = "## Ten real heads with manual labels"
# Name -> how to make it of the folder of the shared data.
METHODS: dict[str, Callable[[Path], Method]] = {
    "k-means in the mask": lambda _data: kmeans,
    "one affine atlas": lambda data: atlas_method(data / "brain35", 1),
    "vote of three atlases": lambda data: atlas_method(data / "brain35", 3),
    "MeshNet 3 classes": lambda data: meshnet_method(data / "weights" / "model20chan3cls"),
    "MeshNet 18 classes": lambda data: meshnet_method(data / "weights" / "meshnet30_18cls"),
    "MeshNet 50 classes": lambda data: meshnet_method(data / "weights" / "model30chan50cls"),
    "seg-mini": lambda _data: pack_method("medlore:seg-mini"),
}
_ORIENTATIONS = ("LIA", "AIL", "RAS", "LAS", "RIA", "LSA", "LIP")


def run(name: str, method: Method, data: Path, file: Path, subjects: Sequence[str]) -> None:
    """Measure the subjects that the file does not have yet, and write it after each."""
    record: dict[str, Any] = read_json(file) if file.is_file() else {"methods": {}}
    entry = record["methods"].setdefault(name, {"read": dt.date.today().isoformat(), "subjects": {}})
    for subject in [s for s in subjects if s not in entry["subjects"]]:
        head = read_head(data / "brain35", subject)
        began, wall = time.process_time(), time.perf_counter()
        answers = method(head)
        spent = {"cpu_s": round(time.process_time() - began, 1), "wall_s": round(time.perf_counter() - wall, 1)}
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        row = {"scores": scores(head, answers), "confusion": confusion(head, answers.sided), **spent, "peak_mib": memory}
        record = read_json(file) if file.is_file() else record  # another method may have written meanwhile
        entry = record["methods"].setdefault(name, {"read": dt.date.today().isoformat(), "subjects": {}})
        entry["subjects"][subject] = row
        write_json(file, record)
        sys.stderr.write(f"{name}, {subject}: " + ", ".join(f"{k} {v['dice']:.3f}" for k, v in row["scores"].items()) + f" {spent}\n")


def orient(data: Path, model: str) -> None:
    """Dice of a MeshNet's tissues on the template for each way to lay the axes."""
    layers, names = read_meshnet(data / "weights" / model)
    volume = read_volume(template_file())
    for orientation in _ORIENTATIONS:
        labels = restored(classes_of(layers, conformed(volume, orientation)), volume, orientation)
        masks = dict(masks_of_classes(labels, names))
        found = {}
        for label, part in (("grey matter", "cerebral cortex"), ("white matter", "cerebral white matter")):
            mask, truth = masks.get(label, masks.get(part)), tissue_truth(label)
            if mask is not None and truth is not None:
                found[label] = round(dice(mask, truth), 3)
        sys.stdout.write(f"{model} {orientation}: {found}\n")
        sys.stdout.flush()


def section(record: dict[str, Any], command: str) -> str:
    """The section of docs/evidence.md: Dice, then volumes, stray parts and costs."""
    read = {name: entry["subjects"] for name, entry in record["methods"].items() if entry["subjects"]}
    most = max(len(subjects) for subjects in read.values())
    full = [set(subjects) for subjects in read.values() if len(subjects) >= most / 2]
    common = set.intersection(*full)
    methods = {
        name if len(rows) >= most / 2 else f"({name})": {s: row for s, row in rows.items() if s in common}
        if len(rows) >= most / 2
        else rows
        for name, rows in read.items()
    }
    names = list(methods)
    lines = [
        HEADING,
        "",
        f"    {command}",
        "",
        "Skull-stripped T1 of ten adults, 1 mm, manual labels (Neuromorphometrics, MICCAI 2012), which nothing here was trained or tuned",
        "on but the atlases (leave one out). Mean Dice over the subjects; the best of a row is bold. The manual cortex holds sulcal fluid:",
        "rows `without fluid` leave out what is darker than midway between ventricle and cortex. Grey matter is cortex, hippocampus,",
        "amygdala and deep nuclei but the pallidum; white matter holds pallidum, ventral diencephalon and brainstem. Raw numbers:",
        f"docs/results/real-heads.json. Means are over the {len(common)} subject(s) that all methods have; a method in brackets was read",
        "on fewer (last table), and nothing of it is compared.",
        "",
        "| Dice | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [_row(structure, methods, "dice", "{:.3f}", best=True) for structure in STRUCTURES]
    lines += ["", "Volume ratio (answer to truth, mean):", "", "| ratio | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [_row(structure, methods, "volume_ratio", "{:.2f}") for structure in STRUCTURES]
    lines += ["", "Stray parts, which touch no truth, in millilitres (mean; largest subject):", ""]
    lines += ["| ml | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [_row(structure, methods, "stray_ml", "{:.1f}", spread=True) for structure in STRUCTURES]
    lines += ["", "| method | subjects | read | right and left confused | processor seconds | MiB |", "|---|---|---|---|---|---|"]
    for name, subjects in read.items():
        rows = list(subjects.values())
        sides = [row["confusion"] for row in rows if row["confusion"] is not None]
        confused = f"{100 * statistics.mean(sides):.2f} %" if sides else "no sides"
        seconds = statistics.mean(row["cpu_s"] for row in rows)
        memory = max(row["peak_mib"] for row in rows)
        lines.append(f"| {name} | {len(rows)} | {record['methods'][name]['read']} | {confused} | {seconds:.0f} | {memory} |")
    return "\n".join([*lines, ""])


def _row(structure: str, methods: dict[str, Any], what: str, form: str, *, best: bool = False, spread: bool = False) -> str:
    cells: list[tuple[float, str] | None] = []
    for subjects in methods.values():
        values = [row["scores"][structure][what] for row in subjects.values() if structure in row["scores"]]
        text = form.format(statistics.mean(values)) if values else ""
        cells.append((statistics.mean(values), text + (f"; {form.format(max(values))}" if spread else "")) if values else None)
    compared = [cell for cell, name in zip(cells, methods, strict=True) if cell is not None and not name.startswith("(")]
    top = max((cell[0] for cell in compared), default=None)
    texts = ["" if cell is None else f"**{cell[1]}**" if best and cell[0] == top else cell[1] for cell in cells]
    return f"| {structure} | " + " | ".join(texts) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("run", help="one method on the ten heads")
    one.add_argument("method", help=f"{', '.join(METHODS)}, or a pack's folder")
    one.add_argument("--as", dest="name", help="the row's name, for a pack")
    one.add_argument("--subjects", default=",".join(SUBJECTS), help="some of the ten")
    page = verbs.add_parser("table", help="the section of the page of results")
    page.add_argument("--page", type=Path, help="page of results whose section is replaced; else it is printed")
    which = verbs.add_parser("orient", help="a MeshNet on the template, in several orientations")
    which.add_argument("--model", default="model20chan3cls", help="folder of the network")
    for verb in (one, which):
        verb.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the shared data")
    for verb in (one, page):
        verb.add_argument("--json", type=Path, default=Path("docs/results/real-heads.json"), help="raw results")
    arguments = parser.parse_args(argv)
    if arguments.verb == "orient":
        orient(arguments.data, arguments.model)
    elif arguments.verb == "run":
        make = METHODS.get(arguments.method)
        method = pack_method(arguments.method) if make is None else make(arguments.data)
        run(arguments.name or arguments.method, method, arguments.data, arguments.json, arguments.subjects.split(","))
    else:
        text = section(read_json(arguments.json), "python -m benchmarks.real_heads run METHOD --data DIR, then `table`")
        sys.stdout.write(text) if arguments.page is None else put_section(arguments.page, text)


if __name__ == "__main__":
    main()
