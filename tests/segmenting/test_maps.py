"""Maps of probability and entropy, a brain mask, and flags that do not go together: through the whole run, on a small random pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medlore.errors import InputError
from medlore.segmenting.cohort import segment_cases
from medlore.segmenting.settings import SegmentSettings
from medlore.segmenting.watch import Keeping, ProbabilityWatch, entropy_bits
from small_segmenter import write_small_pack

LABELS = ("hippocampus", "thalamus")
AFFINE = np.array([[0, 0, -2.0, 5], [1.5, 0, 0, 3], [0, 1, 0, 1], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("maps")
    grey = np.random.default_rng(0).normal(100, 20, (30, 28, 26)).astype(np.float32)
    nib.save(nib.Nifti1Image(grey, AFFINE), folder / "t1.nii.gz")
    pack = write_small_pack(folder / "pack", roi_size=(24, 24, 16))
    return {"model": str(pack), "image": folder / "t1.nii.gz", "labels": LABELS, "modality": "mri", "device": "cpu", "precision": "fp32"}


def run(case: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    results = segment_cases(SegmentSettings(**{**case, "out": out, "picture": False, **more}))
    assert results["counts"]["done"] == 1, results
    return dict(json.loads((out / "t1" / "case.json").read_text()))


def read(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(nib.load(path).get_fdata())


def test_maps_lie_on_the_images_grid_and_agree_with_the_masks(case: dict[str, Any], tmp_path: Path) -> None:
    record = run(case, tmp_path, probabilities=True, uncertainty=True, check="thorough")
    folder = tmp_path / "t1"
    assert np.allclose(nib.load(folder / "uncertainty.nii.gz").affine, AFFINE)
    entropy = []
    for label in LABELS:
        probability, mask = read(folder / "probabilities" / f"{label}.nii.gz"), read(folder / f"{label}.nii.gz") > 0
        assert probability.shape == mask.shape == (30, 28, 26)
        assert 0.02 < mask.mean() < 0.98
        sure = np.abs(probability - 0.5) > 0.004  # the rounding of a byte
        assert np.array_equal((probability > 0.5)[sure], mask[sure])
        entropy.append(entropy_bits(probability))
    assert np.median(np.abs(read(folder / "uncertainty.nii.gz") - np.max(entropy, axis=0))) < 0.02
    assert set(record["check"]["measured"]["hippocampus"]["agreement"]) == {"shifted windows", "the mirror image"}
    assert record["check"]["not_judged"]["volume"] == {"the pack states no range of volumes": list(LABELS)}
    assert set(record["maps"]) == {"uncertainty.nii.gz", *(f"probabilities/{label}.nii.gz" for label in LABELS)}


def test_without_a_check_there_is_no_verdict_and_the_masks_are_the_same(case: dict[str, Any], tmp_path: Path) -> None:
    assert run(case, tmp_path / "none", check="none")["check"] is None
    assert run(case, tmp_path / "quick")["check"]["level"] == "quick"
    for label in LABELS:
        one, other = (tmp_path / way / "t1" / f"{label}.nii.gz" for way in ("none", "quick"))
        assert one.read_bytes() == other.read_bytes()


def test_masks_end_at_a_given_brain(case: dict[str, Any], tmp_path: Path) -> None:
    brain = np.zeros((30, 28, 26), np.uint8)
    brain[6:24, 5:22, 4:20] = 1
    nib.save(nib.Nifti1Image(brain, AFFINE), tmp_path / "brain.nii.gz")
    run(case, tmp_path / "out", brain_mask=tmp_path / "brain.nii.gz")
    for label in LABELS:
        mask = read(tmp_path / "out" / "t1" / f"{label}.nii.gz") > 0
        assert mask.any()
        assert not (mask & (brain == 0)).any()


@pytest.mark.parametrize("fault", ["shape", "place", "empty"])
def test_a_brain_on_another_grid_is_refused(case: dict[str, Any], tmp_path: Path, fault: str) -> None:
    brain = np.ones((30, 28, 25 if fault == "shape" else 26), np.uint8) * (fault != "empty")
    brain[0, 0, 0] = 0
    affine = AFFINE.copy()
    affine[0, 3] += 3.0 * (fault == "place")
    nib.save(nib.Nifti1Image(brain, affine), tmp_path / "brain.nii.gz")
    results = segment_cases(SegmentSettings(**{**case, "out": tmp_path / "out", "brain_mask": tmp_path / "brain.nii.gz"}))
    assert results["counts"]["failed"] == 1
    assert "--brain-mask" in results["cases"][0]["error"]


def test_flags_that_do_not_go_together_are_refused_at_once(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--probabilities"):
        segment_cases(SegmentSettings(**{**case, "out": tmp_path / "out", "probabilities": True, "published": True}))
    assert not (tmp_path / "out").exists()
    nib.save(nib.Nifti1Image(np.ones((30, 28, 26), np.uint8), AFFINE), tmp_path / "brain.nii.gz")
    other = {**case, "labels": ("hippocampus", "liver"), "out": tmp_path / "other", "brain_mask": tmp_path / "brain.nii.gz"}
    results = segment_cases(SegmentSettings(**other))
    assert "outside of the brain: liver" in results["cases"][0]["error"]


def test_the_plan_counts_the_maps() -> None:
    from medlore.segmenting.plan import Extras

    assert Extras("quick", 3).network_bytes(1000) == 0
    assert Extras("quick", 3, probabilities=True, uncertainty=True).network_bytes(1000) == 4000
    assert Extras("thorough", 4).network_bytes(1000) == 9000


def test_a_sharp_border_has_no_entropy_and_a_vague_one_has() -> None:
    cube = torch.zeros(1, 12, 12, 12)
    cube[:, 3:9, 3:9, 3:9] = 1.0
    for value, expected in ((1.0, 0.0), (0.6, float(entropy_bits(np.array([0.6]))[0]))):
        watch = ProbabilityWatch(["x"], (12, 12, 12), Keeping(entropy=True))
        watch.keep(["x"], 0, cube[:, :5] * value)
        watch.keep(["x"], 5, cube[:, 5:] * value)
        assert watch.entropies()["x"] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(KeyError):
        ProbabilityWatch(["x"], (12, 12, 12), Keeping()).entropies()["x"]
