"""Device, precision and processes: one `accelerate.Accelerator` for the run, alone or under `accelerate launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from medlore.extras import require
from medlore.runs.settings import DeviceChoice, choose_device

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_WORDS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(device: DeviceChoice, precision: Precision, folder: Path | None, *, track: str = "none") -> Any:
    """An accelerator.

    Args:
        device: `auto` takes the first that is there.
        precision: `auto` is bfloat16 (else float16) on CUDA, float32 elsewhere.
        folder: where trackers write; None for no trackers.
        track: `none` or `tensorboard`.

    Raises:
        InputError: the device is not there.
        MissingExtraError: the tracker is not installed.
    """
    import accelerate
    from accelerate.state import AcceleratorState, PartialState

    chosen = choose_device(device)
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have had another device or precision
    if track == "tensorboard":
        _check_tensorboard()
    unused = accelerate.DistributedDataParallelKwargs(find_unused_parameters=False)
    return accelerate.Accelerator(
        cpu=chosen == "cpu",
        mixed_precision=_mixed_precision(precision, chosen),
        log_with=track if track != "none" and folder is not None else None,
        project_dir=str(folder) if folder is not None else None,
        kwargs_handlers=[unused],
    )


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the only one, or the first of a distributed run."""
    from accelerate.state import PartialState

    return not PartialState._shared_state or bool(PartialState().is_main_process)


def _mixed_precision(precision: Precision, device: str) -> str:
    if precision != "auto":
        return _WORDS[precision]
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "no"


def _check_tensorboard() -> None:
    require("tensorboard", "--track tensorboard")
