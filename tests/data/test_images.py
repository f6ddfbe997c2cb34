"""Every format through the one door, on written files and on the real sets."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.data.images.pixels import load_pixels
from medlore.data.images.reading import format_of, from_arrays, read_images
from medlore.errors import DataError, InputError, UnknownNameError


def picture(path: Path, value: int = 100, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for name, count in (("cat", 3), ("dog", 2)):
        for i in range(count):
            picture(root / name / f"{i}.png", 10 * i)
    return root


def test_folder_of_classes(pets: Path) -> None:
    picture(pets / "cat" / "deep" / "er.jpg")
    (pets / ".hidden").mkdir()
    (pets / ".hidden" / "x.exe").write_text("no")
    (pets / "cat" / ".DS_Store").write_text("no")
    (pets / "README.md").write_text("beside images")
    found = read_images(pets)
    assert (found.name, found.task, found.classes) == ("pets", "single", ("cat", "dog"))
    assert found.counts() == {"cat": 4, "dog": 2}
    assert found.targets().tolist() == [0, 0, 0, 0, 1, 1]
    assert found.targets().dtype == np.int64
    assert found.keys[3] == "cat/deep/er.jpg"
    assert load_pixels(found.items[1]).shape == (10, 12, 3)
    assert load_pixels(found.items[1])[0, 0].tolist() == [10, 10, 10]
    assert found.subset([5, 0]).keys == ("dog/1.png", "cat/0.png")


def test_folder_with_splits(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "train" / "b" / "0.png")
    picture(tmp_path / "valid" / "b" / "1.png")
    assert len(read_images(tmp_path)) == 3
    assert read_images(tmp_path, split="validation").keys == ("valid/b/1.png",)
    assert read_images(tmp_path, split="validation").targets().tolist() == [1], "the class list does not depend on the split"
    with pytest.raises(UnknownNameError, match="'train', 'val'"):
        read_images(tmp_path, split="test")


def test_folder_names_every_fault_at_once(pets: Path) -> None:
    (pets / "cat" / "song.mp3").write_bytes(b"ID3")
    (pets / "bird").mkdir()
    picture(pets / "stray.png")
    with pytest.raises(DataError) as caught:
        read_images(pets)
    assert len(caught.value.faults) == 3
    assert "song.mp3" in str(caught.value)
    assert "'bird': no images" in str(caught.value)
    assert "stray.png" in str(caught.value)


def test_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    found = read_images(tmp_path)
    assert not found.labelled
    with pytest.raises(DataError, match="1 of 1 images have no labels"):
        found.targets()


def test_scanner_exports_without_a_suffix(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "1.2.840.113619").write_bytes(b"\0" * 128 + b"DICM")
    assert read_images(tmp_path).keys == ("1.2.840.113619", "IM0001")
    (tmp_path / "LICENSE").write_text("no image")
    with pytest.raises(DataError, match="LICENSE: not an image file"):
        read_images(tmp_path)


def test_empty_folder_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        read_images(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_images(tmp_path / "absent")
    with pytest.raises(InputError, match="one image"):
        read_images(picture(tmp_path / "a.png"))
    with pytest.raises(UnknownNameError, match="folder"):
        read_images(tmp_path, format="foldr")  # type: ignore[arg-type]


def test_groups_from_a_pattern(pets: Path) -> None:
    found = read_images(pets, group_pattern=r"/(\d)")
    assert found.groups == ("0", "1", "2", "0", "1")
    with pytest.raises(InputError, match="no group"):
        read_images(pets, group_pattern="x")
    with pytest.raises(InputError, match="not a valid regular expression"):
        read_images(pets, group_pattern="(")


def test_zip_of_a_folder_and_wrapped_zip(pets: Path, tmp_path: Path) -> None:
    for wrapper, name in (("", "plain.zip"), ("top/", "wrapped.zip")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path in sorted(pets.rglob("*.png")):
                archive.write(path, wrapper + path.relative_to(pets).as_posix())
            archive.writestr("__MACOSX/junk.bin", "x")
        found = read_images(tmp_path / name)
        assert found.counts() == {"cat": 3, "dog": 2}
        assert load_pixels(found.items[2])[0, 0, 0] == 20


def test_arrays() -> None:
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    single = from_arrays(images, np.array([[1], [0]]), classes=("a", "b"), name="s", groups=["p", "q"])
    assert (single.task, single.targets().tolist(), single.groups) == ("single", [1, 0], ("p", "q"))
    multi = from_arrays(images, [[1, 0, 1], [0, 0, 0]], classes=("a", "b", "c"), name="m")
    assert multi.task == "multi"
    assert multi.targets().dtype == np.float32
    assert multi.counts() == {"a": 1, "b": 0, "c": 1}
    assert not from_arrays(images, None, classes=(), name="u").labelled


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], "image 1: label 2"),
        ([0], "labels of shape"),
        ([0.5, 0], "image 0"),
        ([[0, 1, 2], [0, 0, 0]], "image 0"),
        ([-1, 0], "image 0"),
    ],
)
def test_arrays_with_wrong_labels(labels: list[object], message: str) -> None:
    classes = ("a", "b", "c") if isinstance(labels[0], list) else ("a", "b")
    with pytest.raises(DataError, match=message):
        from_arrays(np.zeros((2, 4, 4), np.uint8), labels, classes=classes, name="x")


def test_arrays_of_wrong_shape() -> None:
    with pytest.raises(DataError, match=r"image 0: shape \(4, 4, 2\)"):
        from_arrays(np.zeros((2, 4, 4, 2), np.uint8), [0, 0], classes=("a",), name="x")
    with pytest.raises(DataError, match="3 keys"):
        from_arrays(np.zeros((2, 4, 4), np.uint8), [0, 0], classes=("a",), name="x", keys=["1", "2", "3"])


def write_npz(path: Path, **changes: object) -> Path:
    arrays: dict[str, object] = {}
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        arrays[f"{part}_images"] = np.full((count, 8, 8), 7, np.uint8)
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 3
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})  # type: ignore[arg-type]
    return path


def test_npz_like_medmnist(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "bloodish.npz")
    assert read_images(path).keys[:5] == ("train/0", "train/1", "train/2", "train/3", "val/0")
    test = read_images(path, split="test")
    assert (test.task, test.classes, test.targets().tolist(), test.keys) == ("single", ("0", "1", "2"), [0, 1], ("0", "1"))
    with pytest.raises(UnknownNameError, match="split of"):
        read_images(path, split="extra")


def test_npz_multi_label_and_one_hot(tmp_path: Path) -> None:
    rows = np.eye(3, dtype=np.uint8)[[0, 2, 1, 1]]
    path = tmp_path / "m.npz"
    np.savez(path, images=np.zeros((4, 8, 8), np.uint8), labels=rows, classes=np.array(["x", "y", "z"]), patients=np.array([1, 1, 2, 3]))
    multi = read_images(path)
    assert (multi.task, multi.classes, multi.groups) == ("multi", ("x", "y", "z"), ("1", "1", "2", "3"))
    single = read_images(path, task="single")
    assert (single.task, single.targets().tolist()) == ("single", [0, 2, 1, 1])
    np.savez(path, images=np.zeros((2, 8, 8), np.uint8), labels=np.array([[1, 1], [1, 0]], np.uint8))
    with pytest.raises(DataError, match=r"row 0: \[1, 1\]"):
        read_images(path, task="single")


def test_npz_with_values_that_are_not_numbers_names_the_images(tmp_path: Path) -> None:
    images = np.ones((5, 4, 4), np.float32)
    images[1, 2, 3], images[4, :2] = np.nan, np.inf
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([0, 1, 0, 1, 0]))
    with pytest.raises(DataError, match="2 of 5 images hold NaN or infinity") as caught:
        read_images(tmp_path / "x.npz")
    assert caught.value.faults == ("image 1: 1 values", "image 4: 8 values")
    np.savez(tmp_path / "x.npz", images=np.where(np.isfinite(images), images, 0), labels=np.array([0, 1, 0, 1, 0]))
    assert len(read_images(tmp_path / "x.npz")) == 5


@pytest.mark.parametrize(
    ("name", "came"),
    [("paper.pdf", r"a file of type '\.pdf'"), ("blob", "a file without suffix"), ("cut.zip", "not a complete zip archive")],
)
def test_files_of_other_kinds_learn_what_is_accepted(tmp_path: Path, name: str, came: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=came) as caught:
        read_images(tmp_path / name)
    assert all(word in caught.value.accepted for word in ("folder", ".zip", ".csv", ".npz", ".txt"))


def test_a_text_that_is_called_npz_and_a_folder_that_is_not_there(tmp_path: Path, pets: Path) -> None:
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(DataError, match="no archive of arrays"):
        read_images(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"images .*nowhere: no such file or folder"):
        read_images(pets, images=tmp_path / "nowhere")


def test_a_list_of_bytes_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_images(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("some words\nand more\n")
    with pytest.raises(DataError, match="a list of no known format"):
        read_images(tmp_path / "list.txt")


def test_npz_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(DataError, match="not an npz file of plain arrays"):
        read_images(path)
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="not an npz file"):
        read_images(path)
    with pytest.raises(DataError, match="train_images"):
        read_images(write_npz(path, train_images=None, val_images=None, test_images=None))


@pytest.mark.parametrize(
    ("name", "task", "count", "classes", "first"),
    [
        ("bccd.zip", "multi", 364, ("RBC", "WBC", "Platelets"), {"RBC": 349, "WBC": 358, "Platelets": 201}),
        ("brain_tumor_4c.zip", "single", 2294, None, {"glioma_tumor": 708, "no_tumor": 261}),
        ("mednist.zip", "single", 9000, ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"), {"CXR": 1500}),
        ("flowers5.zip", "single", 1500, ("daisy", "dandelion", "rose", "sunflower", "tulip"), {"rose": 300}),
        ("dtd10.zip", "single", 600, None, {"banded": 60}),
        ("tiny_imagenet_180.zip", "single", 21600, None, {"n01443537": 120}),
        ("nih_cxr14_64.npz", "multi", 808, None, {"Hernia": 8, "Infiltration": 135}),
        ("pneumoniamnist_modified.npz", "single", 5030, ("0", "1"), {}),
    ],
)
def test_the_real_sets(shared_data: Path, name: str, task: str, count: int, classes: tuple[str, ...] | None, first: dict[str, int]) -> None:
    found = read_images(shared_data / name)
    assert (found.task, len(found), found.labelled) == (task, count, True)
    assert classes is None or found.classes == classes
    assert first.items() <= found.counts().items()
    assert len(set(found.keys)) == count
    pixels = load_pixels(found.items[count // 2])
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 1


def test_real_splits_and_patients(shared_data: Path) -> None:
    assert [len(read_images(shared_data / "bccd.zip", split=s)) for s in ("train", "val", "test")] == [205, 87, 72]
    assert [len(read_images(shared_data / "pneumoniamnist_modified.npz", split=s)) for s in ("train", "val", "test")] == [3882, 524, 624]
    chest = read_images(shared_data / "nih_cxr14_64.npz")
    assert len(set(chest.groups)) == 198
    assert chest.items[0].group == "00000231"
    unlabelled = read_images(shared_data / "camelyon17_he_unlabelled.zip")
    assert len(unlabelled) == 100
    assert not unlabelled.labelled


def test_format_is_seen(shared_data: Path, pets: Path) -> None:
    assert format_of(shared_data / "bccd.zip") == "csv"
    assert format_of(pets) == "folder"
    assert format_of(shared_data / "nih_cxr14_64.npz") == "npz"
