"""Files that are whole or absent: atomic writing, hashing, and JSON that never holds NaN."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.errors import DataError, InputError, MedloreError, StepError

WRITTEN = ".written.json"  # in a folder that was made here: what it was made of
_RECORDS = {".json", ".safetensors"}
_PART = ".part-"
_PART_NAME = re.compile(r"\.part-([0-9a-f]{12}|[a-z0-9_]{8})(\.|$)")
_LONGEST_SUFFIX = 100
_DEPTH = 3  # levels below a folder of outputs in which something is written


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Suffixes are kept (`.nii.gz`, `.safetensors`), since writers choose their format by them. What a killed process left half-written
    is taken over: the temporary name follows from the file's own.

    Raises:
        InputError: `path` is a folder, a device or a pipe: a device would be replaced by the file.
        StepError: the folder cannot be written, or the disk is full.
    """
    final = Path(path)
    if final.exists() and not final.is_file():
        kind = "a folder" if final.is_dir() else "a device or a pipe"
        raise InputError(str(final), f"is {kind}", "a file to be made, or one to be replaced", "name another file")
    _make_folder(final.parent)
    try:
        temporary, handle = _claim_file(final)
    except OSError as error:
        raise _write_failed(final, error) from error
    placed = False
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(final)
        placed = True
    except OSError as error:
        raise _write_failed(final, error) from error
    finally:
        if not placed:  # else the name may be somebody else's by now
            temporary.unlink(missing_ok=True)
        _let_go(handle)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, kept: list[str] | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it when the block ends well, and vanishes when it does not.

    Only an empty folder or a forerunner is replaced: a folder that shares no record (`.json`, `.safetensors`) with the new one is
    somebody's, and stays. Names of data alone say nothing: an `image.nii.gz` lies in many a patient's folder.

    Nothing that somebody else made is lost with a forerunner. The hidden file `.written.json` lists what a folder was made of:
    what is listed and unchanged goes; whatever else lies there comes along, under `kept/` where the new folder has that name too.

    Args:
        path: the folder.
        kept: gets the names of what came along.

    Raises:
        InputError: `path` is a file, a folder with other things in it, or is being written by another process.
        StepError: the parent folder cannot be written, or the disk is full.
    """
    final = Path(path)
    final = final.resolve() if final.is_symlink() else final
    if final.exists() and not final.is_dir():
        raise InputError(str(final), "is a file", "a folder to be made", "name another folder")
    _make_folder(final.parent)
    retired = final.with_name(f".old-{final.name}")
    try:
        temporary, handle = _claim_folder(final)
    except OSError as error:
        raise _write_failed(final, error) from error
    placed = False
    try:
        _put_back(retired, final)
        yield temporary
        refuse_strangers(final, {item.name for item in temporary.iterdir()})
        made = _contents(temporary)
        came_along = _take_over(final, temporary) if final.exists() else []
        write_json(temporary / WRITTEN, {"schema": "medlore/written/1", "files": made})
        temporary.chmod(0o777 & ~_umask())
        if final.exists():
            final.replace(retired)
        temporary.replace(final)
        placed = True
        if kept is not None:
            kept += came_along
    except OSError as error:
        raise _write_failed(final, error) from error
    finally:
        if not placed:
            shutil.rmtree(temporary, ignore_errors=True)
        _put_back(retired, final)
        _let_go(handle)


def clear_remains(folder: str | Path) -> None:
    """Finish what killed processes began in a folder: half-made files and folders go, a folder without its successor comes back.

    The folder and three levels below it are looked at. What a process that lives is writing stays.
    """
    root = Path(folder)
    for place, folders, files in os.walk(root):
        here = Path(place)
        for name in [name for name in (*folders, *files) if _is_part(name, strictly=here != root)]:
            _clear_part(here / name)
        for name in [name for name in folders if name.startswith(".old-")]:
            if any(item.suffix in _RECORDS for item in (here / name).iterdir()):  # a folder of somebody else's may have such a name
                _put_back(here / name, here / name.removeprefix(".old-"))
        deep = len(here.relative_to(root).parts) >= _DEPTH
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".")]


def _is_part(name: str, *, strictly: bool) -> bool:
    return bool(_PART_NAME.match(name)) if strictly else name.startswith(_PART)


def _clear_part(left: Path) -> None:
    with contextlib.suppress(OSError):
        folder = left.is_dir() and not left.is_symlink()
        handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its process lives
            shutil.rmtree(left, ignore_errors=True) if folder else left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _part_of(final: Path) -> Path:
    """The temporary name of a file or folder: always the same one, so that who writes it next takes over what was left."""
    mark = hashlib.sha256(os.fsencode(final.name)).hexdigest()[:12]
    suffix = "".join(final.suffixes[-2:])
    return final.with_name(f"{_PART}{mark}{suffix if len(os.fsencode(suffix)) < _LONGEST_SUFFIX else final.suffix[:_LONGEST_SUFFIX]}")


def _claim_file(final: Path) -> tuple[Path, int]:
    part = _part_of(final)
    handle = _claimed(part, lambda: os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))
    if handle is not None:
        os.ftruncate(handle, 0)
        return part, handle
    other, name = tempfile.mkstemp(prefix=_PART, suffix="".join(part.suffixes[-2:]), dir=final.parent)  # both write; each file is whole
    with contextlib.suppress(OSError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return Path(name), other


def _claim_folder(final: Path) -> tuple[Path, int]:
    part = _part_of(final)

    def opened() -> int:
        part.mkdir(mode=0o700, exist_ok=True)
        return os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    handle = _claimed(part, opened)
    if handle is None:
        raise InputError(str(final), "another process is writing it", "a folder of its own", "wait, or name another")
    for left in part.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    return part, handle


def _claimed(part: Path, opened: Callable[[], int]) -> int | None:
    """A handle that nobody else locks while this process lives; None where another one holds it."""
    while True:
        handle = opened()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), part.lstat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:  # its process has just finished, and renamed it
            pass
        os.close(handle)


def _let_go(handle: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # also where a child process holds a copy
    os.close(handle)


def _put_back(retired: Path, final: Path) -> None:
    """A folder on its way out comes back if its successor never came, and goes if it did."""
    if retired.is_dir() and final.exists():
        shutil.rmtree(retired, ignore_errors=True)
    elif retired.is_dir():
        retired.replace(final)


def _contents(folder: Path) -> dict[str, str]:
    """Name -> size and checksum of every file, also in subfolders; enough to see that a file was changed."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        checksum = 0
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
        found[file.relative_to(folder).as_posix()] = f"{file.stat().st_size}-{checksum:08x}"
    return found


def _take_over(final: Path, made: Path) -> list[str]:
    """Bring along what the forerunner did not write, or somebody changed since; their names in the new folder.

    A folder without a list (of an earlier version, or by another hand) loses what is written again and nothing else.
    """
    try:
        listed = read_json(final / WRITTEN)["files"]
    except (MedloreError, KeyError, TypeError):
        listed = None
    there = _contents(final)
    there.pop(WRITTEN, None)
    aside = next(name for n in itertools.count(1) if not (final / (name := "kept" if n == 1 else f"kept_{n}")).exists())
    brought = []
    for name, content in there.items():
        again = (made / name).exists()
        if (listed is None and again) or (listed is not None and listed.get(name) == content):
            continue
        place = f"{aside}/{name}" if again else name
        (made / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(final / name, made / place)
        brought.append(place)
    return brought


def refuse_strangers(final: Path, names: set[str]) -> None:
    """Refuse to replace a folder that shares no record with what is to be written.

    Args:
        final: the folder, if it is there.
        names: what will be in the new one.

    Raises:
        InputError: it is somebody's, or a file.
    """
    if final.exists() and not final.is_dir():
        raise InputError(str(final), "is a file", "a folder to be made", "name another folder")
    there = {item.name for item in final.iterdir()} - {WRITTEN} if final.is_dir() else set()
    records = {name for name in names if name.endswith(tuple(_RECORDS))}
    if there and there.isdisjoint(records or names):
        came = f"holds other things ({', '.join(sorted(there)[:3])}{', ...' if len(there) > 3 else ''}), which would be lost"
        raise InputError(str(final), came, "a new or empty folder, or an earlier result of the same kind", "name another folder")


def write_text(path: str | Path, text: str) -> Path:
    r"""Write a whole text file or nothing. Bytes of a file name that were no UTF-8 become `\udcfc` and the like."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON: numbers that are not finite become null, paths become text."""
    return write_text(path, json_text(value) + "\n")


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON of plain Python, NumPy and pathlib values; in one line with `indent` None.

    Examples:
        >>> print(json_text({"auc": float("nan")}))
        {
          "auc": null
        }
    """
    text = json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()  # a name that is no UTF-8 as JSON's own escape, so that it comes back


def read_json(path: str | Path) -> Any:
    """Read one JSON file.

    Raises:
        InputError: there is no such file.
        DataError: the text is not JSON; the message names the line.
    """
    path = existing_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits, or nested without end
        raise DataError(str(path), f"not JSON ({error})", "one JSON value in UTF-8", "correct or write the file again") from error


def made_folder(path: str | Path) -> Path:
    """`path` as a folder that is there and can be written, so that a long run does not fail at its end.

    Raises:
        InputError: a file stands in its place.
        StepError: it cannot be made or written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(str(path), "is a file", "a folder for the outputs", "name another folder")
    _make_folder(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _write_failed(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return path


def existing_file(path: str | Path, *, where: str = "") -> Path:
    """`path`, if it is a readable file.

    Raises:
        InputError: it does not exist, or is a folder, a device or a pipe.
    """
    path = Path(path)
    place = f"{where} {path}".strip()
    if path.is_dir():
        raise InputError(place, "is a folder", "a file", "name a file in it")
    refuse_device(path, where=where)
    if not path.is_file():
        raise InputError(place, "no such file", "the path of an existing file", "check the spelling and the current folder")
    return path


def existing_path(path: str | Path, accepted: str = "an existing file or folder", *, where: str = "") -> Path:
    """`path`, if it is a file or a folder.

    Args:
        path: the file or folder.
        accepted: which ones, in words.
        where: the option that named it.

    Raises:
        InputError: nothing is there, or a device or a pipe.
    """
    path = Path(path)
    if "\0" in str(path) or not path.exists():
        place = f"{where} {path}".strip()
        raise InputError(place, "no such file or folder", accepted, "check the spelling and the current folder")
    refuse_device(path, where=where)
    return path


def refuse_device(path: Path, *, where: str = "") -> None:
    """Refuse what would be waited for, or read, without end.

    Raises:
        InputError: a device, a pipe or a socket stands at `path`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{where} {path}".strip(), "is a device or a pipe", "a file or a folder", "save the content to a file")


def sha256_of(path: str | Path, *, leave_out: Callable[[Path], bool] = lambda _: False) -> str:
    """Hex SHA-256 of a file, or of the names and contents of all files of a folder but those to `leave_out`."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for item in sorted(p for p in path.rglob("*") if p.is_file() and not leave_out(p)):
            digest.update(os.fsencode(item.relative_to(path).as_posix()) + b"\0" + sha256_of(item).encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return _plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(v) for v in value]
    return str(value)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_failed(folder, error) from error


def _write_failed(path: Path, error: OSError) -> StepError:
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    return StepError(
        str(path),
        f"could not be written ({reason})",
        "a folder that can be written, on a disk with room",
        "free space or name another folder",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
