"""Tensors of a weights file, read without executing anything and without copying it into memory."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlore.errors import CheckpointError
from medlore.files import existing_file

State = dict[str, Tensor]

_WRAPPERS = ("model_state_dict", "state_dict", "model")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


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
    return _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> State:
    loaded = _load_mapped(path)
    for word in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(word), Mapping):
            loaded = loaded[word]
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise CheckpointError(
            str(path), "no tensors inside", "a state dict, bare or under `model_state_dict`", "name the file that holds the weights"
        )
    return tensors


def _load_mapped(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the form before torch 1.6 cannot be mapped
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0].split(". ")[0][:160] if str(error).strip() else type(error).__name__
    return CheckpointError(
        str(path),
        f"cannot be read as weights ({reason})",
        "a whole .safetensors file, or a torch file that holds tensors and plain values only (weights_only=True)",
        "fetch the file again; a file with other objects inside must be re-saved where it was made",
    )
