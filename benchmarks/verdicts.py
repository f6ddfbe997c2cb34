"""Does the check notice what is wrong? Verdicts of heads whose labels are known, as they are and with simulated faults.

    python -m benchmarks.verdicts develop --data DIR --json docs/results/verdicts-development.json
    python -m benchmarks.verdicts run --data DIR --json docs/results/verdicts.json        (goes on when run again)
    python -m benchmarks.verdicts table --json docs/results/verdicts.json --page docs/evidence.md

`develop` draws stripped T1 heads from five label maps; every limit of the checks is set there and on the template. `run` reads the ten
heads of `benchmarks.real_heads`, once, when all limits stand: nothing is tuned on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._head_faults import faults
from benchmarks._head_labels import SUBJECTS, Head, read_head
from benchmarks._page import put_section
from benchmarks._volumes import on_another_grid
from benchmarks.development_heads import Recipe, made
from medlore.data.volumes.geometry import bounding_box
from medlore.data.volumes.preparation import read_volume
from medlore.files import read_json, write_json
from medlore.metrics.masks import dice
from medlore.segmenting.segmenter import LoadedSegmenter, load_segmenter

HEADING = "## Does the check notice what is wrong?"
CLEAN = "as it is"
LABELS = (
    "brain", "grey matter", "white matter", "brain ventricle", "thalamus", "caudate nucleus", "putamen", "pallidum", "hippocampus",
    "amygdala", "brainstem", "cerebellum",
)  # fmt: skip
# FreeSurfer's numbers in the label maps -> the numbers of the manual maps, left then right.
_MANUAL = {
    2: 45, 3: 101, 4: 52, 5: 50, 7: 41, 8: 39, 10: 60, 11: 37, 12: 58, 13: 56, 14: 4, 15: 11, 16: 35, 17: 48, 18: 32, 26: 30, 28: 62,
    41: 44, 42: 100, 43: 51, 44: 49, 46: 40, 47: 38, 49: 59, 50: 36, 51: 57, 52: 55, 53: 47, 54: 31, 58: 23, 60: 61, 77: 45,
}  # fmt: skip
_BAD, _MARGIN = 0.5, 12


def development_head(data: Path, number: int) -> Head:
    """A stripped T1 drawn from a label map, in a box around its brain."""
    source = read_volume(data / "synthseg" / f"training_seg_{number:02}.nii.gz")
    image, kept = made(np.asarray(np.rint(source.array), np.uint16), Recipe("t1", (1, 1, 1), 100 + number, stripped=True))
    box = bounding_box(kept > 0)
    assert box is not None
    cut = tuple(slice(max(a - _MARGIN, 0), b + _MARGIN) for a, b in zip(box.start, box.stop, strict=True))
    affine = np.array(source.affine, float)
    affine[:3, 3] += affine[:3, :3] @ np.array([part.start for part in cut])
    grey = np.rint(np.clip(image[cut] * 4, 0, 4095)).astype(np.int16)
    table = np.zeros(int(kept.max()) + 1, np.int32)
    for code, manual in _MANUAL.items():
        if code < len(table):
            table[code] = manual
    return Head(f"map {number:02}", on_another_grid(source, grey, affine), table[kept[cut]])


def measured(model: LoadedSegmenter, head: Head) -> dict[str, Any]:
    """Dice of every structure, and the verdict."""
    began = time.process_time()
    found = model.segment(head.volume, list(LABELS), modality="mri")
    truths = head.truths()
    told = {} if found.verdict is None else found.verdict.record()
    scores = {label: round(dice(found[label], truths[label]), 4) for label in LABELS if truths[label].any()}
    return {"dice": scores, "check": told, "cpu_s": round(time.process_time() - began, 1)}


def cases(data: Path, *, real: bool, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Head and fault, the heads as they are first."""
    del data
    names = SUBJECTS if real else tuple(f"{n}" for n in range(1, 6))
    for fault in (CLEAN, *wanted):
        yield from ((name, fault) for name in names)


def run(data: Path, file: Path, *, real: bool, wanted: Sequence[str], most: int | None) -> None:
    """Measure what the file does not have yet, and write it after each."""
    model = load_segmenter("medlore:seg-mini", device="cpu")
    todo = list(cases(data, real=real, wanted=wanted))
    table = faults(data / "synthseg")
    for at, (name, fault) in enumerate(todo[:most]):
        told: dict[str, Any] = read_json(file) if file.is_file() else {"cases": {}}
        key = f"{name}; {fault}"
        if key in told["cases"]:
            continue
        head = read_head(data / "brain35", name) if real else development_head(data, int(name))
        if fault != CLEAN:
            head = table[fault](head, np.random.default_rng([2026, int(name), list(table).index(fault)]))
        row = measured(model, head)
        told["cases"][key] = row
        write_json(file, told)
        if not real:  # of the ten nothing is shown before all are read
            sys.stderr.write(f"{at + 1}/{len(todo)} {key}: {min(row['dice'].items(), key=lambda e: e[1])} {row['check'].get('says')}\n")


def usual(told: dict[str, Any]) -> dict[str, float]:
    """Structure -> mean Dice over the heads as they are."""
    rows = [row for key, row in told["cases"].items() if key.endswith(f"; {CLEAN}")]
    return {label: statistics.mean(row["dice"][label] for row in rows if label in row["dice"]) for label in LABELS}


def lost(row: dict[str, Any], usually: dict[str, float]) -> list[str]:
    """Structures below half of their usual Dice."""
    return [label for label, value in row["dice"].items() if value < _BAD * usually[label]]


def section(told: dict[str, Any], command: str) -> str:
    """The section of docs/evidence.md."""
    usually = usual(told)
    by_fault: dict[str, list[tuple[str, dict[str, Any], list[str]]]] = {}
    for key, row in told["cases"].items():
        name, fault = key.split("; ", 1)
        by_fault.setdefault(fault, []).append((name, row, lost(row, usually)))
    lines = [HEADING, "", f"    {command}", ""]
    lines += ["| ten real heads | cases | with a structure below half of its usual Dice | of them flagged | the others | of them flagged |"]
    lines += ["|---|---|---|---|---|---|"]
    for fault, rows in by_fault.items():
        lines.append(f"| {fault} | {len(rows)} | {_shares(rows)} |")
    every = [row for rows in by_fault.values() for row in rows]
    lines += [f"| all | {len(every)} | {_shares(every)} |", ""]
    for title, wrong in (("Missed", True), ("Flagged, though no structure is lost", False)):
        found = [
            f"- {name}, {fault}: " + (_named(row, gone) if wrong else "; ".join(row["check"]["says"]))
            for fault, rows in by_fault.items()
            for name, row, gone in rows
            if bool(gone) is wrong and row["check"]["flagged"] is not wrong
        ]
        lines += [f"{title}:", "", *(found or ["- none"]), ""]
    return "\n".join(lines)


def _shares(rows: Sequence[tuple[str, dict[str, Any], list[str]]]) -> str:
    bad = [row["check"]["flagged"] for _, row, gone in rows if gone]
    good = [row["check"]["flagged"] for _, row, gone in rows if not gone]
    return " | ".join(f"{len(part)} | {f'{sum(part)} ({100 * sum(part) / len(part):.0f} %)' if part else ''}" for part in (bad, good))


def _named(row: dict[str, Any], gone: Sequence[str]) -> str:
    return ", ".join(f"{label} {row['dice'][label]:.2f}" for label in gone)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, about in (("develop", "heads drawn from label maps"), ("run", "the ten real heads")):
        one = verbs.add_parser(verb, help=about)
        one.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the shared data")
        one.add_argument("--faults", default="", help="names of faults with commas; none unless given")
        one.add_argument("--most", type=int, help="stop after so many cases of the list")
        one.add_argument("--json", type=Path, required=True, help="raw results")
    page = verbs.add_parser("table", help="the section of the page of results")
    page.add_argument("--json", type=Path, required=True, help="raw results")
    page.add_argument("--page", type=Path, help="page of results whose section is replaced; else it is printed")
    told = parser.parse_args(argv)
    if told.verb == "table":
        text = section(read_json(told.json), "python -m benchmarks.verdicts run --data DIR --faults NAMES, then `table`")
        sys.stdout.write(text) if told.page is None else put_section(told.page, text)
        return
    wanted = [name for name in told.faults.split(",") if name]
    run(told.data, told.json, real=told.verb == "run", wanted=wanted, most=told.most)


if __name__ == "__main__":
    main()
