"""Tissues redrawn on the file's own grid: other labels are untouched, and the network's masks stay where grey says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import medlore
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.preparation import MaskRestorer, prepare, read_volume
from medlore.metrics.masks import dice
from medlore.models.segmenter.manifest import preprocessing_faults
from medlore.segmenting.cohort import plan_cases
from medlore.segmenting.labels import facts_of_pack, route_labels, tissues_of, with_tissues
from medlore.segmenting.settings import SegmentSettings
from medlore.segmenting.tissues import TissuePass
from small_segmenter import write_small_pack

TISSUES = ["grey matter", "white matter", "brain ventricle"]
OBLIQUE = np.array([[0.0, -0.9, 0.1, 5], [-0.8, 0, 0, 7], [0, 0.1, 1.1, -3], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`head.nii.gz` (three tissues with winding borders in air), `truth.npy`, and a small untrained pack that names tissues."""
    folder = tmp_path_factory.mktemp("tissues")
    rng = np.random.default_rng(3)
    field = ndimage.gaussian_filter(rng.standard_normal((60, 52, 48)), 2)
    truth = np.zeros(field.shape, np.uint8)
    truth[5:-5, 5:-5, 5:-5] = 1 + np.searchsorted(np.quantile(field, [0.4, 0.7]), field)[5:-5, 5:-5, 5:-5]
    image = np.choose(truth, (0, 120, 180, 50)) + 8 * rng.standard_normal(truth.shape) * (truth > 0)
    np.save(folder / "truth.npy", truth)
    nib.save(nib.Nifti1Image(np.clip(image, 0, None).astype(np.float32), OBLIQUE), folder / "head.nii.gz")
    write_small_pack(folder / "plain", roi_size=(32, 32, 32), spacing_mm=(1.5, 1.5, 1.5))
    write_small_pack(folder / "pack", roi_size=(32, 32, 32), spacing_mm=(1.5, 1.5, 1.5))
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    manifest["preprocessing"] |= {"tissues": {"mri": TISSUES}}
    (folder / "pack" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_borders_come_back_on_the_grid_of_the_file(work: Path) -> None:
    """A prior that is right but coarse: the redrawn masks are near the truth, the restored ones are not."""
    volume, truth = read_volume(work / "head.nii.gz"), np.load(work / "truth.npy")
    prepared = prepare(volume, "mri", spacing_mm=(1.5, 1.5, 1.5))
    path = prepared.path
    prior = np.stack([on_network_grid(path, ndimage.gaussian_filter((truth == k).astype(np.float32), 1)) for k in (1, 2, 3)])
    tissues, plain = TissuePass(TISSUES, path.crop.new_shape), MaskRestorer(path, 3)
    for start in range(0, len(prior[0]), 7):
        slab = torch.from_numpy(prior[:, start : start + 7]).half()
        tissues.keep(TISSUES[:2], start, slab[:2])  # labels may come in several groups, in any order
        tissues.keep(["amygdala", TISSUES[2]], start, slab[[0, 2]])
        plain.add(start, slab)
    found = tissues.masks(prepared, path, volume.array)
    assert found.masks is not None
    assert found.record["redrawn"] is True
    assert found.record["labels"] == TISSUES
    for k in range(3):
        before, after = (dice(path.reorientation.undo(m.whole(k)), truth == k + 1) for m in (plain.masks, found.masks))
        assert after > before + 0.04
        assert after > 0.95


def test_a_network_that_grey_values_would_overturn_keeps_its_masks(work: Path) -> None:
    """A prior that is right in three voxels of four: the fit is clean, and too many voxels would change sides."""
    volume, truth = read_volume(work / "head.nii.gz"), np.load(work / "truth.npy")
    prepared = prepare(volume, "mri", spacing_mm=(1.5, 1.5, 1.5))
    rng = np.random.default_rng(0)
    wrong = np.where(rng.random(truth.shape) < 0.4, rng.integers(1, 4, truth.shape), truth) * (truth > 0)
    prior = np.stack([on_network_grid(prepared.path, (wrong == k).astype(np.float32)) for k in (1, 2, 3)])
    tissues = TissuePass(TISSUES, prepared.path.crop.new_shape)
    tissues.keep(TISSUES, 0, torch.from_numpy(prior).half())
    found = tissues.masks(prepared, prepared.path, volume.array)
    assert found.masks is None
    assert found.record["separation"] > 2
    assert found.record["kept"] < 0.8
    assert found.record["redrawn"] is False


def test_where_grey_says_nothing_the_networks_own_masks_stay(work: Path) -> None:
    volume = read_volume(work / "head.nii.gz")
    plain = medlore.load_segmenter(work / "plain", device="cpu", precision="fp32").segment(
        volume, ["grey matter", "hippocampus"], modality="mri"
    )
    assert plain["grey matter"].any()
    assert plain.segmentation.tissues is None
    masks = medlore.load_segmenter(work / "pack", device="cpu", precision="fp32").segment(
        volume, ["grey matter", "hippocampus"], modality="mri"
    )
    tissues = masks.segmentation.tissues
    assert tissues is not None
    assert tissues["redrawn"] is False  # an untrained network's tissues are no tissues
    assert masks.labels == plain.labels == ("grey matter", "hippocampus")
    for label in masks.labels:
        np.testing.assert_array_equal(masks[label], plain[label])


def test_both_grids_are_redrawn_and_other_labels_are_not(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlore.segmenting.tissues.LEAST_SEPARATION", 0.0)
    monkeypatch.setattr("medlore.segmenting.tissues.LEAST_KEPT", 0.0)
    volume = read_volume(work / "head.nii.gz")
    model = medlore.load_segmenter(work / "pack", device="cpu", precision="fp32")
    asked = ["white matter", "hippocampus"]
    for grid in ("original", "processed"):
        masks, plain = (m.segment(volume, asked, modality="mri", grid=grid) for m in (model, not_redrawn(work)))
        assert masks.segmentation.tissues is not None
        assert masks.segmentation.tissues["redrawn"] is True
        assert set(masks.segmentation.masks) == set(asked)
        assert masks["white matter"].shape == plain["white matter"].shape
        assert (masks["white matter"] != plain["white matter"]).any()
        np.testing.assert_array_equal(masks["hippocampus"], plain["hippocampus"])
    again = model.segment(volume, [*TISSUES], modality="mri")
    overlap = sum(again[label].astype(int) for label in TISSUES)
    assert overlap.max() == 1  # tissues exclude each other


def test_the_missing_tissues_are_asked_of_the_same_expert_and_counted(work: Path, tmp_path: Path) -> None:
    facts = facts_of_pack(work / "pack")
    assert facts is not None
    routes = route_labels(facts, ["liver", "white matter"], "mri")
    tissues = tissues_of(facts, routes)
    assert tissues == tuple(TISSUES)
    assert with_tissues(routes, tissues) == {"abdomen": ["liver"], "brain": ["white matter", "grey matter", "brain ventricle"]}
    assert tissues_of(facts, route_labels(facts, ["hippocampus"], "mri")) == ()
    assert tissues_of(facts, route_labels(facts, ["liver"], "ct")) == ()
    common = {"model": str(work / "pack"), "out": tmp_path, "image": work / "head.nii.gz", "labels": ("white matter",), "modality": "mri"}
    with_them, without = (plan_cases(SegmentSettings(**common, redraw_tissues=redraw))["cases"][0]["plan"] for redraw in (True, False))
    assert (with_them["labels"], without["labels"]) == (3, 1)
    assert with_them["fixed_bytes"] > without["fixed_bytes"]


def test_a_manifest_with_strange_tissues_is_refused() -> None:
    assert not preprocessing_faults({"tissues": {"mri": TISSUES}}, "preprocessing")
    for strange in ([], {"ct": TISSUES}, {"mri": ["grey matter"]}, {"mri": ["a", "a"]}, {"mri": "grey matter"}, {"mri": [1, 2]}):
        assert "preprocessing.tissues" in preprocessing_faults({"tissues": strange}, "preprocessing")[0]


def not_redrawn(work: Path) -> medlore.segmenting.segmenter.LoadedSegmenter:
    return medlore.load_segmenter(work / "pack", device="cpu", precision="fp32", redraw_tissues=False)


def on_network_grid(path: object, array: Array) -> Array:
    """The way of an image, for a soft mask."""
    turned = path.resampling.apply(path.reorientation.apply(array))  # type: ignore[attr-defined]
    return np.clip(path.crop.apply(turned), 0, 1).astype(np.float32)  # type: ignore[attr-defined]
