"""Device, processes and TensorBoard of a training, through accelerate."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration


def make_accelerator(device: str, logs: Path | None = None) -> Accelerator:
    """An accelerator on a device, with a TensorBoard tracker in `logs` where the package is there.

    Experts that are absent from a batch have no gradient in that step, which DistributedDataParallel has to be told.
    """
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if logs is None or not _has_tensorboard():
        return Accelerator(cpu=device == "cpu", kwargs_handlers=handlers)
    logs.mkdir(parents=True, exist_ok=True)
    project = ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=handlers, log_with="tensorboard", project_config=project)
    accelerator.init_trackers("segmentation")
    return accelerator


def _has_tensorboard() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None
