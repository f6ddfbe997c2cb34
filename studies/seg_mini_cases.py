"""The cases of the shipped segmenter `medlore:seg-mini`: which volumes, which labels, which split.

    python studies/seg_mini_cases.py --data ../shared/data --out runs/seg-mini/cases

writes `cases.jsonl` (all sets), one jsonl a set, and `heads/`: whole heads of several contrasts, synthesised from the label
maps with fixed seeds, for validation (a map of the training) and for the test (map 05, which no training sees).

How tissues are composed. The bar is Dice against the ICBM152 tissue maps above one half, so grey and white matter are put
together from FreeSurfer's structures as those maps have them (measured in the maps: mean grey / white probability of the
structure's core). Grey: cerebral and cerebellar cortex, caudate (.97/.03), putamen (.67/.32), thalamus (.45 to .93 / .06 to
.54), hippocampus (.95/.00), amygdala (.99/.00), accumbens (.99/.00). White: cerebral and cerebellar white matter with its
lesions, pallidum (.21/.79; anatomically it is grey), ventral diencephalon (.25/.74), and the brainstem, which the maps
split in two (.54/.45). Fluid around the brain, ventricles, choroid plexus, optic chiasm and vessels are neither.

Splits. Hippocampus: 140 / 20 / 40 patients by a seeded shuffle. Heads: maps 01 to 04 train, 05 test. CT, torso MR and spine:
one or a few volumes without a held-out patient; they are demonstrations and stay out of the headline table.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

FLUID = [4, 5, 14, 15, 43, 44, 72]
PLEXUS = [136, 137, 163, 164]
HIPPOCAMPUS = [17, 53]
# The rest of FreeSurfer's codes: 2 and 41 cerebral white matter, 3 and 42 cortex, 7 and 46 / 8 and 47 white matter and
# cortex of the cerebellum, 16 brainstem, 24 fluid around the brain, 25 and 57 lesions, 26 and 58 accumbens, 28 and 60
# ventral diencephalon. In these maps 136, 137, 163 and 164 are choroid plexus, and 512 is the spinal cord.
HEAD_VALUES: dict[str, list[int]] = {
    "grey matter": [3, 42, 8, 47, 10, 49, 11, 50, 12, 51, *HIPPOCAMPUS, 18, 54, 26, 58],
    "white matter": [2, 41, 7, 46, 25, 57, 13, 52, 16, 28, 60],
    "brain ventricle": [*FLUID, *PLEXUS],
    "cerebrospinal fluid": [24, *FLUID],
    "hippocampus": HIPPOCAMPUS,
    "thalamus": [10, 49],
    "caudate nucleus": [11, 50],
    "putamen": [12, 51],
    "pallidum": [13, 52],
    "amygdala": [18, 54],
    "brainstem": [16],
    "cerebellum": [7, 8, 46, 47],
    "spinal cord": [512],
}
HEAD_VALUES["brain"] = sorted({c for name in ("grey matter", "white matter", "brain ventricle") for c in HEAD_VALUES[name]} | {85, 30, 62})
# Regions of labels that the vocabulary does not know (or counts to another region than the brain's expert).
LABEL_REGIONS = dict.fromkeys(("cerebrospinal fluid", "caudate nucleus", "putamen", "pallidum", "brain"), "brain")
HIPPOCAMPUS_VALUES = {"hippocampus": [1, 2], "anterior hippocampus": [1], "posterior hippocampus": [2]}
DEEP = ["hippocampus", "anterior hippocampus", "posterior hippocampus", "thalamus", "caudate nucleus", "putamen", "pallidum", "amygdala"]
BRAIN = [*DEEP, "grey matter", "white matter", "brain ventricle", "brainstem", "cerebellum", "brain"]

# TotalSegmentator's names -> the vocabulary's; left and right and the pieces of an organ become one label.
MERGED = {
    r"vertebrae(_.*)?": "vertebrae", r"rib_.*": "rib", r"lung_.*": "lung", r"costal_cartilages": "costal cartilage",
    r"intervertebral_discs": "intervertebral discs", r"(.*)_(left|right)": r"\1",
}  # fmt: skip
TORSO_MR = ["spleen", "kidney", "gallbladder", "liver", "stomach", "pancreas", "aorta", "inferior vena cava", "vertebrae", "spinal cord"]

# name -> family of the contrast, seed, skull stripped
HELD_OUT_HEADS = {
    "t1_stripped": ("t1", 1, True), "t1": ("t1", 2, False), "t2": ("t2", 3, False), "flair": ("flair", 4, False),
    "random_1": ("random", 5, False), "random_2": ("random", 6, False), "random_stripped": ("random", 7, True),
}  # fmt: skip
VALIDATION_HEADS = {"t1_stripped": ("t1", 11, True), "t1": ("t1", 12, False), "random": ("random", 13, False)}


def hippocampus_cases(data: Path) -> list[dict[str, Any]]:
    """200 crops around a hippocampus, two structures."""
    names = sorted(p.name for p in (data / "hippocampus" / "images").glob("*.nii.gz"))
    random.Random(2025).shuffle(names)
    lines = []
    for number, name in enumerate(names):
        split = "train" if number < 140 else "validation" if number < 160 else "test"
        lines.append(
            {
                "image": str(data / "hippocampus" / "images" / name),
                "mask": str(data / "hippocampus" / "labels" / name),
                "label": list(HIPPOCAMPUS_VALUES),
                "mask_values": HIPPOCAMPUS_VALUES,
                "modality": "mri",
                "dataset": "MSD_Hippocampus",
                "patient": name.split(".")[0],
                "split": split,
                "absent": ["spinal cord"],
            }
        )
    return sorted(lines, key=lambda line: line["image"])


def head_cases(data: Path) -> list[dict[str, Any]]:
    """Whole heads as label maps: images are drawn from them. Map 05 is only used through `heads/`."""
    return [_head_line(data / "synthseg" / f"training_seg_0{n}.nii.gz", n, "train") | {"synthesise": True} for n in range(1, 5)]


def torso_cases(data: Path) -> list[dict[str, Any]]:
    """One CT of the trunk with TotalSegmentator's own output as reference, and one MR slab; no held-out patient."""
    folder = data / "totalseg"
    ct = _merged_values(folder / "class_map_total.json", folder / "example_seg_fast_force_split.nii.gz")
    mr = _merged_values(folder / "class_map_total_mr.json", folder / "example_seg_mr.nii.gz")
    mr = {label: mr[label] for label in TORSO_MR if label in mr}
    common = {"dataset": "TotalSegmentator_sample", "split": "train"}
    return [
        _line(folder / "example_ct.nii.gz", folder / "example_seg_fast_force_split.nii.gz", ct, "ct", patient="totalseg_ct", **common),
        _line(folder / "example_mr_sm.nii.gz", folder / "example_seg_mr.nii.gz", mr, "mri", patient="totalseg_mr", absent=BRAIN, **common),
    ]


def spine_cases(data: Path) -> list[dict[str, Any]]:
    """Spinal cord in three MR volumes; no held-out patient."""
    pairs = {
        "t2_t2": "t2_t2_seg-manual",
        "t1_t1w": "t1_t1w_seg-manual",
        "template_template_PAM50_small_t2": "template_template_PAM50_small_cord",
    }
    files = {data / "sct" / f"{image}.nii.gz": data / "sct" / f"{mask}.nii.gz" for image, mask in pairs.items()}
    more = {"dataset": "SCT_spine", "split": "train", "absent": DEEP}
    return [
        _line(image, mask, {"spinal cord": [1]}, "mri", patient=f"sct_{image.name.split('.')[0]}", **more) for image, mask in files.items()
    ]


def synthesised_heads(data: Path, out: Path) -> list[dict[str, Any]]:
    """Write whole heads of fixed contrasts; returns their lines. Those that lie there are kept."""
    lines = []
    for split, number, heads in (("validation", 4, VALIDATION_HEADS), ("test", 5, HELD_OUT_HEADS)):
        source = data / "synthseg" / f"training_seg_0{number}.nii.gz"
        for name, (family, seed, stripped) in heads.items():
            image, mask = out / f"{split}_{name}.nii.gz", out / f"{split}_{name}_labels.nii.gz"
            if not (image.is_file() and mask.is_file()):
                _write_head(source, image, mask, family=family, seed=seed, stripped=stripped)
                sys.stderr.write(f"wrote {image}\n")
            lines.append(_head_line(mask, number, split) | {"image": str(image), "dataset": f"synthesised_{name}"})
    return lines


def _write_head(source: Path, image: Path, mask: Path, *, family: str, seed: int, stripped: bool) -> None:
    import numpy as np

    from medlore.data.volumes.nifti import write_nifti
    from medlore.data.volumes.preparation import read_volume
    from medlore.data.volumes.synthesis import SynthesisRules, draw_contrast, strip_skull, synthesise

    volume = read_volume(source)
    rng = np.random.default_rng([2025, seed])
    chances = {"t1_like": 0.0, "t2_like": 0.0, "flair_like": 0.0, **({} if family == "random" else {f"{family}_like": 1.0})}
    rules = SynthesisRules(**chances)
    codes = volume.array.astype(np.uint16)
    kept = strip_skull(codes, rng, least_share=0.0) if stripped else codes
    grey = synthesise(codes, rng, rules, contrast=draw_contrast(rng, rules), keep=kept > 0 if stripped else None)
    image.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(image, np.rint(np.clip(grey * 4, 0, 4095)).astype(np.int16), volume)
    write_nifti(mask, kept, volume)


def _head_line(mask: Path, number: int, split: str) -> dict[str, Any]:
    return _line(mask, mask, HEAD_VALUES, "mri", dataset="SynthSeg_maps", patient=f"head_0{number}", split=split, absent=_torso_labels())


def _torso_labels() -> list[str]:
    return [label for label in TORSO_MR if label not in HEAD_VALUES and label != "vertebrae"]


def _line(image: Path, mask: Path, values: dict[str, list[int]], modality: str, **more: Any) -> dict[str, Any]:
    return {"image": str(image), "mask": str(mask), "label": list(values), "mask_values": values, "modality": modality, **more}


def _merged_values(class_map: Path, mask: Path) -> dict[str, list[int]]:
    """The vocabulary's label -> values, for the classes that the map really holds."""
    import numpy as np

    from medlore.data.volumes.nifti import read_nifti

    here = set(np.unique(read_nifti(mask).array).tolist())
    values: dict[str, list[int]] = {}
    for value, name in json.loads(class_map.read_text(encoding="utf-8")).items():
        if int(value) in here:
            pattern = next((p for p in MERGED if re.fullmatch(p, name)), None)
            label = name if pattern is None else re.sub(f"^{pattern}$", MERGED[pattern], name)
            values.setdefault(label.replace("_", " "), []).append(int(value))
    return values


def main() -> None:
    """Write the lists."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("runs/seg-mini/cases"), help="folder of the lists")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    sets = {
        "hippocampus": hippocampus_cases(data), "heads": head_cases(data), "torso": torso_cases(data), "spine": spine_cases(data),
        "synthesised": synthesised_heads(data, out / "heads"),
    }  # fmt: skip
    from medlore.files import write_json, write_text

    everything = [line for lines in sets.values() for line in lines]
    for name, lines in {**sets, "cases": everything}.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(out / "label_regions.json", LABEL_REGIONS)
    for name, lines in sets.items():
        counts = {split: sum(line["split"] == split for line in lines) for split in ("train", "validation", "test")}
        sys.stdout.write(f"{name:12s} {counts}\n")


if __name__ == "__main__":
    main()
