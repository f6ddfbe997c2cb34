"""A small study of made-up volumes: a bright ball in the brain and a bright box in the abdomen."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

SIZES = (
    "{features: [4, 8, 8], patch: 4, query_width: 16, projection_width: 16, mask_width: 16, feedforward: 16, heads: 2, decoder_layers: 1%s}"
)
STUDY = f"""kind: segmenter
name: tiny
data:
  - {{name: brain, cases: brain.jsonl, licence: made up}}
  - {{name: belly, cases: belly.jsonl, licence: made up, note: made up}}
patch_size: [16, 16, 16]
max_prompts: 3
preprocessing: {{spacing_mm: [1, 1, 1], roi_size: [16, 16, 16]}}
teacher: {{steps: 6, batch_size: 2, learning_rate: 3.0e-3, ema: 0.9, sizes: {SIZES % ", deep_widths: [8]"}}}
student: {{steps: 6, batch_size: 2, learning_rate: 3.0e-3, sizes: {SIZES % ""}}}
experts: {{rank: 2}}
variants: [teacher, shared, single, experts]
validation_cases: 1
checkpoint_minutes: 0
"""


def write_study(folder: Path, *, cases: int = 4) -> Path:
    """Volumes, masks, lists and the study file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in (("brain", {"hippocampus": [1], "brainstem": [2]}), ("belly", {"liver": [1]})):
        lines = [write_case(folder, f"{name}{number}", labels, number) for number in range(cases)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    return folder / "study.yaml"


def write_case(folder: Path, name: str, labels: dict[str, list[int]], number: int) -> dict[str, object]:
    """One volume of 20 voxels a side whose labels are brighter than the rest; returns its line."""
    rng = np.random.default_rng([number, len(name)])
    codes = np.zeros((20, 20, 20), np.uint8)
    place = np.indices(codes.shape) - rng.integers(7, 12, (3, 1, 1, 1))
    codes[(place**2).sum(0) < 20] = 1
    if len(labels) > 1:
        codes[:4, :4, :4] = 2
    grey = rng.normal(100, 5, codes.shape) + 80 * (codes == 1) + 40 * (codes == 2)
    for suffix, array in (("", grey.astype(np.float32)), ("_mask", codes)):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{suffix}.nii.gz")
    split = ("train", "train", "validation", "test")[number % 4]
    line = {"image": f"{name}.nii.gz", "mask": f"{name}_mask.nii.gz", "label": list(labels), "mask_values": labels}
    return {**line, "modality": "mri", "patient": name, "split": split}
