"""The cases of the brain part of `medlore:seg-mini`: what finds the brain and its halves, and what looks inside it.

    python studies/seg_mini_brain_cases.py --data ../shared/data --out runs/brain/cases

writes `finder.jsonl` (brain, left and right half, whole heads), `inside.jsonl` (structures) and `hippocampus.jsonl`. Names are
FreeSurfer's, spelt as the vocabulary does; where both sides are asked for at once the name has no side. Maps 01 to 04 are for the
training, 05 stays for development. Splits of the hippocampi are those of `seg_mini_cases.py`.

A structure with a side is not a label of the training: the finder, which sees the whole head, tells the halves apart, and
`left hippocampus` is the hippocampus in the left half. So mirror images double the anatomy that the inner network sees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from seg_mini_cases import HEAD_VALUES, hippocampus_cases

LEFT = [2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 25, 26, 28, 30, 136, 137]
RIGHT = [41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 57, 58, 60, 62, 163, 164]
HALVES = {"left half of the brain": LEFT, "right half of the brain": RIGHT}
FINDER_VALUES: dict[str, list[int]] = {"brain": HEAD_VALUES["brain"], **HALVES}
# Lateral ventricles hold their choroid plexus, as FreeSurfer's users count it with them; 25 and 57 are lesions of the white matter.
NEW_VALUES: dict[str, list[int]] = {
    "cerebral cortex": [3, 42],
    "cerebral white matter": [2, 41, 25, 57],
    "cerebellar cortex": [8, 47],
    "cerebellar white matter": [7, 46],
    "lateral ventricle": [4, 5, 43, 44, 136, 137, 163, 164],
    "third ventricle": [14],
    "fourth ventricle": [15],
    "nucleus accumbens": [26, 58],
    "ventral diencephalon": [28, 60],
}
INSIDE_VALUES: dict[str, list[int]] = {**{k: v for k, v in HEAD_VALUES.items() if k != "spinal cord"}, **NEW_VALUES}


def head_lines(data: Path, values: dict[str, list[int]]) -> list[dict[str, Any]]:
    """One line for each of the four maps of the training."""
    lines = []
    for number in range(1, 5):
        path = str(data / "synthseg" / f"training_seg_0{number}.nii.gz")
        lines.append(
            {
                "image": path, "mask": path, "label": list(values), "mask_values": values, "modality": "mri", "dataset": "SynthSeg_maps",
                "patient": f"head_0{number}", "split": "train", "synthesise": True,
            }
        )  # fmt: skip
    return lines


def hippocampus_lines(data: Path) -> list[dict[str, Any]]:
    """Crops of real MR: their own labels are annotated; all else is unknown, and some cannot be there."""
    absent = ["brainstem", "cerebellum", "cerebellar cortex", "cerebellar white matter", "caudate nucleus", "fourth ventricle"]
    return [{**line, "absent": absent} for line in hippocampus_cases(data)]


def main() -> None:
    """Write the lists."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/brain/cases"), help="folder of the lists")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    from medlore.files import write_text

    lists = {
        "finder": head_lines(data, FINDER_VALUES),
        "inside": head_lines(data, INSIDE_VALUES),
        "hippocampus": hippocampus_lines(data),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        sys.stdout.write(f"{name:12s} {len(lines)} lines, {len(lines[0]['label'])} labels\n")


if __name__ == "__main__":
    main()
