"""What the files of a transformers folder can hold, asked before a network of its configuration is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medlore.errors import CheckpointError, InputError
from medlore.ranks.model_folders import read_config, refuse_own_code
from medlore.ranks.sources import open_source

_MOST_TIMES_THE_FILES, _SMALL_NETWORK = 4, 1_000_000


def values_beside(folder: Path, name: str) -> int | None:
    """Number of values in the weights of a folder, its configuration checked against them; None for weights of another form."""
    refuse_own_code(read_config(folder) or {}, name)
    try:
        return open_source(folder).parameters
    except CheckpointError:
        raise
    except InputError:  # of a form that only transformers reads, or absent: it says so
        return None


def refuse_more_than_the_files_hold(network: Any, config: Any, values: int | None, name: str) -> None:
    """A configuration that asks for far more than the files hold is wrong; known before any of it is made."""
    if values is None:
        return
    with torch.device("meta"):
        wanted = sum(p.numel() for n, p in network(config).named_parameters() if not n.startswith("classifier"))
    if wanted > _MOST_TIMES_THE_FILES * values + _SMALL_NETWORK:
        came = f"a configuration of {wanted:,} parameters beside weights of {values:,}"
        raise CheckpointError(name, came, "the configuration that belongs to the weights", "fetch the folder again")
