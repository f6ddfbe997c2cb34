"""Draws: exact, seeded, apart by patient, and honest about what they could not do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlore.data.images.fewshot import draw_shots
from medlore.data.images.reading import ImageSet, from_arrays, read_images
from medlore.errors import DataError, InputError


def pool_of(labels: list[object], *, classes: int, groups: list[str] | None = None) -> ImageSet:
    images = np.zeros((len(labels), 2, 2), np.uint8)
    keys = [f"k{i:03}" for i in range(len(labels))]
    return from_arrays(images, np.array(labels), classes=[f"c{i}" for i in range(classes)], name="pool", groups=groups, keys=keys)


def shuffled(pool: ImageSet, seed: int) -> ImageSet:
    return pool.subset(np.random.default_rng(seed).permutation(len(pool)).tolist())


def test_exactly_k_of_every_class() -> None:
    pool = pool_of([i % 3 for i in range(30)], classes=3)
    drawn = draw_shots(pool, shots=4)
    assert drawn.train.counts() == {"c0": 4, "c1": 4, "c2": 4}
    assert len(drawn.validation) == 18
    assert not set(drawn.train.keys) & set(drawn.validation.keys)
    assert drawn.notes == ()


def test_the_same_draw_from_a_pool_in_another_order() -> None:
    pool = pool_of([i % 3 for i in range(30)], classes=3, groups=[f"p{i // 2}" for i in range(30)])
    first = draw_shots(pool, shots=3, draw=2, seed=5)
    again = draw_shots(shuffled(pool, 1), shots=3, draw=2, seed=5)
    assert first.train.keys == again.train.keys
    assert set(first.validation.keys) == set(again.validation.keys)
    assert draw_shots(pool, shots=3, draw=3, seed=5).train.keys != first.train.keys
    assert draw_shots(pool, shots=3, draw=2, seed=6).train.keys != first.train.keys


def test_more_shots_contain_fewer() -> None:
    pool = pool_of([i % 4 for i in range(80)], classes=4)
    sizes = [set(draw_shots(pool, shots=k).train.keys) for k in (1, 5, 10)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_k_images_from_k_patients() -> None:
    """Ten patients with ten images each: five shots are images of five patients, and no other image of them is used."""
    labels = [0] * 50 + [1] * 50
    pool = pool_of(labels, classes=2, groups=[f"p{i // 10}" for i in range(100)])
    drawn = draw_shots(pool, shots=5)
    assert drawn.train.counts() == {"c0": 5, "c1": 5}
    assert len(set(drawn.train.groups)) == 10
    assert len(drawn.validation) == 0
    assert "90 images of drawn groups are in neither part" in drawn.notes
    two = draw_shots(pool, shots=2)
    assert len(two.validation) == 60
    assert not set(two.train.groups) & set(two.validation.groups)


def test_k_images_from_fewer_patients() -> None:
    pool = pool_of([0] * 12, classes=1, groups=[f"p{i // 4}" for i in range(12)])
    drawn = draw_shots(pool, shots=7, seed=3)
    assert sorted(Counter(drawn.train.groups).values()) == [2, 2, 3]


def test_a_shot_as_a_patient() -> None:
    labels = [0, 0, 1, 0, 0, 0, 1, 1, 1, 1]
    groups = ["a", "a", "a", "b", "b", "c", "d", "d", "e", "f"]
    drawn = draw_shots(pool_of(labels, classes=2, groups=groups), shots=2, per="group", seed=1)
    for c in (0, 1):
        of_class = {item.group for item in drawn.train.items if item.labels == (c,)}
        assert len(of_class) == 2
        for group in of_class:  # with all its images of the class
            have = sum(item.group == group and item.labels == (c,) for item in drawn.train.items)
            assert have == sum(g == group and label == c for g, label in zip(groups, labels, strict=True))
    assert not set(drawn.train.groups) & set(drawn.validation.groups)
    assert any("images per class above 2" in note for note in drawn.notes) == (max(drawn.train.counts().values()) > 2)


def test_too_few_is_an_error_that_names_every_class() -> None:
    pool = pool_of([0, 0, 0, 1, 2], classes=4)
    with pytest.raises(DataError, match="3 classes have fewer images") as caught:
        draw_shots(pool, shots=2)
    assert caught.value.faults == ("c1: 1 of 2", "c2: 1 of 2", "c3: 0 of 2")
    drawn = draw_shots(pool, shots=2, allow_fewer=True)
    assert drawn.train.counts() == {"c0": 2, "c1": 1, "c2": 1, "c3": 0}
    assert drawn.notes[0] == "fewer images than asked for: c1: 1 of 2; c2: 1 of 2; c3: 0 of 2"
    assert "no validation image of: c1, c2, c3" in drawn.notes


def test_wrong_arguments() -> None:
    pool = pool_of([0, 1], classes=2)
    with pytest.raises(InputError, match="shots: got 0"):
        draw_shots(pool, shots=0)
    with pytest.raises(InputError, match="draw: got 0"):
        draw_shots(pool, shots=1, draw=0)
    bare = from_arrays(np.zeros((2, 2, 2), np.uint8), None, classes=("a",), name="x")
    with pytest.raises(DataError, match="without labels"):
        draw_shots(bare, shots=1)


def test_multi_label_reaches_k_where_it_can() -> None:
    rows = [[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]]
    pool = pool_of(rows, classes=3)
    drawn = draw_shots(pool, shots=2)
    assert drawn.train.counts()["c2"] == 1
    assert drawn.train.counts()["c0"] >= 2
    assert drawn.train.counts()["c1"] >= 2
    assert drawn.notes[0] == "fewer images than asked for: c2: 1 of 2"
    with pytest.raises(DataError, match="c2: 1 of 2"):
        draw_shots(pool, shots=2, allow_fewer=False)
    assert len(draw_shots(pool, shots=1).train) == 1, "one image with all three labels is enough"


def test_validation_can_be_small_too() -> None:
    pool = pool_of([i % 2 for i in range(60)], classes=2, groups=[f"p{i // 3}" for i in range(60)])
    drawn = draw_shots(pool, shots=3, validation_shots=3)
    assert drawn.validation.counts() == {"c0": 3, "c1": 3}
    assert not set(drawn.train.groups) & set(drawn.validation.groups)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_always_holds(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 4))
    multi = data.draw(st.booleans())
    count = data.draw(st.integers(1, 40))
    bit = st.integers(0, 1)
    label = st.lists(bit, min_size=classes, max_size=classes) if multi else st.integers(0, classes - 1)
    labels = data.draw(st.lists(label, min_size=count, max_size=count))
    groups = data.draw(st.none() | st.lists(st.sampled_from("abcdefgh"), min_size=count, max_size=count))
    per = data.draw(st.sampled_from(["image", "group"]))
    shots = data.draw(st.integers(1, 5))
    pool = pool_of(labels, classes=classes, groups=groups)
    drawn = draw_shots(pool, shots=shots, per=per, allow_fewer=True)
    unit = (lambda item: item.group or item.key) if per == "group" else (lambda item: item.key)
    for c in range(classes):
        has = [i for i in pool.items if (i.labels[c] if pool.task == "multi" else i.labels[0] == c)]
        got = [i for i in drawn.train.items if (i.labels[c] if pool.task == "multi" else i.labels[0] == c)]
        reach = min(shots, len({unit(i) for i in has}))
        assert len({unit(i) for i in got}) >= reach
        if pool.task == "single" and per == "image":
            assert len(got) == reach
    assert not set(drawn.train.keys) & set(drawn.validation.keys)
    assert not ({g for g in drawn.train.groups if g} & {g for g in drawn.validation.groups if g})
    assert len(set(drawn.train.keys)) == len(drawn.train)


def test_the_real_chest_set(shared_data: Path) -> None:
    pool = read_images(shared_data / "nih_cxr14_64.npz")
    drawn = draw_shots(pool, shots=5)
    counts = drawn.train.counts()
    assert min(counts.values()) >= 5
    assert len(drawn.train) <= 5 * 14
    assert not set(drawn.train.groups) & set(drawn.validation.groups)
    assert any("in neither part" in note for note in drawn.notes)


def test_the_real_slices(shared_data: Path) -> None:
    pool = read_images(shared_data / "brain_tumor_4c.zip")
    for draw in range(1, 6):
        assert set(draw_shots(pool, shots=10, draw=draw).train.counts().values()) == {10}
