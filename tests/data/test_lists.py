"""The list formats: right lines, wrong lines, places of images, official draws."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from medlore.data.images.fewshot import read_official_draw
from medlore.data.images.lists import CHEST_CLASSES, RADIMAGENET_RANGES, VTAB_CLASSES, VTAB_GROUPS, medfmc_format, parse_list
from medlore.data.images.pixels import load_pixels
from medlore.data.images.reading import read_images
from medlore.errors import DataError, InputError, UnknownNameError

COLON = "2019-04632-1-1-04 2019-05-19 12_00_00-lv1-13379-6834-3024-3013p{:04d}.png"
ENDO = "bg_2021.06_0000010_{:05d}.png"


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(path)


def chest_line(name: str, *present: int) -> str:
    return f"{name} " + ",".join("1" if i in present else "0" for i in range(19))


@pytest.fixture
def chest(tmp_path: Path) -> Path:
    root = tmp_path / "chest"
    files(root / "images", *(f"c{i}.png" for i in range(5)))
    (root / "trainval.txt").write_text("\n".join(chest_line(f"c{i}.png", i) for i in range(4)) + "\n")
    (root / "test_WithLabel.txt").write_text(chest_line("c4.png", 18) + "\n")
    (root / "test_WithoutLabel.txt").write_text("c4.png\n")
    return root


def test_the_published_names_and_numbers() -> None:
    assert len(CHEST_CLASSES) == 19
    assert (CHEST_CLASSES[10], CHEST_CLASSES[18]) == ("TB", "consolidation")
    assert medfmc_format("colon").classes == ("negative", "positive")
    assert medfmc_format("endo").classes == ("ulcer", "erosion", "polyp", "tumor")
    assert (len(VTAB_CLASSES), VTAB_CLASSES["dtd"], VTAB_CLASSES["sun397"], VTAB_CLASSES["smallnorb_azi"]) == (19, 47, 397, 18)
    assert [len(names) for names in VTAB_GROUPS.values()] == [7, 4, 8]
    assert [b - a + 1 for a, b in RADIMAGENET_RANGES] == [6, 28, 2, 13, 18, 14, 9, 25, 26, 10, 14]


def test_chest(chest: Path) -> None:
    pool = read_images(chest)
    assert (pool.task, len(pool), pool.classes) == ("multi", 4, CHEST_CLASSES)
    assert pool.targets().argmax(1).tolist() == [0, 1, 2, 3]
    assert pool.items[0].group is None
    assert read_images(chest, split="test").keys == ("c4.png",)
    challenge = read_images(chest, split="test_WithoutLabel")
    assert challenge.keys == ("c4.png",)
    assert not challenge.labelled
    assert read_images(chest / "trainval.txt").keys == pool.keys
    with pytest.raises(UnknownNameError, match="trainval"):
        read_images(chest, split="trainvall")
    with pytest.raises(InputError, match="beside the list"):
        read_images(chest / "trainval.txt", split="test")


def test_a_list_inside_a_zip(chest: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "medfmc.zip", "w") as archive:
        for path in sorted(p for p in chest.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(tmp_path).as_posix())
    found = read_images(tmp_path / "medfmc.zip", split="test")
    assert (found.keys, found.classes) == (("c4.png",), CHEST_CLASSES)
    assert load_pixels(found.items[0]).shape == (5, 6, 3)


def test_images_elsewhere(chest: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (chest / "images").rename(tmp_path / "pictures" / "all")
    with pytest.raises(DataError, match=r"line 1: no file"):
        read_images(chest)
    assert len(read_images(chest, images=tmp_path / "pictures" / "all")) == 4
    with pytest.raises(InputError, match="no such file or folder"):
        read_images(chest, images=tmp_path / "nowhere")


def test_all_faults_of_a_list_at_once(chest: Path) -> None:
    lines = [
        chest_line("c0.png", 1),
        "c1.png 0,1,0",
        chest_line("absent.png", 2),
        chest_line("c2.png").replace("0", "2", 1).replace("c2", "c3"),
        chest_line("c0.png", 5),
        chest_line("c0.png", 1),
        "c4.png",
        chest_line("../c1.png"),
    ]
    lines[3] = "c3.png " + ",".join(["2"] + ["0"] * 18)
    (chest / "trainval.txt").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_images(chest, format="medfmc-chest")
    assert [fault.split(":")[0] for fault in caught.value.faults] == [f"line {n}" for n in (2, 3, 4, 5, 7, 8)]
    for part in (
        "3 labels instead of 19",
        "no file 'images/absent.png'",
        "other than 0 and 1",
        "other labels on line 1",
        "leaves the image",
    ):
        assert part in str(caught.value)


def test_colon_names_hold_spaces(tmp_path: Path) -> None:
    root = tmp_path / "colon"
    names = [COLON.format(i) for i in (1, 2)]
    files(root / "images", *names)
    (root / "trainval.txt").write_text(f"{names[0]} 0\n{names[1]} 1\n")
    found = read_images(root)
    assert (found.keys, found.targets().tolist(), found.task) == (tuple(names), [0, 1], "single")
    assert found.items[0].group == names[0][:-9] == found.items[1].group
    (root / "trainval.txt").write_text(f"{names[0]} 2\n")
    with pytest.raises(DataError, match="class 2, but there are 2"):
        read_images(root, format="medfmc-colon")


def test_endo_labels_and_study(tmp_path: Path) -> None:
    root = tmp_path / "endo"
    name = ENDO.format(3)
    files(root / "images", name)
    (root / "trainval.txt").write_text(f"{name} 1 0 0 1\n")
    found = read_images(root)
    assert found.targets().tolist() == [[1, 0, 0, 1]]
    assert found.items[0].group == name[:18] == "bg_2021.06_0000010"
    for wrong, message in ((f"{name} 1 0 0", "3 labels instead of 4"), (f"{name} 0 1 0 0 1", "5 labels instead of 4"), (name, "no labels")):
        assert message in parse_list(wrong, medfmc_format("endo")).faults[0]


def test_doubled_lines_are_noted(chest: Path) -> None:
    text = (chest / "trainval.txt").read_text()
    (chest / "trainval.txt").write_text(text + text.splitlines()[0])
    found = read_images(chest)
    assert len(found) == 4
    assert found.notes == ("line 5: c0.png stands already on line 1",)


def test_empty_list(chest: Path) -> None:
    (chest / "trainval.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no lines"):
        read_images(chest, format="medfmc-chest")


def test_vtab(tmp_path: Path) -> None:
    root = tmp_path / "dtd"
    files(root, *(f"images/{i}.jpg" for i in range(3)))
    (root / "train800val200.txt").write_text("images/0.jpg 0\nimages/1.jpg 46\n")
    (root / "train800.txt").write_text("images/0.jpg 0\n")
    (root / "val200.txt").write_text("images/1.jpg 46\nimages/0.jpg 0\n")
    (root / "test.txt").write_text("images/2.jpg 5\n")
    (root / "few_shot_exps").mkdir()
    (root / "few_shot_exps" / "train_1-shot_exp2.txt").write_text("images/0.jpg 0\n")
    assert len(read_images(root).classes) == 47
    assert [len(read_images(root, split=s)) for s in ("train", "val", "test", "train_1-shot_exp2")] == [1, 2, 1, 1]
    assert read_images(root / "few_shot_exps" / "train_1-shot_exp2.txt").keys == ("images/0.jpg",)
    drawn = read_official_draw(root, "dtd", 1, 2)
    assert (drawn.train.keys, drawn.validation.keys) == (("images/0.jpg",), ("images/1.jpg",))
    assert "1 of 1 training images were also in the validation list" in drawn.notes[0]
    (root / "test.txt").write_text("images/2.jpg 47\n")
    with pytest.raises(DataError, match="class 47, but there are 47"):
        read_images(root, split="test")


def test_vtab_folder_of_another_name(tmp_path: Path) -> None:
    files(tmp_path, "images/0.jpg", "images/1.jpg")
    (tmp_path / "train800val200.txt").write_text("images/0.jpg 0\n")
    (tmp_path / "test.txt").write_text("images/1.jpg 6\n")
    assert len(read_images(tmp_path, format="vtab").classes) == 7, "the largest label of all lists, not of this one"


def test_radimagenet(tmp_path: Path) -> None:
    files(tmp_path, "CT/abd/normal/a.png", "MR/knee/b.png")
    (tmp_path / "rad_train_shuffled.txt").write_text("/CT/abd/normal/a.png 6\n/MR/knee/b.png 164\n")
    found = read_images(tmp_path)
    assert (len(found.classes), found.targets().tolist()) == (165, [6, 164])
    assert found.items[0].source == tmp_path / "CT/abd/normal/a.png"


def test_list_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("hello world\n")
    with pytest.raises(DataError, match="say which: format="):
        read_images(tmp_path / "some.txt")


def test_official_draw_without_leaks(chest: Path) -> None:
    rows = {i: chest_line(f"c{i}.png", i) for i in range(5)}
    (chest / "chest_1-shot_train_exp1.txt").write_text("\n".join([rows[0], rows[1], rows[0]]))
    (chest / "chest_1-shot_val_exp1.txt").write_text("\n".join([rows[0], rows[2], rows[3], rows[1]]))
    drawn = read_official_draw(chest, "chest", 1, 1)
    assert drawn.train.keys == ("c0.png", "c1.png")
    assert drawn.validation.keys == ("c2.png", "c3.png")
    assert any("1 lines name an image again" in note for note in drawn.notes)
    assert any("2 of 2 training images were also in the validation list" in note for note in drawn.notes)
    with pytest.raises(UnknownNameError, match="list of"):
        read_official_draw(chest, "chest", 5, 1)
    with pytest.raises(UnknownNameError, match="'chest'"):
        read_official_draw(chest, "chst", 1, 1)


def test_official_colon_draw_shares_slides(tmp_path: Path) -> None:
    root = tmp_path / "MedFMC" / "colon"
    names = [COLON.format(i) for i in (1, 2)] + [COLON.replace("04632", "07777").format(3)]
    files(root / "images", *names)
    (root / "colon_1-shot_train_exp3.txt").write_text(f"{names[0]} 0\n")
    (root / "colon_1-shot_val_exp3.txt").write_text(f"{names[1]} 0\n{names[2]} 1\n")
    drawn = read_official_draw(tmp_path / "MedFMC", "colon", 1, 3)
    assert drawn.validation.keys == (names[2],)
    assert "1 validation images share a patient or study with training; removed" in drawn.notes[0]
    kept = read_official_draw(tmp_path / "MedFMC", "colon", 1, 3, shared_groups="keep")
    assert len(kept.validation) == 2
    assert "kept, as asked" in kept.notes[0]
    (root / "colon_1-shot_val_exp3.txt").write_text(f"{names[1]} 0\n")
    with pytest.raises(DataError, match="nothing is left"):
        read_official_draw(root, "colon", 1, 3)
