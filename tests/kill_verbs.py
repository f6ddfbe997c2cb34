"""Every verb that writes something, on inputs that take it seconds: what the kill suite and the tests of locks run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from small_classifier import make_pack
from small_segmenter import write_small_pack
from tiny_backbone import striped, write_backbone
from tiny_segmentation import write_study as write_segmenters_study

_STUDY = """\
name: tiny
data:
  - {name: stripes, data: data, test_fraction: 0.5}
shots: [2]
draws: 1
methods: [sr-lora, linear-probe]
settings: {model: MODEL, image_size: 16, epochs: 1, device: cpu, precision: fp32, augment: false}
"""
_CLASSIFIERS = """\
name: tiny
image_size: 32
tasks:
  - {name: left, data: left.npz, train: train, validation: val, test: test, licence: made here}
  - {name: right, data: right.npz, train: train, validation: val, test: test, licence: made here}
teacher: {source: shufflenet, steps: 2}
ranks: {rule: given, given: {left: 2, right: 2}}
steps: 2
batch_size: 8
evaluate_every: 1
device: cpu
weights: fp32
"""


@dataclass(frozen=True)
class Verb:
    """A command line that writes.

    Attributes:
        words: (folder of inputs, output) -> arguments.
        needs: verbs whose output, at `inputs/NAME`, is an input.
        file: the output is a file or a set of files beside each other in place of one folder.
        full: too slow for every run of the tests.
    """

    words: Callable[[Path, Path], list[str]]
    needs: tuple[str, ...] = ()
    file: bool = False
    full: bool = True


def _segment(place: Path, out: Path, *more: str) -> list[str]:
    first = ["segment", str(place / "cases.jsonl"), "--model", str(place / "pack"), "--out", str(out)]
    return [*first, "--no-amp", "--device", "cpu", *more]


def _finetune(place: Path, out: Path) -> list[str]:
    first = ["finetune", "--data", str(place / "data"), "--model", str(place / "vit"), "--shots", "2", "--epochs", "2", "--method", "lora"]
    return [*first, "--rank", "2", "--batch-size", "6", "--device", "cpu", "--out", str(out), "--resume"]


def _finetune_segmenter(place: Path, out: Path) -> list[str]:
    first = ["finetune", str(place / "pack"), "--cases", str(place / "volumes" / "belly.jsonl"), "--steps", "2", "--patch-size", "16,16,16"]
    return [*first, "--rank", "2", "--region", "abdomen", "--device", "cpu", "--out", str(out)]


def _study(place: Path, out: Path, workers: int) -> list[str]:
    return ["study", str(place / "study.yaml"), "--out", str(out), "--workers", str(workers), "--resume"]


VERBS: dict[str, Verb] = {
    "segment": Verb(lambda p, o: _segment(p, o, "--no-picture"), full=False),
    "segment with a picture": Verb(_segment),
    "segment on two workers": Verb(lambda p, o: _segment(p, o, "--no-picture", "--workers", "2")),
    "segment on Ray": Verb(lambda p, o: _segment(p, o, "--no-picture", "--workers", "2", "--engine", "ray")),
    "finetune": Verb(_finetune, full=False),
    "finetune a segmenter": Verb(_finetune_segmenter),
    "decompose classifiers": Verb(lambda p, o: ["decompose", str(p / "classifiers" / "study.yaml"), "--out", str(o)]),
    "decompose a segmenter": Verb(lambda p, o: ["decompose", str(p / "volumes" / "study.yaml"), "--out", str(o), "--steps", "2"]),
    "study": Verb(lambda p, o: _study(p, o, 0)),
    "study on two workers": Verb(lambda p, o: _study(p, o, 2)),
    "demo": Verb(
        lambda p, o: ["demo", "--draws", "1", "--shots", "1", "--epochs", "1", "--test-images", "50", "--segmenter", str(p / "coarse"),
                      "--out", str(o)]
    ),
    "evaluate": Verb(
        lambda p, o: ["evaluate", str(p / "finetune"), "--data", str(p / "data"), "--device", "cpu", "--out", str(o)], ("finetune",)
    ),
    "evaluate masks": Verb(
        lambda p, o: ["evaluate", "--pred", str(p / "segment"), "--truth", str(p / "cases.jsonl"), "--out", str(o)], ("segment",)
    ),
    "predict": Verb(
        lambda p, o: ["predict", str(p / "finetune"), str(p / "data" / "test"), "--device", "cpu", "--out", str(o / "scores.csv")],
        ("finetune",), file=True, full=False,
    ),
    "export": Verb(lambda p, o: ["export", str(p / "pack"), "--expert", "abdomen", "--out", str(o / "pack")], file=True, full=False),
    "export a classifier": Verb(
        lambda p, o: ["export", str(p / "classifier"), "--expert", "one", "--format", "peft", "--out", str(o / "one")], file=True
    ),
    "ranks": Verb(
        lambda p, o: ["ranks", str(p / "vit"), "--out", str(o / "plan.json"), "--plot", str(o / "r.png"), "--peft", str(o / "peft")],
        file=True, full=False,
    ),
    "view": Verb(lambda p, o: ["view", str(p / "segment"), "--out", str(o / "page.html")], ("segment",), file=True),
}  # fmt: skip


def write_inputs(place: Path) -> None:
    """All that the verbs read, beside the outputs of other verbs."""
    write_small_pack(place / "pack", roi_size=(16, 16, 8))
    write_small_pack(place / "coarse", roi_size=(32, 32, 16), spacing_mm=(6.0, 6.0, 6.0))
    make_pack(place / "classifier", "shufflenet")
    write_backbone(place / "vit")
    for part, seed in (("train", 0), ("test", 1)):
        images = striped(6, seed=seed)
        for item in images.items:
            folder = place / "data" / part / images.classes[item.labels[0]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(item.source)).save(folder / f"{item.key}.png")
    (place / "study.yaml").write_text(_STUDY.replace("MODEL", str(place / "vit")))
    _write_cases(place)
    write_segmenters_study(place / "volumes")
    (place / "classifiers").mkdir()
    (place / "classifiers" / "study.yaml").write_text(_CLASSIFIERS)
    for seed, name in enumerate(("left", "right")):
        np.savez(place / "classifiers" / f"{name}.npz", **_blocks(seed))


def _write_cases(place: Path) -> None:
    lines = []
    for number in range(3):
        array = np.full((20, 22, 12), -1000, np.int16)
        array[3:-3, 3:-3, 2:-2] = np.random.default_rng(number).normal(50, 60, (14, 16, 8))
        affine = np.diag([-1.0, -1, 3, 1])
        nib.save(nib.Nifti1Image(array, affine), place / f"ct{number}.nii.gz")
        nib.save(nib.Nifti1Image((array > 50).astype(np.uint8) + (array > 100), affine), place / f"mask{number}.nii.gz")
        about: dict[str, Any] = {"image": f"ct{number}.nii.gz", "label": ["liver", "spleen"], "modality": "ct"}
        lines.append({**about, "mask": f"mask{number}.nii.gz", "mask_values": {"liver": [1], "spleen": [2]}})
    (place / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _blocks(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 16), ("val", 8), ("test", 8)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 60, (count, 32, 32)).astype(np.uint8)
        images[:, :16, :16] += (120 * labels[:, None, None]).astype(np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels[:, None]}
    return arrays
