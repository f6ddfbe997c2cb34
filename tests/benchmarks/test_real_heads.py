"""The benchmark of real heads: every manual label is counted, sides are the world's, answers are scored as they should be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from benchmarks._head_faults import FAULTS, faults
from benchmarks._head_labels import DRY, SIDED, STRUCTURES, Head, codes_of, confusion, read_head, scores, stray
from benchmarks._head_methods import Answers, answers_of_codes, masks_of_classes, voted
from benchmarks._meshnet import CONFORMED, Layer, classes_of, conformed, largest_part, read_meshnet, restored
from benchmarks.development_heads import HEADS, files_of, in_blocks, most_frequent, write_heads
from benchmarks.real_heads import section

from medlore.data.volumes.geometry import spacing_of

Array = np.ndarray[Any, Any]
COUNTS = {"meshnet30_18cls": (196_038, 18), "model20chan3cls": (87_183, 3), "model30chan50cls": (197_030, 50)}
# What belongs to no structure of the table: fluid outside of the ventricles, vessels, chiasm, basal forebrain, and remnants of labels
# that were split up ("exterior", "insula"), below 0.6 ml in every subject.
LEFT_OUT = {46, 63, 64, 69, 75, 76, *(REMNANTS := {42, 43, 65, 66})}


@pytest.fixture(scope="module")
def head(shared_data: Path) -> Head:
    return read_head(shared_data / "brain35", "1012")


def test_every_manual_label_is_counted_once_to_grey_white_or_fluid(head: Head) -> None:
    parts = [codes_of(name) for name in ("grey matter", "white matter", "brain ventricle")]
    together = [code for part in parts for code in part]
    assert len(together) == len(set(together))
    there = set(np.unique(head.manual).tolist()) - {0}
    assert there - set(together) <= LEFT_OUT
    assert len(there) > 120
    assert np.isin(head.manual, list(REMNANTS)).sum() < 600


def test_right_and_left_are_those_of_the_world(head: Head) -> None:
    """Neuromorphometrics' right structures lie at positive x of the file's own affine (RAS+)."""
    for name, pair in SIDED.items():
        at = [np.argwhere(np.isin(head.manual, codes)).mean(0) for codes in pair]
        right, left = ((head.volume.affine @ [*middle, 1])[0] for middle in at)
        assert right > left + 5, name


def test_manual_labels_score_themselves_perfectly_and_mirrored_sides_are_confused(head: Head) -> None:
    answers = answers_of_codes(head.manual)
    found = scores(head, answers)
    assert set(found) == set(STRUCTURES)
    assert all(row["dice"] == 1 and row["stray_ml"] == 0 for name, row in found.items() if name not in DRY)
    assert all(0.8 < found[name]["dice"] < 1 for name in DRY)  # fluid in sulci: some, not most
    assert confusion(head, answers.sided) == 0
    assert confusion(head, {name: (left, right) for name, (right, left) in answers.sided.items()}) == 1
    assert confusion(head, {}) is None


def test_stray_parts_are_counted_in_millilitres() -> None:
    found, truth = np.zeros((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    found[:2, :2, :2] = found[5:7, 5:7, 5:7] = found[8, 8, 8] = True
    truth[1, 1, 1] = True
    assert stray(found, truth, 0.5) == pytest.approx(4.5)


def test_structures_are_put_together_from_their_parts() -> None:
    cortex, white = np.array([True, False]), np.array([False, True])
    answers = Answers({"cerebellar cortex": cortex, "cerebellar white matter": white})
    found = answers("cerebellum")
    assert found is not None
    assert found.all()
    assert answers("grey matter") is None
    assert answers("amygdala") is None


def test_three_atlases_vote_and_the_first_decides_where_all_differ() -> None:
    maps = [np.array(row) for row in ([1, 5, 7, 0], [2, 6, 7, 4], [2, 8, 9, 4])]
    assert voted(maps).tolist() == [2, 5, 7, 4]


@pytest.mark.parametrize("name", COUNTS)
def test_the_public_networks_have_as_many_numbers_as_their_authors_say(shared_data: Path, name: str) -> None:
    layers, names = read_meshnet(shared_data / "weights" / name)
    numbers, classes = COUNTS[name]
    assert sum(layer.weight.numel() + layer.bias.numel() for layer in layers) == numbers
    assert len(names) == classes == len(layers[-1].bias)
    assert [layer.dilation for layer in layers] == [1, 2, 4, 8, 16, 8, 4, 2, 1, 1]
    assert (shared_data / "weights" / name / "model.bin").stat().st_size == 4 * numbers
    assert len(dict(masks_of_classes(np.zeros((2, 2, 2), np.uint8), names))) >= 2


def test_kernels_are_read_x_y_z_in_out(tmp_path: Path) -> None:
    """The one weight at x 0, y 1, z 2, input 1, output 0 is found where the file has it."""
    kernel = np.zeros((3, 3, 3, 2, 3), "<f4")
    kernel[0, 1, 2, 1, 0] = 5
    entries = [{"name": "c/kernel", "shape": [3, 3, 3, 2, 3]}, {"name": "c/bias", "shape": [3]}]
    layers = [{"class_name": "Conv3D", "config": {"name": "c", "dilation_rate": [2, 2, 2]}}]
    model = {"weightsManifest": [{"weights": entries}], "modelTopology": {"model_config": {"config": {"layers": layers}}}}
    (tmp_path / "model.json").write_text(json.dumps(model), encoding="utf-8")
    (tmp_path / "model.bin").write_bytes(kernel.tobytes() + np.arange(3, dtype="<f4").tobytes())
    (tmp_path / "colormap.json").write_text(json.dumps({"labels": ["a", "b", "c"]}), encoding="utf-8")
    (layer,), names = read_meshnet(tmp_path)
    assert layer.weight.nonzero().tolist() == [[0, 1, 0, 1, 2]]
    assert layer.bias.tolist() == [0, 1, 2]
    assert names == ["a", "b", "c"]


def test_a_conformed_volume_comes_back_on_its_own_grid(head: Head) -> None:
    cube = conformed(head.volume)
    assert cube.shape == (CONFORMED,) * 3
    assert cube.min() == 0
    assert cube.max() == 1
    codes = np.asarray(np.rint(cube * 255), np.uint8)
    back = restored(codes, head.volume)
    assert back.shape == head.volume.shape
    whole = np.clip(head.volume.array / head.volume.array[head.volume.array > 0].max(), 0, 1)
    assert np.corrcoef(back.ravel()[::97], whole.ravel()[::97])[0, 1] > 0.99


def test_a_meshnet_is_convolutions_and_elu_and_the_largest_class_wins() -> None:
    rng = torch.Generator().manual_seed(0)
    layers = [
        Layer(torch.randn(4, 1, 3, 3, 3, generator=rng), torch.zeros(4), 2),
        Layer(torch.randn(3, 4, 1, 1, 1, generator=rng), torch.zeros(3), 1),
    ]
    cube = np.zeros((20, 20, 20), np.float32)
    cube[4:14, 5:15, 6:16] = np.random.default_rng(0).uniform(0.3, 1, (10, 10, 10))
    x = torch.from_numpy(cube[4:14, 5:15, 6:16])[None, None]
    hidden = torch.nn.functional.elu(torch.nn.functional.conv3d(x, layers[0].weight, layers[0].bias, padding=2, dilation=2))
    expected = torch.nn.functional.conv3d(hidden, layers[1].weight, layers[1].bias).argmax(1)[0].numpy()
    found = classes_of(layers, cube)
    assert np.array_equal(found[4:14, 5:15, 6:16], largest_part(expected.astype(np.uint8)))
    assert not found[:4].any()


def test_only_the_largest_part_of_all_labels_stays() -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:3, :3, :3], labels[3, 0, 0], labels[6, 6, 6] = 1, 2, 2
    kept = largest_part(labels)
    assert kept[3, 0, 0] == 2
    assert kept[6, 6, 6] == 0


def test_a_block_becomes_its_most_frequent_code() -> None:
    codes = np.array([[[3, 3, 7, 7, 7, 9]]]).repeat(2, axis=0)
    assert in_blocks(codes, (2, 1, 3), most_frequent).tolist() == [[[3, 7]]]
    assert most_frequent(np.array([[5, 2, 2, 5]])).tolist() == [2]


def test_a_development_head_is_written_with_its_labels_on_the_same_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small map stored L I A, as the real ones: a brain above, a neck that touches the lowest plane."""
    codes = np.zeros((24, 30, 24), np.int16)
    codes[4:20, 4:14, 4:20], codes[8:16, 14:, 8:16] = 2, 507
    affine = np.array([[-1.0, 0, 0, 12], [0, 0, 1, -12], [0, -1, 0, 15], [0, 0, 0, 1]])
    (tmp_path / "synthseg").mkdir()
    nib.save(nib.Nifti1Image(codes, affine), tmp_path / "synthseg" / "training_seg_05.nii.gz")
    name = "t1 3 mm, neck"
    monkeypatch.setattr("benchmarks.development_heads.HEADS", {name: HEADS[name]})
    write_heads(tmp_path, tmp_path / "out", {"white matter": [2]})
    image, labels = (nib.load(file) for file in files_of(tmp_path / "out", name))
    assert image.shape == labels.shape == (8, 30, 8)  # 30 planes and 60 mm of neck in blocks of 3 mm
    assert np.allclose(image.affine, labels.affine)
    assert np.allclose(image.affine[:3, :3], affine[:3, :3] * 3)
    assert np.allclose(image.affine[:3, 3], affine[:3, :3] @ [1, 1, 1] + affine[:3, 3])
    found = np.asarray(labels.dataobj)
    assert (found[3, -5:, 3] == 507).all()
    assert (found == 2).sum() * 27 == pytest.approx((codes == 2).sum(), rel=0.4)


@pytest.mark.parametrize("name", [*FAULTS, "skull put back"])
def test_a_fault_changes_the_image_and_keeps_the_labels_true(head: Head, shared_data: Path, name: str) -> None:
    small = thinned(head)
    worse = faults(shared_data / "synthseg")[name](small, np.random.default_rng(1))
    again = faults(shared_data / "synthseg")[name](small, np.random.default_rng(1))
    assert np.array_equal(worse.volume.array, again.volume.array)
    assert worse.volume.array.shape == worse.manual.shape
    assert worse.volume.array.dtype == small.volume.array.dtype
    same = worse.manual.shape == small.manual.shape
    assert not same or not np.array_equal(worse.volume.array, small.volume.array)
    before, after = (float(np.prod(spacing_of(h.volume.affine)) * (h.manual > 0).sum()) for h in (small, worse))
    assert after == pytest.approx(before, rel=0.06) or name == "short field of view"
    if name == "short field of view":
        assert 0.5 < after / before < 0.95
    middle = [h.volume.affine @ [*np.argwhere(np.isin(h.manual, codes_of("cerebellum"))).mean(0), 1] for h in (small, worse)]
    assert name == "tilt of 20 degrees" or np.linalg.norm((middle[0] - middle[1])[:3]) < 4
    if name == "skull put back":
        assert (worse.volume.array[small.volume.array == 0] > 0).mean() > 0.1
        assert np.array_equal(worse.volume.array[small.volume.array > 0], small.volume.array[small.volume.array > 0])


def test_a_table_is_made_of_the_raw_file() -> None:
    row = {"scores": {"thalamus": {"dice": 0.5, "volume_ratio": 2.0, "stray_ml": 1.5}}, "confusion": 0.25, "cpu_s": 7.0, "peak_mib": 10}
    better = {**row, "scores": {"thalamus": {"dice": 0.75, "volume_ratio": 1.0, "stray_ml": 0.5}}, "confusion": None}
    record = {
        "methods": {"a": {"read": "2026-01-01", "subjects": {"1000": row}}, "b": {"read": "2026-01-02", "subjects": {"1000": better}}}
    }
    text = section(record, "command")
    assert "| thalamus | 0.500 | **0.750** |" in text
    assert "| thalamus | 2.00 | 1.00 |" in text
    assert "| a | 1 | 2026-01-01 | 25.00 % | 7 | 10 |" in text
    assert "| b | 1 | 2026-01-02 | no sides | 7 | 10 |" in text


def thinned(head: Head) -> Head:
    """Every second voxel: a quick head."""
    every = (slice(None, None, 2),) * 3
    affine = np.asarray(head.volume.affine, float) @ np.diag([2.0, 2.0, 2.0, 1.0])
    volume = replace(head.volume, array=head.volume.array[every], affine=affine, header=None)
    return Head(head.name, volume, head.manual[every])
