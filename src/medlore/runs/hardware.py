"""Device, precision and memory of a run: decided once, here, and handed on; the same on CUDA, MPS and CPU.

Nothing else asks torch for devices or the machine for its memory, so a plan is made for what then runs. torch is imported only
where an accelerator may be there, so that a dry run on an ordinary machine stays quick.
"""

from __future__ import annotations

import os
import platform
import random
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medlore.errors import InputError

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
FixedPrecision = Literal["fp32", "bf16", "fp16"]
Work = Literal["training", "inference", "published"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AVAILABLE_SHARE = 0.8
# Where a driver of NVIDIA (also below Windows) or AMD leaves its mark; torch is asked only if one is there.
_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Hardware:
    """What a run computes on and how much it may take; made by `decide_hardware`, never changed on the way.

    Args:
        device: `cpu`, `cuda` or `mps`.
        precision: of the network.
        memory_bytes: what one worker may use of the host's memory.
        device_memory_bytes: what it may use of a GPU's own; None where the host's memory is all there is (CPU and MPS).
    """

    device: Device
    precision: FixedPrecision
    memory_bytes: int
    device_memory_bytes: int | None = None

    @property
    def half(self) -> bool:
        """Whether the network computes with two bytes a number."""
        return self.precision != "fp32"

    def shared_by(self, workers: int, *, device_too: bool = True) -> Hardware:
        """The share of one of some workers.

        Args:
            workers: how many run side by side.
            device_too: whether they share one GPU; False where each has its own.
        """
        own = self.device_memory_bytes
        return replace(
            self, memory_bytes=self.memory_bytes // workers, device_memory_bytes=own // workers if own is not None and device_too else own
        )

    def record(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def decide_hardware(device: DeviceChoice = "auto", precision: Precision = "auto", *, work: Work, memory: str | None = None) -> Hardware:
    """The one decision about device, precision and memory of a run.

    Args:
        device: `auto` takes the first of CUDA, MPS and CPU that is there.
        precision: `auto` is chosen by the work, see `automatic_precision`.
        work: `training`, `inference`, or `published` for the published rules of inference.
        memory: what may be used of the host's, such as `6GiB`; four fifths of what is free unless given.

    Raises:
        InputError: the device is not on this machine; a precision that it does not train in; no size.

    Example:
        >>> decide_hardware("cpu", "fp32", work="inference", memory="6GiB")
        Hardware(device='cpu', precision='fp32', memory_bytes=6442450944, device_memory_bytes=None)
    """
    chosen = choose_device(device)
    fixed = automatic_precision(chosen, work) if precision == "auto" else precision
    if work == "training" and fixed == "fp16" and chosen == "cpu":
        fix = "use --precision bf16 or fp32, or a GPU"
        raise InputError("--precision", "'fp16' on the processor, where gradients would vanish", "fp32 or bf16 on cpu", fix)
    host = available_memory() if memory is None else read_bytes(memory)
    return Hardware(chosen, fixed, host, _device_memory(chosen))


def choose_device(choice: DeviceChoice = "auto") -> Device:
    """`cuda`, `mps` or `cpu`; `auto` takes the first that is there.

    Raises:
        InputError: the device that was asked for is not on this machine.
    """
    if choice == "cpu":
        return "cpu"
    there = _devices()
    if choice == "auto":
        return there[0]
    if choice not in there:
        raise InputError("--device", f"{choice!r}, which is not on this machine", ", ".join(there), "use --device auto")
    return choice


def automatic_precision(device: Device, work: Work) -> FixedPrecision:
    """What `auto` means.

    Training: half precision on CUDA alone, where it is fast and gradients are scaled. Inference: wherever the hardware multiplies
    bfloat16, and float16 on a GPU that does not. The published rules: float16 on CUDA, as published, and else float32.
    """
    if device == "cuda":
        import torch

        return "fp16" if work == "published" or not torch.cuda.is_bf16_supported() else "bf16"
    return "bf16" if work == "inference" and device == "cpu" and cpu_has_bfloat16() else "fp32"


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX; Arm: bf16)."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    words = set(flags.read_text(errors="replace").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the legacy generator
    torch.manual_seed(seed)


def read_bytes(text: str, *, where: str = "--memory") -> int:
    """Bytes of a size such as `6GiB`, `500MB` or `2e9`.

    Raises:
        InputError: not a size.

    Example:
        >>> read_bytes("6GiB") == 6 * 2**30
        True
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?\s*", text, flags=re.IGNORECASE)
    value = float(found[1]) * _UNITS[(found[2] or "").lower()] if found and found[1].count(".") < 2 else 0
    if value < 1:
        raise InputError(where, f"got {text!r}", "a size such as 6GiB or 500MB", "write a number and a unit")
    return int(value)


def available_memory() -> int:
    """Bytes that may be used by default: four fifths of what is free, or of what the container may still take."""
    free = _meminfo() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            left = int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text())
        except (OSError, ValueError):  # no such group, or the word "max"
            continue
        free = min(free, max(left, 0)) if left < free else free
    return int(free * _AVAILABLE_SHARE)


def _devices() -> tuple[Device, ...]:
    """What this machine has, the fastest first."""
    if not ("torch" in sys.modules or platform.system() in ("Darwin", "Windows") or any(Path(d).exists() for d in _DRIVERS)):
        return ("cpu",)
    import torch

    found: tuple[tuple[Device, bool], ...] = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    return (*(name for name, there in found if there), "cpu")


def _device_memory(device: Device) -> int | None:
    if device != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info()[0] * _AVAILABLE_SHARE)


def _meminfo() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
