"""A folder of outputs that belongs to one run at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from medlore.errors import InputError, StepError
from medlore.files import clear_remains


class OutputLock:
    """One run at a time writes to a folder; what a killed run left half-written is removed first.

    Raises:
        InputError: another run holds the folder.
        StepError: the folder cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / ".lock"
        self._stream: Any = None

    def __enter__(self) -> None:
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            while not self._taken():
                pass
        except OSError as error:
            raise StepError(
                str(self._out), f"cannot be written ({error.strerror})", "a folder that can be written", "name another"
            ) from error
        clear_remains(self._out)

    def _taken(self) -> bool:
        """Lock the file; False where the run before removed it in the same moment, so that nobody else would see the lock."""
        self._stream = self._path.open("w")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise InputError(
                f"--out {self._out}", "another run is writing there", "a folder of its own", "wait, or name another"
            ) from error
        try:
            if os.path.samestat(os.fstat(self._stream.fileno()), self._path.stat()):
                return True
        except FileNotFoundError:
            pass
        self._stream.close()
        return False

    def __exit__(self, *_: object) -> None:
        clear_remains(self._out)  # of workers that were stopped
        self._path.unlink(missing_ok=True)  # while it is locked: who opens it after this finds another file
        self._stream.close()
