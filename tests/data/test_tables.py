"""CSV tables: columns, splits, patients, counts, and every fault at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from medlore.data.images.reading import read_images
from medlore.errors import DataError, UnknownNameError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("L", (5, 5)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write(folder: Path, text: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_one_label_with_split_and_patient(folder: Path) -> None:
    path = write(folder, "Filename,Patient ID,Label,Split\n0.png,p1,sick,train\n1.png,p1,well,Training\n2.png,,sick,TEST\n")
    whole = read_images(path)
    assert (whole.task, whole.classes, whole.groups) == ("single", ("sick", "well"), ("p1", "p1", None))
    assert read_images(folder, split="train").keys == ("0.png", "1.png")
    assert read_images(folder, split="test").classes == ("sick", "well")
    with pytest.raises(UnknownNameError, match="split of"):
        read_images(path, split="val")


def test_semicolons_and_tabs_and_byte_order_mark(folder: Path) -> None:
    for delimiter in ";\t":
        path = write(folder, f"\ufefffile{delimiter}class\n0.png{delimiter}a\n")
        assert read_images(path).classes == ("a",)


def test_class_numbers_and_names(folder: Path) -> None:
    path = write(folder, "file,label\n0.png,0\n1.png,10\n2.png,2\n")
    assert read_images(path).targets().tolist() == [0, 10, 2]
    assert len(read_images(path).classes) == 11
    named = read_images(path, classes=[f"c{i}" for i in range(11)])
    assert (named.classes[10], named.targets().tolist()) == ("c10", [0, 10, 2])
    with pytest.raises(DataError, match="class '10' is not in the class list"):
        read_images(path, classes=("a", "b", "c"))


def test_counts_become_presence(folder: Path) -> None:
    path = write(folder, "file,Age,RBC,WBC,note\n0.png,50,18,0,x\n1.png,60,0,2.0,y\n")
    found = read_images(path)
    assert (found.task, found.classes, found.targets().tolist()) == ("multi", ("RBC", "WBC"), [[1, 0], [0, 1]])
    assert read_images(path, classes=("WBC",)).targets().tolist() == [[0], [1]]
    single = read_images(path, task="single")
    assert (single.task, single.targets().tolist()) == ("single", [0, 1])
    with pytest.raises(UnknownNameError, match="RBC"):
        read_images(path, classes=("RBX",))


def test_several_labels_in_one_cell_as_in_chestxray14(folder: Path) -> None:
    path = write(folder, "Image Index,Finding Labels,Patient ID,Patient Age\n0.png,Mass|Edema,1,58\n1.png,No Finding,2,40\n")
    found = read_images(path)
    assert (found.task, found.classes, found.targets().tolist(), found.groups) == (
        "multi",
        ("Edema", "Mass"),
        [[1, 1], [0, 0]],
        ("1", "2"),
    )
    with pytest.raises(DataError, match=r"line 2: classes \['Edema'\]"):
        read_images(path, classes=("Mass", "Nodule"))


def test_without_labels(folder: Path) -> None:
    found = read_images(write(folder, "file,note\n0.png,x\n"))
    assert (len(found), found.labelled, found.classes) == (1, False, ())


def test_images_elsewhere(folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    path = write(lists, "file,label\n0.png,a\n")
    with pytest.raises(DataError, match="line 2: no file"):
        read_images(path)
    assert len(read_images(path, images=folder / "images")) == 1


def test_every_fault_at_once(folder: Path) -> None:
    path = write(folder, "file,RBC\n0.png,1\n0.png,0\n,1\nabsent.png,1\n1.png,1,2\n2.png,-1\n3.png,nan\n")
    with pytest.raises(DataError) as caught:
        read_images(path, classes=("RBC",))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [f"line {n}" for n in (3, 4, 5, 6, 7, 8)]


def test_tables_that_are_none(folder: Path) -> None:
    with pytest.raises(DataError, match="one of them for the files"):
        read_images(write(folder, "a,b\n1,2\n"))
    with pytest.raises(DataError, match="one of them for the files"):
        read_images(write(folder, ""))
    with pytest.raises(DataError, match="no rows"):
        read_images(write(folder, "file,label\n"))
    with pytest.raises(DataError, match="line 2: no label"):
        read_images(write(folder, "file,label\n0.png,\n"))


def test_a_stray_table_does_not_hide_the_folders(folder: Path) -> None:
    write(folder, "file,label\nelsewhere.png,x\n", "notes.csv")
    assert read_images(folder).classes == ("images",)


def test_a_cell_without_an_end(folder: Path) -> None:
    with pytest.raises(DataError, match="not a table from line 2"):
        read_images(write(folder, 'file,label\n0.png,"' + "x" * 140_000 + "\n"))
