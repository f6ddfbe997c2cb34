"""Is this machine ready? Each check is one small function that returns one finding."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from medlore.errors import InputError
from medlore.extras import EXTRAS, is_installed
from medlore.runs.hardware import cpu_has_bfloat16

_MINIMUM = {"torch": (2, 8), "transformers": (5, 0), "peft": (0, 17), "numpy": (2, 0)}
_FREE_DISK_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, whether it is well, what was seen, what to do."""

    name: str
    state: Literal["ok", "note", "bad"]
    seen: str
    fix: str = ""


def check_machine() -> list[Finding]:
    """All findings, in reading order; imports torch, not torchvision."""
    checks: list[Callable[[], list[Finding]]] = [_python, _packages, _torchvision, _devices, _bfloat16, _extras, _disk]
    return [finding for check in checks for finding in check()]


def _python() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    return [Finding("python", "ok" if good else "bad", platform.python_version(), "" if good else "use Python 3.11 or newer")]


def _packages() -> list[Finding]:
    findings = []
    for name, minimum in _MINIMUM.items():
        wanted = ".".join(map(str, minimum))
        try:
            seen = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "bad", "not installed", f"pip install '{name}>={wanted}'"))
            continue
        good = _numbers(seen) >= minimum
        findings.append(Finding(name, "ok" if good else "bad", seen, "" if good else f"pip install '{name}>={wanted}'"))
    return findings


def _torchvision() -> list[Finding]:
    """A torchvision built for another torch breaks peft and transformers; it is imported in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return [Finding("torchvision", "ok", "not installed (not needed)")]
    probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120, check=False)  # nosec B603 # fixed words
    if probe.returncode == 0:
        return [Finding("torchvision", "ok", metadata.version("torchvision"))]
    last = (probe.stderr.strip().splitlines() or ["it does not import"])[-1]
    return [Finding("torchvision", "bad", last, "pip uninstall torchvision: it does not fit this torch and breaks peft and transformers")]


def _devices() -> list[Finding]:
    import torch

    seen = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        seen += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        seen.append("mps")
    return [Finding("devices", "ok", ", ".join(seen))]


def _bfloat16() -> list[Finding]:
    import torch

    fast = cpu_has_bfloat16()
    seen = f"{torch.backends.cpu.get_cpu_capability()}: bf16 instructions {'found' if fast else 'not found'}"
    return [Finding("bf16 on CPU", "ok" if fast else "note", seen, "" if fast else "segment runs in fp32 on this processor")]


def _extras() -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        missing = [p for p in packages if not is_installed(p)]
        if missing:
            findings.append(Finding(f"extra {extra}", "note", "missing " + ", ".join(missing), f"pip install 'medlore[{extra}]'"))
        else:
            findings.append(Finding(f"extra {extra}", "ok", "installed"))
    return findings


def _disk() -> list[Finding]:
    try:
        free = shutil.disk_usage(Path.cwd()).free / 2**30
    except OSError as error:
        raise InputError("current folder", str(error), "a folder that exists", "change to one") from error
    low = free < _FREE_DISK_GIB
    return [Finding("disk", "note" if low else "ok", f"{free:.1f} GiB free here", "free some space" if low else "")]


def _numbers(version: str) -> tuple[int, ...]:
    digits = (part for part in version.split("+", maxsplit=1)[0].split("."))
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in digits)
