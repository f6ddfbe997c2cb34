"""Where image files lie: a folder or a zip archive, seen through the same four questions.

A zip is treated as hostile: it is never unpacked to disk, names that leave the archive are refused, and a member that
would unpack to more than a stated size is refused before it is read.
"""

from __future__ import annotations

import functools
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medlore.errors import DataError, InputError
from medlore.files import refuse_device

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".pgm", ".ppm", ".dcm")
# Files that lie beside images and are none; they are passed over in silence.
BESIDE_SUFFIXES = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".yaml",
    ".yml",
    ".md",
    ".xml",
    ".html",
    ".npz",
    ".npy",
    ".zip",
    ".pdf",
    ".db",
    ".ini",
)
LARGEST_MEMBER = 256 * 2**20  # bytes, unpacked
LARGEST_ARCHIVE = 64 * 2**30  # bytes, unpacked, all members together
MOST_MEMBERS = 5_000_000


@dataclass(frozen=True)
class ArchiveMember:
    """One file inside a zip archive.

    Args:
        archive: the zip file.
        name: the member's name in it, with forward slashes.
    """

    archive: Path
    name: str

    def __str__(self) -> str:
        return f"{self.archive}!{self.name}"


class Tree(ABC):
    """A set of files with relative names (forward slashes, hidden files left out)."""

    root: Path

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The relative names of all files, sorted."""

    @property
    def empty_folders(self) -> tuple[str, ...]:
        """Folders that hold no file at any depth; archives have none."""
        return ()

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this relative name."""

    @abstractmethod
    def source(self, name: str) -> Path | ArchiveMember:
        """The place that `load_pixels` reads."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """The content of one small file (a list or a table)."""

    def read_text(self, name: str) -> str:
        """The text of a list or table; UTF-8, with or without a byte order mark.

        Raises:
            DataError: the bytes are not UTF-8.
        """
        try:
            return self.read_bytes(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.root}/{name}", f"not UTF-8 text ({error})", "a list or table in UTF-8", "save it as UTF-8") from error


class FolderTree(Tree):
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def names(self) -> tuple[str, ...]:
        """The relative names of all files, sorted; hidden files and folders left out."""
        return self._walked[0]

    @property
    def empty_folders(self) -> tuple[str, ...]:
        """Folders without any file or folder."""
        return self._walked[1]

    @functools.cached_property
    def _walked(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found: list[str] = []
        empty: list[str] = []
        seen: set[tuple[int, int]] = set()
        for folder, inner, files in os.walk(self.root, followlinks=True):
            stat = Path(folder).stat()
            if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back up
                inner.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            inner[:] = [name for name in inner if not _hidden(name) and name != "__MACOSX"]
            beginning = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if beginning == "." else beginning + "/"
            shown = [prefix + name for name in files if not _hidden(name)]
            found += shown
            if prefix and not shown and not inner:
                empty.append(beginning)
        return tuple(sorted(found)), tuple(sorted(empty))

    def has(self, name: str) -> bool:
        """Whether there is a file of this relative name."""
        return (self.root / name).is_file()

    def source(self, name: str) -> Path:
        """The file's path."""
        return self.root / name

    def read_bytes(self, name: str) -> bytes:
        """The content of one small file."""
        refuse_device(self.root / name)
        return (self.root / name).read_bytes()


class ZipTree(Tree):
    """The members of a zip archive, checked before anything is read.

    Raises:
        DataError: not a zip file, encrypted, a name that leaves the archive, or too large when unpacked.
    """

    def __init__(self, path: Path) -> None:
        self.root = path
        self._names = _checked_names(path)
        self._known = frozenset(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all members, sorted."""
        return self._names

    def has(self, name: str) -> bool:
        """Whether there is a member of this name."""
        return name in self._known

    def source(self, name: str) -> ArchiveMember:
        """The member, read when it is needed."""
        return ArchiveMember(self.root, name)

    def read_bytes(self, name: str) -> bytes:
        """The content of one member."""
        return read_member(self.source(name))


class SubTree(Tree):
    """One folder of another tree."""

    def __init__(self, tree: Tree, folder: str) -> None:
        self.tree, self.prefix = tree, folder + "/"
        self.root = tree.root / folder

    @property
    def names(self) -> tuple[str, ...]:
        """The names below the folder, relative to it."""
        return tuple(name.removeprefix(self.prefix) for name in self.tree.names if name.startswith(self.prefix))

    def has(self, name: str) -> bool:
        """Whether there is a file of this relative name."""
        return self.tree.has(self.prefix + name)

    def source(self, name: str) -> Path | ArchiveMember:
        """The place that `load_pixels` reads."""
        return self.tree.source(self.prefix + name)

    def read_bytes(self, name: str) -> bytes:
        """The content of one small file."""
        return self.tree.read_bytes(self.prefix + name)


def read_member(member: ArchiveMember) -> bytes:
    """The bytes of one archive member.

    Raises:
        DataError: it is absent, broken, or larger than its directory entry says.
    """
    try:
        with _archive(member.archive).open(member.name) as stream:
            content = stream.read(LARGEST_MEMBER + 1)
    except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise DataError(str(member), f"cannot be read ({error})", "a complete, unencrypted member", "make the archive again") from error
    if len(content) > LARGEST_MEMBER:
        raise _too_large(str(member), "one member")
    return content


def tree_of(path: Path) -> Tree:
    """The tree at `path`: a folder or a zip file. A zip that wraps everything in one folder is read from inside it."""
    if path.is_dir():
        return FolderTree(path)
    tree = ZipTree(path)
    tops = {name.split("/", 1)[0] for name in tree.names}
    wrapped = len(tops) == 1 and tree.names and all(name.count("/") >= 2 or not is_image_name(name) for name in tree.names)
    return SubTree(tree, tops.pop()) if wrapped else tree


def is_image_name(name: str) -> bool:
    """Whether the suffix is one of an image format that can be read."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_image(tree: Tree, name: str) -> bool:
    """Whether a file is an image by its suffix, or a DICOM file without one, as scanners export them."""
    if is_image_name(name):
        return True
    suffix = name.rsplit("/", 1)[-1].partition(".")[2]
    return not suffix.strip("0123456789.") and tree.read_bytes(name)[128:132] == b"DICM"


def _archive(path: Path) -> zipfile.ZipFile:
    """An open handle, kept; a file that has changed since is opened anew."""
    state = path.stat()
    return _open_archive(str(path), os.getpid(), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _open_archive(path: str, process: int, modified: int, size: int) -> zipfile.ZipFile:
    # One handle a process: a forked worker must not share its parent's file position.
    return zipfile.ZipFile(path)


def _checked_names(path: Path) -> tuple[str, ...]:
    try:
        state = path.stat()
        return _names_of(str(path), os.getpid(), state.st_mtime_ns, state.st_size)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise DataError(
            str(path), f"not a zip file that can be read ({error})", "a complete zip archive", "copy or make it again"
        ) from error


@functools.lru_cache(maxsize=8)
def _names_of(path: str, process: int, modified: int, size: int) -> tuple[str, ...]:
    members = [info for info in _open_archive(path, process, modified, size).infolist() if not info.is_dir()]
    faults = list(_member_faults(members))
    if faults:
        raise DataError(
            path, f"{len(faults)} members that are not safe", "plain members inside the archive", "make the archive again", faults=faults
        )
    if len(members) > MOST_MEMBERS or sum(info.file_size for info in members) > LARGEST_ARCHIVE:
        raise _too_large(path, "the archive")
    return tuple(sorted(info.filename for info in members if not _hidden_anywhere(info.filename)))


def _member_faults(members: Iterable[zipfile.ZipInfo]) -> Iterable[str]:
    seen: set[str] = set()
    for info in members:
        name = info.filename
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or parts[0].endswith(":"):
            yield f"{name!r}: leaves the archive"
        elif info.flag_bits & 0x1:
            yield f"{name!r}: is encrypted"
        elif info.file_size > LARGEST_MEMBER:
            yield f"{name!r}: unpacks to {info.file_size:,} bytes (at most {LARGEST_MEMBER:,})"
        elif name in seen:
            yield f"{name!r}: is there twice"
        seen.add(name)


def _too_large(where: str, what: str) -> InputError:
    return DataError(
        where,
        f"{what} expands to more than the limit",
        f"members of at most {LARGEST_MEMBER >> 20} MiB, {LARGEST_ARCHIVE >> 30} GiB together",
        "decompress it yourself, if you trust it, and name the folder",
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in {"Thumbs.db", "desktop.ini"}


def _hidden_anywhere(name: str) -> bool:
    return any(_hidden(part) or part == "__MACOSX" for part in name.split("/"))
