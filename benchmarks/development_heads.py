"""Heads for development, and what a pack makes of them: synthetic heads with skull, face and neck at 1 to 5 mm, and the ICBM152 template.

    python -m benchmarks.development_heads write --data ../shared/data --out runs/development
    python -m benchmarks.development_heads finder medlore:brain-finder --heads runs/development
    python -m benchmarks.development_heads table PACK [PACK ...] --heads runs/development --page docs/evidence.md

Whatever is chosen or tuned is chosen here, never on the ten real heads of `benchmarks.real_heads`. The map (05) is in no training. Images
are drawn at 1 mm and stored in blocks of whole millimetres; a voxel of the label map is what most of its block is.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._page import put_section
from benchmarks._volumes import on_another_grid
from medlore.data.volumes.augmentation import along_axes, blur_matrix
from medlore.data.volumes.geometry import Array, spacing_of
from medlore.data.volumes.nifti import Volume, write_nifti
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.synthesis import FIRST_OUTSIDE, SynthesisRules, draw_contrast, strip_skull, synthesise
from medlore.demo.segmentation import template_file, tissue_truth
from medlore.files import read_json, write_json
from medlore.metrics.masks import dice
from medlore.segmenting.first_pass import grown, two_halves
from medlore.segmenting.segmenter import LoadedSegmenter, load_segmenter

HEADING = "## Development heads"
MAP = "training_seg_05.nii.gz"
SIDED = ("cerebral cortex", "cerebellar cortex", "hippocampus", "caudate nucleus")  # whose sides are measured too
MARGIN_MM = 4.0  # that a pack keeps around what a first pass found
NECK_MM = 60  # by how much the longest field of view goes on below the map


@dataclass(frozen=True)
class Recipe:
    """One head.

    Args:
        family: of the contrast: t1, t2, flair or random.
        block: millimetres of a voxel along x y z of the map's storage order.
        seed: of the draws.
        stripped: without what lies outside of the brain.
        neck_mm: of neck below the map.
    """

    family: str
    block: tuple[int, int, int]
    seed: int
    stripped: bool = False
    neck_mm: int = 0


HEADS = {
    "t1 stripped": Recipe("t1", (1, 1, 1), 21, stripped=True),
    "t1": Recipe("t1", (1, 1, 1), 22),
    "t1 3 mm, neck": Recipe("t1", (3, 3, 3), 23, neck_mm=NECK_MM),
    "t1 5 mm slices": Recipe("t1", (1, 5, 1), 24),
    "t2 2 mm": Recipe("t2", (2, 2, 2), 25, neck_mm=NECK_MM),
    "flair 5 mm slices": Recipe("flair", (1, 5, 1), 26),
    "random 2 mm": Recipe("random", (2, 2, 2), 27),
}


def write_heads(data: Path, out: Path, values: dict[str, list[int]]) -> None:
    """Write the heads that are not there, and `truth.json`: label -> codes."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "truth.json", values)
    source = read_volume(data / "synthseg" / MAP)
    codes = np.asarray(np.rint(source.array), np.uint16)
    for name, recipe in HEADS.items():
        image_file, labels_file = files_of(out, name)
        if not (image_file.is_file() and labels_file.is_file()):
            image, labels = made(codes, recipe)
            volume = on_another_grid(source, np.rint(np.clip(image * 4, 0, 4095)).astype(np.int16), _affine(source, recipe.block))
            write_nifti(image_file, volume.array, volume)
            write_nifti(labels_file, labels.astype(np.uint16), volume)
            sys.stderr.write(f"wrote {image_file}\n")


def made(codes: Array, recipe: Recipe) -> tuple[Array, Array]:
    """Image and labels. The map is stored L I A: its second axis runs down."""
    rng = np.random.default_rng([2026, recipe.seed])
    codes = np.pad(codes, [(0, 0), (0, recipe.neck_mm), (0, 0)], mode="edge") if recipe.neck_mm else codes
    chances = {f"{name}_like": float(name == recipe.family) for name in ("t1", "t2", "flair")}
    rules = SynthesisRules(**chances, thick_slices=0.0, blur_voxels=(0.4, 0.6))
    kept = strip_skull(codes, rng, least_share=0.0) if recipe.stripped else codes
    image = synthesise(codes, rng, rules, contrast=draw_contrast(rng, rules), keep=kept > 0 if recipe.stripped else None)
    image = along_axes(image, [blur_matrix(n, 0.4 * b) if b > 1 else None for n, b in zip(image.shape, recipe.block, strict=True)])
    return in_blocks(image, recipe.block, np.mean), in_blocks(kept, recipe.block, most_frequent)


def in_blocks(array: Array, block: Sequence[int], how: Any) -> Array:
    """Blocks of voxels as one voxel each; what does not fill a block is left out."""
    x, y, z = (n // b for n, b in zip(array.shape, block, strict=True))
    a, b, c = block
    parts = array[: x * a, : y * b, : z * c].reshape(x, a, y, b, z, c).transpose(0, 2, 4, 1, 3, 5)
    return np.asarray(how(parts.reshape(x, y, z, a * b * c), axis=-1))


def most_frequent(blocks: Array, axis: int = -1) -> Array:
    """The code that most voxels of a block have; of equally many the smallest."""
    ordered = np.sort(blocks, axis=axis)
    best, most = ordered[..., 0].copy(), np.zeros(ordered.shape[:-1], np.int32)
    run = np.zeros_like(most)
    for k in range(ordered.shape[-1]):
        run = np.where(ordered[..., k] == ordered[..., k - 1], run + 1, 1) if k else run + 1
        longer = run > most
        best[longer], most[longer] = ordered[..., k][longer], run[longer]
    return best


def _affine(source: Volume, block: Sequence[int]) -> Array:
    affine = np.asarray(source.affine, float) @ np.diag([*block, 1]).astype(float)
    affine[:3, 3] += np.asarray(source.affine, float)[:3, :3] @ ((np.asarray(block, float) - 1) / 2)
    return affine


def truths_of(cases: dict[str, Any]) -> dict[str, list[int]]:
    """Label -> codes of the map: structures, halves of the brain, and both sides of some structures."""
    values: dict[str, list[int]] = {**cases["INSIDE_VALUES"], **cases["HALVES"]}
    for label in SIDED:
        for side, half in (("left", cases["LEFT"]), ("right", cases["RIGHT"])):
            values[f"{side} {label}"] = [code for code in values[label] if code in half]
    return values


def files_of(folder: Path, name: str) -> tuple[Path, Path]:
    """Image and label map of a head."""
    stem = name.replace(",", "").replace(" ", "_")
    return folder / f"{stem}.nii.gz", folder / f"{stem}_labels.nii.gz"


def measured(model: LoadedSegmenter, folder: Path) -> dict[str, dict[str, float]]:
    """Head -> label -> Dice, and seconds of the processor."""
    values = {name: list(codes) for name, codes in read_json(folder / "truth.json").items()}
    known = model.labels("mri")
    scores: dict[str, dict[str, float]] = {}
    for name in HEADS:
        image_file, labels_file = files_of(folder, name)
        volume, codes = read_volume(image_file), np.asarray(np.rint(read_volume(labels_file).array), np.int32)
        began = time.process_time()
        labels = [label for label in values if label in known]
        found = model.segment(volume, labels, modality="mri")
        scores[name] = {"seconds": time.process_time() - began}
        scores[name] |= {label: dice(found[label], np.isin(codes, values[label])) for label in labels}
        sys.stderr.write(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores[name].items()) + "\n")
    template = read_volume(template_file())
    truths = {label: truth for label in ("grey matter", "white matter") if (truth := tissue_truth(label)) is not None}
    if set(truths) <= set(known):
        found = model.segment(template, list(truths), modality="mri")
        scores["ICBM152"] = {label: dice(found[label], truth) for label, truth in truths.items()}
    return scores


def finder_table(model: LoadedSegmenter, folder: Path) -> str:
    """What a first pass finds: brain that lies within its margin, what is outside of the skull's inside and does so too, wrong halves."""
    codes_of = {name: list(codes) for name, codes in read_json(folder / "truth.json").items()}
    names = ("brain", "left half of the brain", "right half of the brain")
    lines = [f"| head | brain covered | outside within {MARGIN_MM:.0f} mm, ml | wrong half |", "|---|---|---|---|"]
    for head in HEADS:
        image_file, labels_file = files_of(folder, head)
        volume, codes = read_volume(image_file), np.asarray(np.rint(read_volume(labels_file).array), np.int32)
        found = model.segment(volume, list(names), modality="mri")
        brain, left, right = (np.isin(codes, codes_of[name]) for name in names)
        spacing = spacing_of(volume.affine)
        kept, halves = grown(found[names[0]], MARGIN_MM, spacing), two_halves(volume, *(found[name] for name in names))
        wrong = (halves["left"] & right).sum() + (halves["right"] & left).sum() if halves else (left | right).sum()
        outside = (kept & (codes >= FIRST_OUTSIDE)).sum() * float(np.prod(spacing)) / 1000
        covered = (kept & brain).sum() / brain.sum()
        lines.append(f"| {head} | {covered:.3f} | {outside:.0f} | {100 * wrong / (left | right).sum():.1f} % |")
    return "\n".join([*lines, ""])


def section(results: dict[str, dict[str, dict[str, float]]], command: str) -> str:
    """The section of docs/evidence.md: one table a pack, a column a head."""
    lines = [HEADING, "", f"    {command}", ""]
    lines += ["Dice on the grid of the file. Heads are drawn from a label map that no training saw; ICBM152 is the real template.", ""]
    for pack, scores in results.items():
        heads = list(scores)
        labels = list(dict.fromkeys(label for row in scores.values() for label in row if label != "seconds"))
        lines += [f"| {pack} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {label} | " + " | ".join(f"{scores[h][label]:.3f}" if label in scores[h] else "" for h in heads) + " |" for label in labels
        ]
        lines += ["| mean | " + " | ".join(f"{np.mean([v for k, v in scores[h].items() if k != 'seconds']):.3f}" for h in heads) + " |", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="write the heads")
    write.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the shared data")
    write.add_argument("--out", type=Path, default=Path("runs/development"), help="folder of the heads")
    table = verbs.add_parser("table", help="measure packs")
    table.add_argument("packs", nargs="+", help="pack folders or medlore:NAME")
    table.add_argument("--heads", type=Path, default=Path("runs/development"), help="folder of the heads")
    table.add_argument("--page", type=Path, help="page of results whose section is replaced; else it is printed")
    finder = verbs.add_parser("finder", help="measure a first pass")
    finder.add_argument("pack", help="pack folder or medlore:NAME")
    finder.add_argument("--heads", type=Path, default=Path("runs/development"), help="folder of the heads")
    arguments = parser.parse_args(argv)
    if arguments.verb == "finder":
        sys.stdout.write(finder_table(load_segmenter(arguments.pack), arguments.heads))
        return
    if arguments.verb == "write":
        write_heads(arguments.data, arguments.out, truths_of(runpy.run_path("studies/seg_mini_brain_cases.py")))
        return
    results = {pack: measured(load_segmenter(pack), arguments.heads) for pack in arguments.packs}
    text = section(results, f"python -m benchmarks.development_heads table {' '.join(arguments.packs)} --heads runs/development")
    sys.stdout.write(text) if arguments.page is None else put_section(arguments.page, text)


if __name__ == "__main__":
    main()
