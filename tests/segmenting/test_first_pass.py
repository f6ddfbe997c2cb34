"""A first pass: what lies outside of the brain goes, sides are found from halves, and a crop stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import PackedMasks
from medlore.models.segmenter.manifest import preprocessing_faults
from medlore.segmenting.first_pass import FirstPassRules, first_pass_rules, grown, in_their_halves, look_first, side_of, two_halves

Array = np.ndarray[Any, Any]
RULES: dict[str, Any] = {"pack": "medlore:brain-finder", "brain": "brain", "halves": {"left": "l", "right": "r"}, "margin_mm": 4.0}
SHAPE = (60, 64, 56)


def scene(spacing: float = 3.0) -> tuple[Volume, dict[str, Array]]:
    """A bright ball (the brain) in a grey block (the head); the left half is that of small x."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"))
    brain = np.linalg.norm(at - np.array([30, 34, 30]).reshape(3, 1, 1, 1), axis=0) < 16
    image = np.full(SHAPE, 70, np.int16)
    image[brain] = 200
    masks = {"brain": brain, "l": brain & (at[0] < 29), "r": brain & (at[0] > 31)}  # a gap between the halves
    return Volume(image, np.diag([spacing] * 3 + [1.0]), None, SHAPE, Path("head.nii.gz")), masks


def asked(masks: Mapping[str, Array]) -> Any:
    def ask(_volume: Volume, labels: Sequence[str]) -> Mapping[str, Array]:
        return {label: masks[label] for label in labels}

    return ask


def test_what_lies_outside_of_the_brain_is_taken_away() -> None:
    volume, masks = scene()
    found = look_first(volume, FirstPassRules(**RULES), ["grey matter"], asked(masks))
    assert (found.volume.array[masks["brain"]] == 200).all()
    rim = (found.volume.array > 0) & ~masks["brain"]
    assert rim.any()  # the margin
    assert np.array_equal(found.volume.array > 0, grown(masks["brain"], 4.0, np.array([3.0] * 3)))
    assert found.brain_ml == pytest.approx(masks["brain"].sum() * 0.027)
    assert found.volume.array.dtype == volume.array.dtype
    assert not found.volume.notes


def test_what_was_stripped_before_is_not_cut_again_and_has_its_halves() -> None:
    volume, masks = scene(spacing=2.0)
    stripped = replace(volume, array=np.where(grown(masks["brain"], 10, np.array([2.0] * 3)), volume.array, 0).astype(np.int16))
    assert 0.3 < (stripped.array > 0).sum() * 8e-6 < 2.0  # litres
    found = look_first(stripped, FirstPassRules(**{**RULES, "least_ml": 50.0}), ["left x"], asked(masks))
    assert found.volume.array is stripped.array
    assert found.halves["left"][:26].all()
    assert not found.volume.notes


def test_a_margin_is_a_distance_in_millimetres() -> None:
    mask = np.zeros((21, 21, 21), bool)
    mask[10, 10, 10] = True
    wide = grown(mask, 4.0, np.array([1.0, 2.0, 5.0]))
    assert [int(np.ptp(a)) for a in np.nonzero(wide)] == [8, 4, 0]
    assert np.array_equal(grown(mask, 0, np.ones(3)), mask)


def test_every_voxel_belongs_to_one_half_the_nearer_one_where_none_was_found() -> None:
    volume, masks = scene()
    halves = two_halves(volume, masks["brain"], masks["l"], masks["r"])
    assert not (halves["left"] & halves["right"]).any()
    assert (halves["left"] | halves["right"]).all()
    assert (halves["left"] >= masks["l"]).all()
    assert halves["left"][:26].all()
    assert halves["right"][35:].all()
    assert two_halves(volume, masks["brain"], masks["l"] & False, masks["r"]) == {}


def test_a_label_with_a_side_is_cut_to_its_half_and_the_others_stay() -> None:
    volume, masks = scene()
    packed = PackedMasks(SHAPE, 1)
    packed.set_planes(0, 0, (slice(0, SHAPE[1]), slice(0, SHAPE[2])), masks["brain"])
    halves = two_halves(volume, masks["brain"], masks["l"], masks["r"])
    held = in_their_halves(dict.fromkeys(("left x", "right x", "x"), (packed, 0)), halves, lambda half: half)
    left, right, both = (held[label][0].whole(held[label][1]) for label in ("left x", "right x", "x"))
    assert np.array_equal(both, masks["brain"])
    assert np.array_equal(left | right, both)
    assert not (left & right).any()
    assert left[:29].sum() == masks["l"].sum()
    assert held["left x"][0].counts[0] == left.sum()


@pytest.mark.parametrize("why", ["too small", "0 ml"])
def test_a_crop_stays_as_it_is_and_says_that_sides_are_unknown(why: str) -> None:
    volume, masks = scene(spacing=1.0 if why == "too small" else 3.0)
    if why == "0 ml":
        masks = {name: mask & False for name, mask in masks.items()}
    found = look_first(volume, FirstPassRules(**RULES), ["left x", "grey matter"], asked(masks))
    assert found.volume.array is volume.array
    assert found.halves == {}
    assert len(found.volume.notes) == 1
    assert why in found.volume.notes[0]
    assert "left x" in found.volume.notes[0]
    assert not look_first(volume, FirstPassRules(**RULES), ["grey matter"], asked(masks)).volume.notes


def test_sides_are_read_from_the_beginning_of_a_name() -> None:
    assert [side_of(label) for label in ("left x", "right x", "x left", "leftover x")] == ["left", "right", None, None]


@pytest.mark.parametrize(
    "change",
    [{"pack": "/etc"}, {"halves": {"left": "l"}}, {"margin_mm": -1}, {"brain": 3}, {"strange": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_pack_that_names_a_first_pass_wrongly_is_refused(change: dict[str, Any]) -> None:
    assert preprocessing_faults({"first_pass": RULES}, "preprocessing") == []
    assert len(preprocessing_faults({"first_pass": {**RULES, **change}}, "preprocessing")) == 1
    assert first_pass_rules(None) is None
    rules = first_pass_rules(RULES)
    assert rules is not None
    assert rules.margin_mm == 4.0


def test_all_is_looked_for_inside_the_brain_with_its_margin_or_what_a_stripping_left() -> None:
    volume, masks = scene()
    found = look_first(volume, FirstPassRules(**RULES), ["grey matter"], asked(masks))
    assert found.brain is not None
    assert np.array_equal(found.brain, grown(masks["brain"], 4.0, np.array([3.0] * 3)))
    assert (found.volume.array[~found.brain] == 0).all()
    stripped = replace(volume, array=np.where(masks["brain"], volume.array, 0).astype(np.int16))
    coarse = {**masks, "brain": masks["brain"] & (np.indices(SHAPE)[0] < 40)}  # a part of it
    found = look_first(stripped, FirstPassRules(**RULES), ["grey matter"], asked(coarse))
    assert found.brain is not None
    assert np.array_equal(found.brain, masks["brain"])
