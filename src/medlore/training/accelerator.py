"""Device, precision and processes: one `accelerate.Accelerator` for the run, alone or under `accelerate launch`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from medlore.extras import require
from medlore.runs.hardware import DeviceChoice, Precision, decide_hardware

_WORDS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def make_accelerator(
    device: DeviceChoice, precision: Precision, folder: Path | None = None, *, track: str = "none", absent_parameters: bool = False
) -> Any:
    """An accelerator.

    Args:
        device: see `runs.hardware.decide_hardware`, which decides about it and the precision.
        precision: likewise.
        folder: where trackers write; None for no trackers.
        track: `none` or `tensorboard`.
        absent_parameters: whether some parameters take no part in some steps (experts that a batch does not ask): several processes
            need this flag, since they wait for every gradient.

    Raises:
        InputError: the device is not there, or it does not train in that precision.
        MissingExtraError: the tracker is not installed.
    """
    import accelerate
    from accelerate.state import AcceleratorState, PartialState

    hardware = decide_hardware(device, precision, work="training")
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run in this process may have had another device or precision
    if track == "tensorboard":
        require("tensorboard", "--track tensorboard")
    return accelerate.Accelerator(
        cpu=hardware.device == "cpu",
        mixed_precision=_WORDS[hardware.precision],
        log_with=track if track != "none" and folder is not None else None,
        project_dir=str(folder) if folder is not None else None,
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=absent_parameters)],
    )


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the only one, or the first of a distributed run."""
    from accelerate.state import PartialState

    return not PartialState._shared_state or bool(PartialState().is_main_process)


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager[Any]:
    """The precision of a forward pass outside a training: bf16 where it is asked for."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext()
