"""Folders and zips: hidden files, loops, hostile archives."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from medlore.data.images import trees
from medlore.data.images.trees import ArchiveMember, FolderTree, ZipTree, read_member, tree_of
from medlore.errors import DataError


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/etc/passwd", "a\\b.png", "C:/x.png"])
def test_names_that_leave_the_archive(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "evil.zip", **{name: b"x", "good.png": b"x"})
    with pytest.raises(DataError) as caught:
        ZipTree(path)
    assert len(caught.value.faults) == 1
    assert "leaves the archive" in str(caught.value)


def test_bombs_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGEST_MEMBER", 1000)
    path = archive(tmp_path / "bomb.zip", **{"big.png": b"0" * 1001, "small.png": b"0" * 1000})
    with pytest.raises(DataError, match=r"'big.png': unpacks to 1,001 bytes"):
        ZipTree(path)
    monkeypatch.setattr(trees, "LARGEST_ARCHIVE", 900)
    with pytest.raises(DataError, match="the archive expands to more than the limit"):
        ZipTree(archive(tmp_path / "many.zip", a=b"0" * 500, b=b"0" * 500))


def test_a_member_that_lies_about_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip", a=b"0" * 2000)
    monkeypatch.setattr(trees, "LARGEST_MEMBER", 1000)
    with pytest.raises(DataError, match="one member expands to more"):
        read_member(ArchiveMember(path, "a"))


def test_broken_archives(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="not a zip file that can be read"):
        tree_of(tmp_path / "no.zip")
    path = archive(tmp_path / "crc.zip", a=b"hello hello")
    path.write_bytes(path.read_bytes().replace(b"hello hello", b"hello jello"))
    with pytest.raises(DataError, match=r"cannot be read.*CRC"):
        ZipTree(path).read_bytes("a")
    with pytest.raises(DataError, match="cannot be read"):
        read_member(ArchiveMember(path, "absent"))


def test_a_replaced_archive_is_opened_anew(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", a=b"first")
    assert ZipTree(path).read_bytes("a") == b"first"
    archive(path, b=b"the second one")
    assert ZipTree(path).names == ("b",)
    assert ZipTree(path).read_bytes("b") == b"the second one"


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    tree = FolderTree(tmp_path)
    assert tree.names == ("a/x.png",)
    assert tree.empty_folders == ("empty",)


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes("\ufeffä.png 1".encode())
    assert FolderTree(tmp_path).read_text("l.txt") == "ä.png 1"
    (tmp_path / "l.txt").write_bytes("ä.png 1".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        FolderTree(tmp_path).read_text("l.txt")


def test_links_inside_archives_are_plain_bytes(tmp_path: Path) -> None:
    """A symbolic link in a zip is its text, never followed."""
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as made:
        made.writestr(info, "/etc/hostname")
    assert ZipTree(tmp_path / "l.zip").read_bytes("link.png") == b"/etc/hostname"
