"""The shipped first pass: small, by name, finds the brain of a head with its skull and tells left from right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks._volumes import on_another_grid
from benchmarks.development_heads import truths_of

from medlore.assets import asset_path
from medlore.data.volumes.geometry import spacing_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import read_volume
from medlore.data.volumes.synthesis import SynthesisRules, draw_contrast, synthesise
from medlore.segmenting.first_pass import grown, two_halves
from medlore.segmenting.segmenter import LoadedSegmenter, load_segmenter

Array = np.ndarray[Any, Any]
BRAIN, LEFT, RIGHT = NAMES = ("brain", "left half of the brain", "right half of the brain")
CARD = (asset_path("medlore:brain-finder") / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model() -> LoadedSegmenter:
    return load_segmenter("medlore:brain-finder", device="cpu")


@pytest.fixture(scope="module")
def head(shared_data: Path) -> tuple[Volume, Array]:
    """A T1-like head at 2 mm, drawn from the map that no training saw, and its codes."""
    source = read_volume(shared_data / "synthseg" / "training_seg_05.nii.gz")
    codes = np.asarray(np.rint(source.array), np.uint16)[::2, ::2, ::2]
    rng = np.random.default_rng(31)
    rules = SynthesisRules(t1_like=1, t2_like=0, flair_like=0, thick_slices=0)
    image = synthesise(codes, rng, rules, contrast=draw_contrast(rng, rules))
    affine = np.asarray(source.affine, float) @ np.diag([2.0, 2.0, 2.0, 1.0])
    return on_another_grid(source, np.rint(np.clip(image * 4, 0, 4095)).astype(np.int16), affine), codes


def test_it_is_small_and_its_card_tells_its_size(model: LoadedSegmenter) -> None:
    folder = asset_path("medlore:brain-finder")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 2e6
    assert f"{sum(w.numel() for w in model.model.bundle.weights.base.values()):,}" in CARD
    assert set(model.labels("mri")) == set(NAMES)


@pytest.mark.parametrize("mirrored", [False, True])
def test_it_finds_the_brain_in_a_head_and_tells_its_halves(
    model: LoadedSegmenter, head: tuple[Volume, Array], mirrored: bool, cases: dict[str, list[int]]
) -> None:
    """In a mirrored head, whose affine stays as it was, what was the left half is the right one."""
    volume, codes = head
    if mirrored:
        volume, codes = replace(volume, array=np.ascontiguousarray(volume.array[::-1])), codes[::-1]
    left, right = (np.isin(codes, cases[name]) for name in ((RIGHT, LEFT) if mirrored else (LEFT, RIGHT)))
    found = model.segment(volume, list(NAMES), modality="mri")
    spacing = spacing_of(volume.affine)
    kept = grown(found[BRAIN], 4.0, spacing)
    brain = np.isin(codes, cases[BRAIN])
    assert (kept & brain).sum() / brain.sum() > 0.97
    assert (kept & (codes >= 500)).sum() * 0.008 < 500  # ml; scalp, skull, face and neck are 2,800 ml
    halves = two_halves(volume, found[BRAIN], found[LEFT], found[RIGHT])
    wrong = ((halves["left"] & right).sum() + (halves["right"] & left).sum()) / (left | right).sum()
    assert wrong < 0.01


@pytest.fixture(scope="module")
def cases() -> dict[str, list[int]]:
    import runpy

    return truths_of(runpy.run_path(str(Path(__file__).parents[2] / "studies" / "seg_mini_brain_cases.py")))
