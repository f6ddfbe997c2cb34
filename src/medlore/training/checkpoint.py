"""Where a training goes on from: one file that is whole or absent, belongs to one training, and runs no code when it is read."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medlore.errors import CheckpointError
from medlore.files import atomic_path
from medlore.weightfiles import load_torch_file

_DELETE = "delete the file to begin this training again"


@dataclass
class Checkpoint:
    """The file of one training.

    Attributes:
        path: of the file.
        fingerprint: hash of all that decides the weights; a file with another one is refused.
        minutes: at least so many between two that are written; None writes after every judgement.
        restart: what a user does to begin anew.
    """

    path: Path
    fingerprint: str = ""
    minutes: float | None = None
    restart: str = _DELETE
    _written: float = field(default_factory=time.monotonic, repr=False)

    def is_due(self) -> bool:
        """Whether it is time by the clock."""
        return self.minutes is not None and time.monotonic() - self._written >= 60 * self.minutes

    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path.is_file()

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the file.

        Raises:
            StepError: the disk is full, or the folder cannot be written.
        """
        packed = io.BytesIO()  # a full disk then shows as the system's own error, not as one of torch's writer
        torch.save({"fingerprint": self.fingerprint, **content}, packed)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(packed.getbuffer())
        self._written = time.monotonic()

    def read(self) -> dict[str, Any]:
        """The content, on the CPU.

        Raises:
            CheckpointError: damaged, another kind of file, or of another training.
        """
        saved = read_checkpoint(self.path, restart=self.restart)
        if saved["fingerprint"] != self.fingerprint:
            came = "a checkpoint of a run with other settings, data or weights"
            raise CheckpointError(str(self.path), came, "the settings that the run was started with", f"repeat them, or {self.restart}")
        return saved

    def misfit(self) -> CheckpointError:
        """The error of a file whose tensors do not fit the network."""
        return CheckpointError(str(self.path), "of another network", "a checkpoint of this training", self.restart)


def read_checkpoint(path: Path, *, restart: str = _DELETE) -> dict[str, Any]:
    """Tensors and plain values of a checkpoint; nothing in it is executed.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    content = read_saved(path, "a checkpoint of this training", restart)
    if not isinstance(content, dict) or "fingerprint" not in content:
        raise CheckpointError(str(path), "another kind of file", "a checkpoint of this training", restart)
    return content


def read_saved(path: Path, accepted: str, fix: str) -> Any:
    """What this program saved with torch, on the CPU.

    Raises:
        CheckpointError: the file is damaged; it says `accepted` and `fix`.
    """
    try:
        return load_torch_file(path, mapped=False)  # a training replaces its file
    except CheckpointError as error:
        raise CheckpointError(str(path), f"damaged: {error.came}", accepted, fix) from error
