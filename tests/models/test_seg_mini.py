"""The shipped segmenter: small, by name, better than k-means where nothing was learnt from, and it finds hippocampi."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.shipped_segmenter import (
    HIPPOCAMPUS,
    TISSUES,
    Row,
    head_rows,
    hippocampus_rows,
    mean,
    stray_hippocampus,
    stray_ml,
    template_rows,
)

from medlore.assets import asset_path
from medlore.data.volumes.cases import Case, read_cases
from medlore.data.volumes.preparation import read_volume
from medlore.demo.segmentation import template_file
from medlore.segmenting.segmenter import LoadedSegmenter, load_segmenter

LARGEST_BYTES = 12e6
CARD = (asset_path("medlore:seg-mini") / "README.md").read_text(encoding="utf-8")
SCRIPT = Path(__file__).parents[2] / "studies" / "seg_mini_cases.py"


@pytest.fixture(scope="module")
def model() -> LoadedSegmenter:
    return load_segmenter("medlore:seg-mini", device="cpu")


def held_out_head(folder: Path, shared_data: Path, name: str) -> Case:
    """A head of a fixed contrast, drawn from the label map that no training saw, as the table of docs/evidence.md has it."""
    made: Mapping[str, Any] = runpy.run_path(str(SCRIPT))
    family, seed, stripped = made["HELD_OUT_HEADS"][name]
    image, mask = folder / f"{name}.nii.gz", folder / f"{name}_labels.nii.gz"
    made["_write_head"](shared_data / "synthseg" / "training_seg_05.nii.gz", image, mask, family=family, seed=seed, stripped=stripped)
    line = made["_head_line"](mask, 5, "test") | {"image": str(image), "dataset": f"synthesised_{name}"}
    return one_case(folder / f"{name}.jsonl", line)


def one_case(path: Path, line: Mapping[str, Any]) -> Case:
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    return read_cases(path)[0]


def test_it_is_small_and_its_card_names_every_expert(model: LoadedSegmenter) -> None:
    folder = asset_path("medlore:seg-mini")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < LARGEST_BYTES
    weights = model.model.bundle.weights
    assert set(weights.experts) >= {"brain", "spine", "abdomen", "thorax"}
    for region in weights.experts:
        assert region in CARD
    parameters = sum(w.numel() for w in weights.base.values())
    assert f"{parameters:,}" in CARD


def test_it_is_at_least_as_good_as_kmeans_on_the_template(model: LoadedSegmenter) -> None:
    rows = template_rows(model)
    assert {row.label for row in rows} == set(TISSUES)
    for row in rows:
        assert row.kmeans is not None
        assert row.kmeans > 0.9
        assert row.dice >= row.kmeans
        assert row.dice == pytest.approx(on_card("ICBM152", row.label), abs=0.005)


@pytest.mark.parametrize("name", [pytest.param("t2", marks=pytest.mark.full), pytest.param("flair", marks=pytest.mark.full)])
def test_it_beats_kmeans_on_a_head_of_another_contrast(model: LoadedSegmenter, shared_data: Path, tmp_path: Path, name: str) -> None:
    case = held_out_head(tmp_path, shared_data, name)
    for row in [row for row in head_rows(model, case) if row.label in TISSUES]:
        assert row.kmeans is not None
        assert row.dice > row.kmeans + 0.15
        assert row.dice == pytest.approx(on_card(name, row.label), abs=0.01)
    assert stray_hippocampus(model, case) <= 1.0


def test_it_finds_the_hippocampi_of_patients_that_it_has_not_seen(model: LoadedSegmenter, shared_data: Path, tmp_path: Path) -> None:
    lines = [line for line in runpy.run_path(str(SCRIPT))["hippocampus_cases"](shared_data) if line["split"] == "test"]
    assert len(lines) == 40
    rows: list[Row] = []
    for number, line in enumerate(lines[::5]):
        rows += hippocampus_rows(model, one_case(tmp_path / f"{number}.jsonl", line))
    for label in HIPPOCAMPUS:
        assert mean(rows, label) > (0.85 if label == "hippocampus" else 0.8)


def test_left_and_right_are_the_two_parts_of_both(model: LoadedSegmenter) -> None:
    """On the template, which is stripped: nothing is cut, and the halves of the first pass divide what is found."""
    volume = read_volume(template_file())
    found = model.segment(volume, ["hippocampus", "left hippocampus", "right hippocampus"], modality="mri")
    left, right, both = (found[label] for label in ("left hippocampus", "right hippocampus", "hippocampus"))
    assert not (left & right).any()
    assert np.array_equal(left | right, both)
    x = [float((volume.affine @ [*np.argwhere(mask).mean(0), 1])[0]) for mask in (left, right)]
    assert x[0] < -15 < 15 < x[1]  # mm from the midline of the template, right is positive
    assert 0.7 < left.sum() / right.sum() < 1.4


def test_a_crop_is_answered_as_ever_and_says_that_sides_are_untold(model: LoadedSegmenter, shared_data: Path, tmp_path: Path) -> None:
    line = next(line for line in runpy.run_path(str(SCRIPT))["hippocampus_cases"](shared_data) if line["split"] == "test")
    volume = read_volume(one_case(tmp_path / "crop.jsonl", line).image)
    found = model.segment(volume, ["left hippocampus", "hippocampus"], modality="mri")
    assert np.array_equal(found["left hippocampus"], found["hippocampus"])
    assert any("left and right cannot be distinguished" in note for note in found.notes)
    assert not model.segment(volume, ["hippocampus"], modality="mri").notes


def test_a_stray_part_is_one_that_touches_no_truth() -> None:
    found, truth = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    found[1:3, 1:3, 1:3] = truth[2, 2, 2] = True
    assert stray_ml(found, truth, 0.001) == 0
    found[5:7, 5:7, 5] = True
    assert stray_ml(found, truth, 0.001) == pytest.approx(0.004)


def on_card(volume: str, label: str) -> float:
    """What the model card says of a volume and a tissue: the first of four numbers (pack, network alone, two of k-means)."""
    row = next(line for line in CARD.splitlines() if line.startswith(f"| {volume} |"))
    return float(re.findall(r"0\.\d{3}", row)[4 * TISSUES.index(label)])
