"""What a run writes belongs to it alone while it runs: a folder of outputs, or a file or folder that it names."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any, Self

from medlore.errors import InputError, StepError
from medlore.files import clear_remains, made_folder


class OutputLock:
    """One run at a time writes to a folder; what a killed run left half-written is removed first.

    Args:
        out: the folder, which is made.

    Raises:
        InputError: another run holds the folder.
        StepError: the folder cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._out = self._shown = out
        self._path = out / ".lock"
        self._clears = True
        self._made: list[Path] = []
        self._stream: Any = None

    @classmethod
    def beside(cls, path: str | Path) -> Self:
        """The lock of one file or folder that is written as a whole; it lies beside it, and other outputs there are free."""
        target = Path(path)
        lock = cls(target.parent)
        mark = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
        lock._path, lock._shown, lock._clears = target.with_name(f".lock-{mark}"), target, False
        return lock

    def __enter__(self) -> None:
        self._made = [folder for folder in (self._out, *self._out.parents) if not folder.exists()]
        try:
            made_folder(self._out)
            while not self._taken():
                pass
        except OSError as error:
            raise StepError(
                str(self._out), f"cannot be written ({error.strerror})", "a folder that can be written", "name another"
            ) from error
        if self._clears:
            clear_remains(self._out)

    def _taken(self) -> bool:
        """Lock the file; False where the run before removed it in the same moment, so that nobody else would see the lock."""
        self._stream = self._path.open("w")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise InputError(
                f"--out {self._shown}", "another run is writing there", "a folder of its own", "wait, or name another"
            ) from error
        try:
            if os.path.samestat(os.fstat(self._stream.fileno()), self._path.stat()):
                return True
        except FileNotFoundError:
            pass
        self._stream.close()
        return False

    def __exit__(self, *_: object) -> None:
        if self._clears:
            clear_remains(self._out)  # of workers that were stopped
        self._path.unlink(missing_ok=True)  # while it is locked: who opens it after this finds another file
        self._stream.close()
        with contextlib.suppress(OSError):
            for folder in self._made:  # nothing was written
                folder.rmdir()


def refuse_held(out: Path) -> None:
    """Refuse a folder that another run holds, before anything is read for long; what a killed run left there goes.

    Raises:
        InputError: another run is writing there.
    """
    if out.is_dir() and is_first_process():
        with OutputLock(out):
            pass


def is_first_process() -> bool:
    """Whether this is the process that writes: the only one, or of several that train together the first."""
    return int(os.environ.get("RANK") or "0") == 0
