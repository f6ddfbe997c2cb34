"""Files are whole or absent."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from medlore.errors import DataError, InputError, StepError
from medlore.files import (
    WRITTEN,
    atomic_folder,
    atomic_path,
    clear_remains,
    existing_file,
    json_text,
    made_folder,
    read_json,
    sha256_of,
    write_json,
    write_text,
)


def test_a_broken_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = write_text(tmp_path / "a.nii.gz", "old")

    def fail_half_way() -> None:
        with atomic_path(target) as temporary:
            assert temporary.name.endswith(".nii.gz")
            temporary.write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail_half_way()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_a_folder_replaces_its_forerunner_as_a_whole(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "pack") as folder:
            (folder / "manifest.json").write_text(content)
            (folder / content).write_text(content)
    assert sorted(p.name for p in (tmp_path / "pack").iterdir()) == [WRITTEN, "manifest.json", "two"]
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "Documents" / "thesis.tex", "years of work")
    write_text(tmp_path / "file", "precious")

    def write_over(name: str) -> None:
        with atomic_folder(tmp_path / name) as folder:
            (folder / "manifest.json").touch()

    with pytest.raises(InputError, match=r"holds other things \(thesis\.tex\), which would be lost"):
        write_over("Documents")
    with pytest.raises(InputError, match="is a file"):
        write_over("file")
    assert (tmp_path / "Documents" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Documents", "file"]


def test_a_patients_folder_is_no_forerunner_of_its_masks(tmp_path: Path) -> None:
    for name in ("image.nii.gz", "corrected by hand.nii.gz"):
        write_text(tmp_path / "patient" / name, "precious")

    def save_masks() -> None:
        with atomic_folder(tmp_path / "patient") as folder:
            for name in ("image.nii.gz", "liver.nii.gz", "case.json"):
                (folder / name).touch()

    with pytest.raises(InputError, match="holds other things"):
        save_masks()
    assert {p.name: p.read_text() for p in (tmp_path / "patient").iterdir()} == dict.fromkeys(
        ("image.nii.gz", "corrected by hand.nii.gz"), "precious"
    )


def test_a_broken_folder_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "pack") as folder:
        (folder / "good").touch()

    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "pack") as folder:
            (folder / "bad").touch()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail_half_way()
    assert sorted(p.name for p in (tmp_path / "pack").iterdir()) == [WRITTEN, "good"]
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert write_text(tmp_path / "ours", "x").stat().st_mode == plain.stat().st_mode


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_path(tmp_path / "x"):
            raise OSError(28, "No space left on device")

    with pytest.raises(StepError, match="the disk is full"):
        fill()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StepError, match="could not be written"):
        write_text(tmp_path / "file" / "below", "x")


def test_json_is_strict_and_takes_numpy(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "path": Path("a/b"),
        "set": {1},
        1: True,
    }
    assert json.loads(json_text(value)) == {
        "nan": None,
        "array": [0, 1, 2],
        "scalar": 0.5,
        "flag": True,
        "path": "a/b",
        "set": [1],
        "1": True,
    }
    assert read_json(write_json(tmp_path / "a.json", [1])) == [1]


def test_a_folder_in_which_nothing_can_be_made_is_named() -> None:
    if not Path("/proc/version").exists():
        pytest.skip("no /proc here")
    for writer in (atomic_path, atomic_folder):
        with pytest.raises(StepError, match=r"/proc/medlore\.csv: could not be written"), writer("/proc/medlore.csv"):
            pass


def test_an_output_folder_is_made_at_once_or_refused(tmp_path: Path) -> None:
    assert made_folder(tmp_path / "a" / "b").is_dir()
    assert made_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    file = write_text(tmp_path / "file", "x")
    with pytest.raises(InputError, match="is a file"):
        made_folder(file)
    with pytest.raises(StepError, match="could not be written"):
        made_folder(file / "below")


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    bad = write_text(tmp_path / "bad.json", "{\n'a'")
    with pytest.raises(DataError, match="line 2"):
        read_json(bad)
    with pytest.raises(InputError, match="no such file"):
        existing_file(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        existing_file(tmp_path, where="--ranks")


def test_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "x", "1")
    first = sha256_of(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    second = sha256_of(tmp_path / "a")
    write_text(tmp_path / "a" / "y", "2")
    assert len({first, second, sha256_of(tmp_path / "a")}) == 3
    assert sha256_of(write_text(tmp_path / "abc", "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_pipe_or_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        with pytest.raises(InputError, match="Accepted: a file to be made"):
            write_text(place, "text")
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def _write_folder(place: Path, **contents: str) -> list[str]:
    kept: list[str] = []
    with atomic_folder(place, kept=kept) as folder:
        for name, content in {"case": "{}", **contents}.items():
            write_text(folder / f"{name}.json", content)
    return kept


def test_what_somebody_added_or_changed_outlives_the_forerunner(tmp_path: Path) -> None:
    place = tmp_path / "ct"
    assert _write_folder(place, liver="1", spleen="1", heart="1") == []
    write_text(place / "notes" / "mine.txt", "added")
    write_text(place / "liver.json", "corrected by hand")
    write_text(place / "heart.json", "corrected too")
    write_text(place / "lung.json", "drawn by hand")
    kept = _write_folder(place, liver="2", lung="2")
    found = {p.relative_to(place).as_posix(): p.read_text() for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert found == {
        "case.json": "{}",
        "liver.json": "2",
        "lung.json": "2",
        "heart.json": "corrected too",
        "notes/mine.txt": "added",
        "kept/liver.json": "corrected by hand",
        "kept/lung.json": "drawn by hand",
    }  # spleen.json, untouched, went
    assert sorted(kept) == ["heart.json", "kept/liver.json", "kept/lung.json", "notes/mine.txt"]
    write_text(place / "liver.json", "corrected again")
    _write_folder(place, liver="3")
    assert (place / "kept" / "liver.json").read_text() == "corrected by hand"
    assert (place / "kept_2" / "liver.json").read_text() == "corrected again"
    assert [p.name for p in tmp_path.iterdir()] == ["ct"]


def test_a_folder_without_a_list_loses_what_is_written_anew_and_nothing_else(tmp_path: Path) -> None:
    for name in ("case.json", "older.txt"):
        write_text(tmp_path / "ct" / name, "old")
    assert _write_folder(tmp_path / "ct") == ["older.txt"]
    assert (tmp_path / "ct" / "case.json").read_text() == "{}"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "ct").symlink_to(tmp_path / "disk")
    _write_folder(tmp_path / "ct")
    assert (tmp_path / "ct").is_symlink()
    assert (tmp_path / "disk" / "case.json").read_text() == "{}"


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    for name, content in ((".old-a", "the only one"), (".old-b", "outdated"), ("b", "new"), (".part-c", "half")):
        write_text(tmp_path / name / "case.json", content)
    clear_remains(tmp_path)
    assert {p.name: (p / "case.json").read_text() for p in tmp_path.iterdir()} == {"a": "the only one", "b": "new"}
    (tmp_path / "a").rename(tmp_path / ".old-a")
    write_text(tmp_path / ".old-a" / "mine.txt", "mine")
    _write_folder(tmp_path / "a")
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_names_that_are_no_utf8_are_written_and_come_back(tmp_path: Path) -> None:
    """As on a share of Windows: the bytes of such a name are lone surrogates in Python, which UTF-8 cannot hold."""
    import os

    name = os.fsdecode(b"M\xfcller")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_text("x")
    written = write_json(tmp_path / "a.json", {"image": tmp_path / "folder" / name})
    assert read_json(written)["image"] == str(tmp_path / "folder" / name)
    assert write_text(tmp_path / "a.txt", name).read_text(encoding="utf-8") == "M\\udcfcller"
    assert len(sha256_of(tmp_path / "folder")) == 64


def test_names_that_are_utf8_are_written_as_they_are(tmp_path: Path) -> None:
    assert "größe" in write_json(tmp_path / "a.json", {"name": "größe"}).read_text(encoding="utf-8")
