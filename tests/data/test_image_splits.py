"""Parts of a data set: nothing that judges is learnt from, whatever parts the set names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.splits import ImageSplits, SplitRules, hold_out, read_splits, split_images
from medlore.errors import DataError
from tiny_backbone import striped


def images_of(part: ImageSet | None) -> set[str]:
    return set() if part is None else {Path(str(item.source)).name for item in part.items}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Validation and test part, and no training part."""
    rng = np.random.default_rng(0)
    rows = ["file,label,split"]
    for part in ("val", "test"):
        for label in "ab":
            place = tmp_path / "set" / part / label
            place.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{part}{label}{i}.png")
                rows.append(f"set/{part}/{label}/{part}{label}{i}.png,{label},{'fit' if part == 'val' else part}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return tmp_path / "set"


def check_apart(splits: ImageSplits) -> None:
    assert splits.test is not None
    assert splits.validation is not None
    train, validation, test = (images_of(part) for part in (splits.train, splits.validation, splits.test))
    assert len(test) == 12
    assert len(train) == 6
    assert not train & test
    assert not validation & test
    assert not train & validation
    assert any("12 of 24 training images are test images too" in note for note in splits.notes)


def test_a_test_part_never_trains_where_no_training_part_is_named(folder: Path) -> None:
    check_apart(read_splits(folder, SplitRules(shots=3, validation_shots=3)))


def test_a_test_part_of_a_table_never_trains(folder: Path) -> None:
    check_apart(read_splits(folder.parent / "table.csv", SplitRules(shots=3, validation_shots=3)))


def test_a_test_part_of_an_npz_never_trains(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, tests = rng.integers(0, 255, (2, 12, 8, 8), dtype=np.uint8)
    labels = np.arange(12) % 2
    np.savez(tmp_path / "set.npz", images=images, labels=labels, test_images=tests, test_labels=labels)
    splits = read_splits(tmp_path / "set.npz", SplitRules(shots=3))
    judged = {item.source.tobytes() for item in splits.test.items}  # type: ignore[union-attr]
    assert len(judged) == 12
    assert not any(item.source.tobytes() in judged for item in splits.train.items)  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["split", "test_data"])
def test_the_test_set_alone_cannot_be_trained_on(folder: Path, how: str) -> None:
    arguments = {"split": "test"} if how == "split" else {"split": "val", "test_data": folder.parent / "again"}
    if how == "test_data":
        (folder.parent / "again").symlink_to(folder / "val")
    with pytest.raises(DataError, match="every training image is a test image too"):
        read_splits(folder, SplitRules(shots=3), **arguments)  # type: ignore[arg-type]


def uneven(counts: list[int]) -> ImageSet:
    """Blank images, `counts` of them a class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return from_arrays(np.zeros((len(labels), 4, 4), np.uint8), labels, classes=[f"c{i}" for i in range(len(counts))], name="uneven")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_no_class_gives_its_last_image_away(fraction: float, seed: int) -> None:
    pool = uneven([1, 2, 1, 30, 1])
    rest, held = hold_out(pool, fraction, seed=seed)
    assert len(rest) + len(held) == len(pool)
    assert all(count >= 1 for count in rest.counts().values())
    assert [held.counts()[c] for c in ("c0", "c2", "c4")] == [0, 0, 0]
    assert held.counts()["c3"] >= 30 * fraction - 1


def test_the_last_patient_and_the_last_positive_stay_too() -> None:
    pixels = np.zeros((6, 4, 4), np.uint8)
    patients = ["a", "a", "b", "b", "c", "c"]
    pool = from_arrays(pixels, [0, 0, 1, 1, 1, 1], classes=("one patient", "two"), name="p", groups=patients)
    rest, held = hold_out(pool, 0.9, seed=0)
    assert set(rest.groups) >= {"a"}
    assert rest.counts() == {"one patient": 2, "two": 2}
    assert len(set(held.groups)) == 1
    rare = from_arrays(pixels, [[1, 0], [1, 0], [1, 0], [1, 0], [1, 1], [1, 0]], classes=("x", "rare"), name="m")
    for seed in range(5):
        assert hold_out(rare, 0.8, seed=seed)[0].counts()["rare"] == 1


def test_classes_without_a_held_out_image_are_named_and_none_at_all_is_an_error() -> None:
    parts = split_images(uneven([1, 40, 20]), SplitRules())
    assert "no test image of: c0 (too few images to hold one out)" in parts.notes
    assert "no validation image of: c0 (too few images to hold one out)" in parts.notes
    assert not any("c1" in note for note in parts.notes)
    with pytest.raises(DataError, match="no image or group that its classes can spare"):
        hold_out(uneven([1, 1, 1]), 0.5, seed=0)


def test_shared_patients_of_given_parts_are_counted() -> None:
    whole = striped(groups=True)
    test = whole.subset(range(0, len(whole), 2))  # of two images a patient, one judges
    splits = split_images(whole, SplitRules(shots=3), test=test)
    assert any(f"{len(whole) // 2} training images share a patient or study with test images" in note for note in splits.notes)
