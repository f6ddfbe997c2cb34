"""The pack `medlore:seg-mini` with a first pass: the weights that it has, more prompts, and left and right for all that comes in pairs.

    python -m maintenance.assemble_seg_mini --pack medlore:seg-mini --prompts runs/brain/prompts.safetensors --out runs/brain/pack

Base and experts are copied unchanged. A label that comes in pairs gets two more names, `left X` and `right X`, with the row of X: the
halves of the first pass (`medlore:brain-finder`) separate them. Labels that were fitted and did badly are left out (`--without`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maintenance.seg_mini_prompts import STARTS
from medlore.decomposing.segmenters.packs import smallest_type, without_loss
from medlore.files import read_json
from medlore.models.packs import MANIFEST
from medlore.models.segmenter.bundle import load_segmenter, write_segmenter_pack
from medlore.models.segmenter.prompts import PromptTable

PAIRED = (
    "cerebral cortex", "cerebral white matter", "cerebellar cortex", "cerebellar white matter", "lateral ventricle", "nucleus accumbens",
    "ventral diencephalon", "hippocampus", "amygdala", "thalamus", "caudate nucleus", "putamen", "pallidum",
)  # fmt: skip
FIRST_PASS: dict[str, Any] = {
    "pack": "medlore:brain-finder",
    "brain": "brain",
    "halves": {"left": "left half of the brain", "right": "right half of the brain"},
    "margin_mm": 4.0,
    "least_mm": 110.0,
    "least_ml": 300.0,
    "stripped_ml": 2000.0,
}


def assembled_prompts(known: PromptTable, fitted: PromptTable, *, without: Sequence[str] = ()) -> PromptTable:
    """Known rows as they are (those that were fitted again anew), new ones, and both sides of what comes in pairs."""
    rows = dict(zip(known.keys, known.embeddings, strict=True))
    left_out = {f"mri/{label}" for label in without}
    rows |= {key: row for key, row in zip(fitted.keys, fitted.embeddings, strict=True) if key not in left_out}
    for label in PAIRED:
        if (row := rows.get(f"mri/{label}")) is not None:
            rows |= {f"mri/{side} {label}": row for side in ("left", "right")}
    return PromptTable(tuple(rows), smallest_type(torch.stack([row.half().float() for row in rows.values()])))


def assemble(pack: str, prompts: Path, out: Path, *, without: Sequence[str] = ()) -> Path:
    """Write the pack."""
    bundle = load_segmenter(pack)
    assert bundle.prompts is not None  # noqa: S101  # nosec B101 # it has them
    table = assembled_prompts(bundle.prompts, PromptTable.read(prompts), without=without)
    regions = dict(bundle.preprocessing.get("label_regions", {}))
    new = [key for key in table.keys if key not in bundle.prompts.keys]
    regions |= dict.fromkeys(new, "brain")
    parts = {
        modality: {
            **shares,
            **{f"{side} {label}": share for label, share in shares.items() if label in PAIRED for side in ("left", "right")},
        }
        for modality, shares in bundle.preprocessing.get("parts", {}).items()
    }  # stray parts are dropped before the halves are separated, so left and right make up both
    preprocessing = {**bundle.preprocessing, "label_regions": regions, "parts": parts, "first_pass": FIRST_PASS}
    about = read_json(bundle.source / MANIFEST).get("about", {})
    fitted = [label for label in STARTS if label not in without]
    about = {**about, "first_pass": FIRST_PASS["pack"], "prompts_fitted_to_frozen_weights": fitted}
    return write_segmenter_pack(out, without_loss(bundle.weights), prompts=table, preprocessing=preprocessing, about=about)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", default="medlore:seg-mini", help="whose weights are taken")
    parser.add_argument("--prompts", type=Path, required=True, help="the table of maintenance.seg_mini_prompts")
    parser.add_argument("--without", default="", help="fitted labels that are left out, by comma")
    parser.add_argument("--out", type=Path, required=True, help="the new pack")
    arguments = parser.parse_args(argv)
    sys.stdout.write(
        f"{assemble(arguments.pack, arguments.prompts, arguments.out, without=[w for w in arguments.without.split(',') if w])}\n"
    )


if __name__ == "__main__":
    main()
