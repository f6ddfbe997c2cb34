"""Tensors of a weights file, recognised by its suffix, read without executing anything and without copying it into memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from medlore.errors import CheckpointError
from medlore.files import existing_file
from medlore.weightfiles import TORCH_SUFFIXES, read_tensors

State = dict[str, Tensor]

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def read_state(path: str | Path) -> State:
    """Name -> tensor of a `.safetensors` file or of a torch file, unwrapped; float16 and bfloat16 become float32 when used.

    A torch file is mapped, not read: memory is taken when a tensor is touched. Optimiser states and step counts beside the
    weights are left alone.

    Raises:
        InputError: no such file.
        CheckpointError: truncated, not a weights file, or one that needs unsafe loading.
    """
    path = existing_file(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(str(path), f"a {path.suffix or 'nameless'} file", ", ".join(_SUFFIXES), "name the weights file")
    return read_tensors(path)
