"""What `medlore info FOLDER` finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.data.images.inspect import describe_images
from medlore.errors import DataError
from medlore.files import json_text


def picture(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, size[::-1], dtype=np.uint8)
    Image.fromarray(values).save(path)


def test_a_folder_with_leaks_and_faults(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "0.png", 0)
    picture(tmp_path / "train" / "b" / "1.png", 1, (20, 30))
    picture(tmp_path / "test" / "a" / "same.png", 0)
    picture(tmp_path / "test" / "b" / "2.png", 2)
    (tmp_path / "test" / "b" / "cut.png").write_bytes((tmp_path / "test" / "b" / "2.png").read_bytes()[:60])
    found = describe_images(tmp_path)
    assert (found["format"], found["images"], found["classes"], found["splits"]) == ("folder", 5, {"a": 2, "b": 3}, {"train": 2, "test": 3})
    assert len(found["faults"]) == 1
    assert "cut.png: cannot be read" in found["faults"][0]
    assert found["duplicates"] == [["test/a/same.png", "train/a/0.png"]]
    assert found["leaks"] == ["the same pixels in two splits: test/a/same.png, train/a/0.png"]
    assert found["sizes"] == {"smallest": [10, 12], "median": [10, 12], "largest": [30, 20]}
    assert (found["most_shots"], found["decoded"]) == (2, 5)
    json.loads(json_text(found))
    assert describe_images(tmp_path, pixels="none")["sizes"] is None


def test_patients_in_two_splits(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "labels.csv").write_text("file,label,patient,split\n0.png,a,p1,train\n1.png,b,p1,test\n2.png,b,p2,train\n")
    found = describe_images(tmp_path)
    assert found["leaks"] == ["train and test share 1 patients or studies (p1, ...)"]
    assert found["groups"] == 2


def test_a_medfmc_folder(tmp_path: Path) -> None:
    root = tmp_path / "endo"
    for i in range(4):
        picture(root / "images" / f"study_{i // 2}_abcdefghij_{i}.png", i)
    line = "study_{}_abcdefghij_{}.png {}"
    (root / "trainval.txt").write_text("\n".join(line.format(i // 2, i, "1 0 0 1") for i in range(4)))
    (root / "endo_1-shot_train_exp1.txt").write_text(line.format(0, 0, "1 0 0 1"))
    (root / "endo_1-shot_val_exp1.txt").write_text("\n".join(line.format(i // 2, i, "1 0 0 1") for i in range(4)))
    (root / "test_WithLabel.txt").write_text(line.format(0, 0, "1 0 0"))
    found = describe_images(root)
    assert (found["format"], found["images"], found["groups"]) == ("medfmc-endo", 4, 2)
    assert found["lists"]["trainval"]["lines"] == 4
    assert found["lists"]["trainval"]["published"] == 929
    assert found["lists"]["test_WithoutLabel"]["problem"] == "not there"
    assert "1 faults" in found["lists"]["test_WithLabel"]["problem"]
    notes = found["lists"]["endo_1-shot_train_exp1"]["notes"]
    assert any("1 of 1 training images were also in the validation list" in note for note in notes)
    assert any("share a patient or study" in note for note in notes)


def test_the_real_sets(shared_data: Path) -> None:
    blood = describe_images(shared_data / "bccd.zip", pixels="sample")
    assert (blood["task"], blood["splits"], blood["most_shots"], blood["sizes"]["largest"]) == (
        "multi", {"train": 205, "val": 87, "test": 72}, 201, [240, 320],
    )  # fmt: skip
    assert blood["decoded"] == 64
    chest = describe_images(shared_data / "nih_cxr14_64.npz")
    assert (chest["groups"], chest["without_label"], chest["faults"]) == (198, 403, [])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        describe_images(tmp_path)
