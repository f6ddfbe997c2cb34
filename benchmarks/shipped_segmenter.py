"""A trained segmenter pack against k-means of the grey values, on volumes that its training has not seen.

    python studies/seg_mini_cases.py --data DIR --out runs/seg-mini/cases
    python -m benchmarks.shipped_segmenter --pack medlore:seg-mini --cases runs/seg-mini/cases --page docs/evidence.md

Template: the ICBM152 T1 template, skull-stripped, against its tissue maps above one half. Heads: whole heads of seven contrasts, drawn
from a label map that was kept out of the training. Hippocampi: crops of 40 patients that were kept out. K-means has three classes and
takes for each tissue the class that fits the truth best; once it sees the image as it is, once inside the true mask of the brain,
which no user has. Tissues are reported with their borders redrawn by grey values, as the pack does it, and as the network alone has them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._page import put_section
from medlore.data.volumes.cases import Case, read_cases
from medlore.data.volumes.geometry import Array, resampling_to
from medlore.data.volumes.masks import read_masks
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.demo.segmentation import template_file, tissue_truth
from medlore.demo.tissue_baseline import best_dice, kmeans_classes
from medlore.metrics.masks import dice
from medlore.segmenting.planner import Planner
from medlore.segmenting.segmenter import LoadedSegmenter, Masks, load_segmenter

TISSUES = ("grey matter", "white matter")
NUCLEI = ("brain ventricle", "thalamus", "caudate nucleus", "putamen", "pallidum", "amygdala", "hippocampus", "brainstem", "cerebellum")
HIPPOCAMPUS = ("hippocampus", "anterior hippocampus", "posterior hippocampus")
HEADING = "## seg-mini on volumes that it has not seen"


@dataclass(frozen=True)
class Row:
    """One label of one volume: Dice of the pack; for tissues also of its network alone, of k-means, and of k-means inside the brain."""

    volume: str
    label: str
    dice: float
    network: float | None = None
    kmeans: float | None = None
    kmeans_in_brain: float | None = None


def template_rows(model: LoadedSegmenter) -> list[Row]:
    """Grey and white matter of the ICBM152 template."""
    volume = read_volume(template_file())
    found, alone = model.segment(volume, list(TISSUES), modality="mri"), network_alone(model, volume)
    classes = kmeans_classes(volume.array, volume.array > 0)
    truths = [(label, truth) for label in TISSUES if (truth := tissue_truth(label)) is not None]
    return [Row("ICBM152", label, dice(found[label], t), dice(alone[label], t), *(2 * (best_dice(classes, t),))) for label, t in truths]


def network_alone(model: LoadedSegmenter, volume: Volume) -> Masks:
    """Tissues without their borders redrawn."""
    planner = model.model.planner
    model.model.planner = Planner(planner.facts, planner.hardware, replace(planner.choices, redraw_tissues=False))
    try:
        return model.segment(volume, list(TISSUES), modality="mri")
    finally:
        model.model.planner = planner


def head_rows(model: LoadedSegmenter, case: Case) -> list[Row]:
    """Tissues and nuclei of a synthesised head whose label map is known."""
    volume = read_volume(case.image)
    truths = truths_of(case, volume)
    labels = [label for label in (*TISSUES, *NUCLEI) if label in truths]
    found, alone = model.segment(volume, labels, modality="mri"), network_alone(model, volume)
    whole, brain = (kmeans_classes(volume.array, inside) for inside in (volume.array > 0, truths["brain"] | truths["cerebrospinal fluid"]))
    name = str(case.dataset).removeprefix("synthesised_")
    rows = []
    for label in labels:
        trivial = [dice(alone[label], truths[label]), *(best_dice(c, truths[label]) for c in (whole, brain))] if label in TISSUES else []
        rows.append(Row(name, label, dice(found[label], truths[label]), *trivial))
    return rows


def hippocampus_rows(model: LoadedSegmenter, case: Case) -> list[Row]:
    """Three labels of a crop around one hippocampus."""
    volume = read_volume(case.image)
    truths = truths_of(case, volume)
    found = model.segment(volume, list(HIPPOCAMPUS), modality="mri")
    return [Row(str(case.dataset), label, dice(found.segmentation.mask(label), truths[label])) for label in HIPPOCAMPUS]


def grid_ceiling(spacing_mm: float) -> list[float]:
    """Dice of the template's own tissues after a hard mask of them on another grid: what no network without redrawn borders passes."""
    volume, found = read_volume(template_file()), []
    there = resampling_to((spacing_mm,) * 3, volume.affine, volume.shape)
    back = resampling_to((1.0,) * 3, there.apply_to_affine(volume.affine), there.new_shape)
    for label in TISSUES:
        if (truth := tissue_truth(label)) is not None:
            coarse = (there.apply(truth.astype(np.float32)) > 0.5).astype(np.float32)
            again = np.zeros(truth.shape, bool)
            fine = back.apply(coarse)[: truth.shape[0], : truth.shape[1], : truth.shape[2]] > 0.5
            again[: fine.shape[0], : fine.shape[1], : fine.shape[2]] = fine
            found.append(dice(again, truth))
    return found


def stray_ml(found: Array, truth: Array, voxel_ml: float) -> float:
    """Volume of the largest connected part of an answer that does not touch the truth, in millilitres."""
    from scipy import ndimage

    parts, count = ndimage.label(found)
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)
    sizes[0] = 0
    sizes[np.unique(parts[truth])] = 0
    return float(sizes.max(initial=0)) * voxel_ml


def truths_of(case: Case, volume: Volume) -> dict[str, Array]:
    """Label -> Boolean mask on the volume's grid."""
    maps = read_masks(case, volume)
    return {label: np.isin(maps.codes, codes) for label, codes in maps.members.items()}


def stray_hippocampus(model: LoadedSegmenter, case: Case) -> float:
    """The largest part called hippocampus, in a whole head, that touches none."""
    volume = read_volume(case.image)
    found = model.segment(volume, ["hippocampus"], modality="mri").segmentation
    return stray_ml(found.mask("hippocampus"), truths_of(case, volume)["hippocampus"], found.voxel_ml())


def held_out(folder: Path, name: str) -> list[Case]:
    """Test cases of a list of `studies/seg_mini_cases.py`."""
    return [case for case in read_cases(folder / f"{name}.jsonl") if case.other.get("split") == "test"]


def mean(rows: Sequence[Row], label: str, volume: str | None = None) -> float:
    """Mean Dice of a label."""
    return float(np.mean([row.dice for row in rows if row.label == label and volume in (None, row.volume)]))


def section(record: dict[str, Any], command: str) -> str:
    """The section of docs/evidence.md."""
    rows: list[Row] = record["rows"]
    heads = list(dict.fromkeys(row.volume for row in rows if row.kmeans is not None))
    lines = [
        HEADING,
        "",
        f"    {command}",
        "",
        f"Pack {record['pack']}, {record['precision']}. Dice; in brackets the network alone, without redrawn borders, then three-class",
        "k-means of the image as it is, and inside the true mask of the brain, each tissue by the class that fits the truth best. ICBM152:",
        "the real template, truth is its tissue maps above one half. The others are whole heads synthesised from a label map that no",
        "training saw; they cannot show lesions, atrophy and artefacts of real scanners.",
        "",
        "| head | grey matter | white matter | " + " | ".join(NUCLEI) + " |",
        "|---" * (3 + len(NUCLEI)) + "|",
    ]
    by = {(row.volume, row.label): row for row in rows}
    for head in heads:
        cells = [
            f"{row.dice:.3f} ({row.network:.3f}; {row.kmeans:.3f}, {row.kmeans_in_brain:.3f})"
            for row in (by[head, label] for label in TISSUES)
        ]
        cells += [f"{by[head, label].dice:.2f}" if (head, label) in by else "" for label in NUCLEI]
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    crops = [row for row in rows if row.volume == record["crops"]]
    crop_scores = ", ".join(f"{label} {mean(crops, label):.3f}" for label in HIPPOCAMPUS)
    lines += [
        "",
        f"Hippocampi of {len(crops) // len(HIPPOCAMPUS)} held-out patients (crops, real MR): mean Dice {crop_scores}.",
        "A mask of the template's tissues that is right on a coarser grid has, brought back, Dice "
        + "; ".join(f"{grey:.3f} grey and {white:.3f} white at {mm} mm" for mm, (grey, white) in record["ceiling"].items())
        + ".",
        f"Largest part called hippocampus that touches none, over the whole heads: {record['stray_ml']:.2f} ml.",
        f"{record['seconds']:.1f} s a whole head with {len(TISSUES) + len(NUCLEI)} labels (this machine, other work beside it).",
    ]
    return "\n".join([*lines, ""])


def measure(model: LoadedSegmenter, cases: Path, pack: str, *, patients: int) -> dict[str, Any]:
    """Everything that the section reports."""
    rows = template_rows(model)
    heads = held_out(cases, "synthesised")
    for case in heads:
        rows += head_rows(model, case)
        sys.stderr.write(
            f"{case.dataset}: " + ", ".join(f"{r.label} {r.dice:.3f}" for r in rows if str(case.dataset).endswith(r.volume)) + "\n"
        )
    head, began = read_volume(heads[0].image), time.perf_counter()
    model.segment(head, [*TISSUES, *NUCLEI], modality="mri")
    seconds = time.perf_counter() - began
    crops = held_out(cases, "hippocampus")[:patients]
    for case in crops:
        rows += hippocampus_rows(model, case)
    stray = max(stray_hippocampus(model, case) for case in heads)
    name = str(crops[0].dataset) if crops else ""
    ceiling = {mm: grid_ceiling(mm) for mm in (1.25, 1.5)}
    return {
        "pack": pack,
        "precision": model.model.precision,
        "rows": rows,
        "stray_ml": stray,
        "seconds": seconds,
        "crops": name,
        "ceiling": ceiling,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="medlore:seg-mini", help="pack folder or medlore:NAME")
    parser.add_argument("--cases", type=Path, required=True, help="folder of studies/seg_mini_cases.py")
    parser.add_argument("--patients", type=int, default=40, help="at most so many crops of a hippocampus")
    parser.add_argument("--page", type=Path, help="page of results whose section is replaced; else it is printed")
    arguments = parser.parse_args(argv)
    record = measure(load_segmenter(arguments.pack), arguments.cases, arguments.pack, patients=arguments.patients)
    command = f"python -m benchmarks.shipped_segmenter --pack {arguments.pack} --cases runs/seg-mini/cases"
    text = section(record, command)
    if arguments.page is None:
        sys.stdout.write(text)
    else:
        put_section(arguments.page, text)


if __name__ == "__main__":
    main()
