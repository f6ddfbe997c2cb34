"""Writing factor pairs as an ordinary PEFT LoRA folder, whatever method they came from."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medlore.errors import TargetError
from medlore.files import atomic_folder


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, PEFT's notes that concern no user of ours are silent: old names it asks transformers for, memory hints of EVA."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message="lora with eva initialization", category=UserWarning)
        yield


@dataclass(frozen=True)
class Factors:
    """One factor pair: the weight changes by scaling · B A.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: factor on the product.
    """

    A: Tensor
    B: Tensor
    scaling: float


def write_lora_folder(folder: str | Path, factors: Mapping[str, Factors], *, head: Mapping[str, nn.Module], base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, whole or not at all.

    Args:
        folder: new folder; an existing one is replaced.
        factors: module name in the base model -> its factors; from one layer.
        head: module name -> trained module that is stored beside the factors (PEFT's `modules_to_save`).
        base: name or path of the base model.

    Raises:
        TargetError: no factors at all.
    """
    import peft
    from safetensors.torch import save_file

    if not factors:
        raise TargetError("adapter", "no layer has a rank left", "at least one adapted layer", "train longer or with a larger rank")
    ranks = {name: pair.A.shape[0] for name, pair in factors.items()}
    alphas = {name: pair.scaling * ranks[name] for name, pair in factors.items()}
    config = peft.LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(alphas.values())),
        target_modules=list(factors),
        rank_pattern={_exactly(name): rank for name, rank in ranks.items()},
        alpha_pattern={_exactly(name): alpha for name, alpha in alphas.items()},
        modules_to_save=list(head),
        base_model_name_or_path=base,
        inference_mode=True,
    )
    state: dict[str, Any] = {}
    for name, pair in factors.items():
        state[f"base_model.model.{name}.lora_A.weight"] = pair.A
        state[f"base_model.model.{name}.lora_B.weight"] = pair.B
    for name, module in head.items():
        state |= {f"base_model.model.{name}.{key}": value for key, value in module.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_file({k: v.detach().contiguous().cpu() for k, v in state.items()}, temporary / "adapter_model.safetensors")
        config.save_pretrained(str(temporary))


def _exactly(name: str) -> str:
    """A PEFT pattern that matches this one module: PEFT lets any prefix stand before a pattern, `^` forbids it."""
    return "^" + re.escape(name)
