"""Weights files: one reader for `.safetensors` and for whatever `torch.save` wrote, one sentence for each that cannot be read.

No pickle is executed: torch files go through `torch.load(weights_only=True)`, mapped into memory where their format allows it.
"""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medlore.errors import CheckpointError
from medlore.files import existing_file

TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".th", ".ckpt")
WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher", "student")
AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "model_ema_state_dict", "ema_model")
ACCEPTED = "a whole .safetensors file, or a torch file that holds tensors and plain values only (read with weights_only=True)"
_LONGEST_HEADER = 32 << 20  # that of 200,000 tensors; parsing takes several times its length in memory
_PICKLE_START = b"\x80"
_HARMLESS: list[Any] = [  # plain data that training scripts put beside the weights
    argparse.Namespace,
    np.dtype,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    *(type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "bool")),
]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor of one weights file, unwrapped; names stay as they are stored.

    Files are mapped where their format allows it: memory is taken when a tensor is touched.

    Raises:
        InputError: no such file.
        CheckpointError: truncated, no weights file, without tensors, or one that would run code.
    """
    path = existing_file(path)
    if path.suffix.lower() != ".safetensors":
        return unwrapped(load_torch_file(path), path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_header(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise broken_file(path, f"not a whole safetensors file ({error})") from error


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than the file, or than any real one, before it is parsed.

    Raises:
        CheckpointError: such a header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
    length = int.from_bytes(first, "little") if len(first) == 8 else 0
    if length > size - 8:
        raise broken_file(path, f"not a whole safetensors file (a header of {length} bytes in a file of {size})")
    if length > _LONGEST_HEADER:
        raise broken_file(path, f"a header of {length} bytes", f"a header of at most {_LONGEST_HEADER} bytes; {ACCEPTED}")


def load_torch_file(path: Path, *, mapped: bool = True) -> Any:
    """The content of a `torch.save` file on the CPU: tensors, numbers, containers; nothing that runs code.

    Args:
        path: the file.
        mapped: leave tensors in the file until they are touched, where the format allows it.

    Raises:
        CheckpointError: the file is broken, or would run code when read.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # about pickle protocols: what does not fit raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # unpicklers raise whatever the bytes make them raise
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or _first_byte(path) == _PICKLE_START:
            what = f"a pickle that would run code ({named.group(1)})" if named else "a pickle that would run code or is broken"
            fix = "ask for a file with tensors only, or convert it to safetensors where you trust it"
            raise CheckpointError(str(path), what, ACCEPTED, fix) from error
        raise broken_file(path, f"not a whole torch file ({type(error).__name__})") from error


def unwrapped(content: Any, path: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict inside what a training script saved: bare, or up to two wrappers deep.

    Args:
        content: as loaded.
        path: for messages.
        averaged: take the exponential moving average that was saved beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    kept = [name for name in AVERAGES if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if averaged:
        if not kept:
            held = ", ".join(map(repr, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
            accepted = f"averaged weights under {', '.join(AVERAGES[:3])}"
            raise CheckpointError(str(path), f"no averaged weights: keys {held}", accepted, "leave out --ema")
        content = content[kept[0]]
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    if kept and not averaged:
        came, fix = f"averaged weights alone ({kept[0]!r})", "give --ema to take them"
        raise CheckpointError(str(path), came, f"a state dict, plain or under {', '.join(WRAPPERS[:3])}", fix)
    held = f"keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise CheckpointError(
        str(path), f"no state dict: {held}", f"a state dict, plain or under {', '.join(WRAPPERS[:3])}", "save model.state_dict()"
    )


def broken_file(path: str | Path, came: str, accepted: str = ACCEPTED) -> CheckpointError:
    """The error of a file that is cut off or of another kind."""
    return CheckpointError(str(path), came, accepted, "download or write the file again")


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(1)
