"""Files that are whole or absent: atomic writing, hashing, and JSON that never holds NaN."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medlore.errors import DataError, InputError, StepError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Suffixes are kept (`.nii.gz`, `.safetensors`), since writers choose their format by them.

    Raises:
        InputError: `path` is a folder, a device or a pipe: a device would be replaced by the file.
        StepError: the folder cannot be written, or the disk is full.
    """
    final = Path(path)
    if final.exists() and not final.is_file():
        kind = "a folder" if final.is_dir() else "a device or a pipe"
        raise InputError(str(final), f"is {kind}", "a file to be made, or one to be replaced", "name another file")
    _make_folder(final.parent)
    suffix = "".join(final.suffixes[-2:])
    try:
        handle, name = tempfile.mkstemp(prefix=".part-", suffix=suffix, dir=final.parent)
    except OSError as error:
        raise _write_failed(final, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(final)
    except OSError as error:
        raise _write_failed(final, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it when the block ends well, and vanishes when it does not.

    Only an empty folder or a forerunner is replaced: a folder that shares no record (`.json`, `.safetensors`) with the new one is
    somebody's, and stays. Names of data alone say nothing: an `image.nii.gz` lies in many a patient's folder.

    Raises:
        InputError: `path` is a file, or a folder with other things in it.
        StepError: the parent folder cannot be written, or the disk is full.
    """
    final = Path(path)
    if final.exists() and not final.is_dir():
        raise InputError(str(final), "is a file", "a folder to be made", "name another folder")
    _make_folder(final.parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".part-", dir=final.parent))
    except OSError as error:
        raise _write_failed(final, error) from error
    try:
        yield temporary
        _refuse_a_strangers_folder(final, temporary)
        temporary.chmod(0o777 & ~_umask())
        if final.exists():
            retired = temporary.with_name(temporary.name + "-old")
            final.replace(retired)
            temporary.replace(final)
            shutil.rmtree(retired)
        else:
            temporary.replace(final)
    except OSError as error:
        raise _write_failed(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_a_strangers_folder(final: Path, made: Path) -> None:
    there = {item.name for item in final.iterdir()} if final.is_dir() else set()
    names = {item.name for item in made.iterdir()}
    records = {name for name in names if name.endswith((".json", ".safetensors"))}
    if there and there.isdisjoint(records or names):
        came = f"holds other things ({', '.join(sorted(there)[:3])}{', ...' if len(there) > 3 else ''}), which would be lost"
        raise InputError(str(final), came, "a new or empty folder, or an earlier result of the same kind", "name another folder")


def write_text(path: str | Path, text: str) -> Path:
    """Write a whole text file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON: numbers that are not finite become null, paths become text."""
    return write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Strict, indented JSON of plain Python, NumPy and pathlib values.

    Example:
        >>> print(json_text({"auc": float("nan")}))
        {
          "auc": null
        }
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


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
        raise DataError(str(path), f"not JSON ({error})", "one JSON value in UTF-8", "mend or write the file anew") from error


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
        InputError: it does not exist, or is a folder.
    """
    path = Path(path)
    place = f"{where} {path}".strip()
    if path.is_dir():
        raise InputError(place, "is a folder", "a file", "name a file in it")
    if not path.is_file():
        raise InputError(place, "no such file", "the path of an existing file", "check the spelling and the current folder")
    return path


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file, or of the names and contents of all files of a folder."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for item in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(item.relative_to(path).as_posix().encode() + b"\0" + sha256_of(item).encode())
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
