"""Command lines for `same_results`: each is what `python -m medlore ...` does, in a process of its own and in one thread.

Importing torch and transformers takes longer than most of the small runs, so the processes are forked from one that has imported
them already (never medlore itself); `plain` starts a new interpreter in place of it.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HEAVY = (
    "torch", "transformers", "peft", "accelerate", "scipy.linalg", "scipy.ndimage", "matplotlib.pyplot", "nibabel", "kornia",
    "safetensors.torch", "sklearn.datasets", "pandas", "nilearn.datasets", "typer", "rich.console", "rich.progress", "pydantic",
)  # fmt: skip
CLIMATE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",
    "NO_COLOR": "1",
    "MEDLORE_TRACEBACK": "1",
}
LONGEST_SECONDS = 900.0
_BEFORE_KILL = 0.01
_CHECKPOINTS = ("checkpoint*", "*.pt", "*.ckpt")


@dataclass(frozen=True)
class Ended:
    """How a command line ended: exit status (negative for a signal), its two streams, processor seconds."""

    status: int
    out: str
    err: str
    seconds: float = 0.0


@dataclass
class Caller:
    """Runs command lines of whatever medlore is importable."""

    plain: bool = False
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        os.environ.update(CLIMATE)
        if not self.plain:
            for name in HEAVY:
                importlib.import_module(name)
            gc.freeze()

    def where(self) -> str:
        """The folder of the medlore that will run."""
        code = "import pathlib, medlore; print(pathlib.Path(medlore.__file__).resolve().parent)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()

    def call(self, module: str, arguments: Sequence[str], *, folder: Path, streams: Path, kill: bool = False) -> Ended:
        """Run `python -m MODULE ARGUMENTS` in a folder.

        Args:
            module: `medlore`, or another program as a module or a file that ends in `.py`.
            arguments: what follows.
            folder: working folder.
            streams: stem of the files that take stdout and stderr.
            kill: kill it (SIGKILL) as soon as a checkpoint lies below the folder.

        Raises:
            RuntimeError: it was to be killed and ended before, or ran for too long.
        """
        out, err = streams.with_suffix(".out"), streams.with_suffix(".err")
        process = self._started(module, list(arguments), folder, out, err)
        status, seconds = _waited(process, folder, kill=kill)
        self.seconds += seconds
        return Ended(status, out.read_text(encoding="utf-8", errors="replace"), err.read_text(encoding="utf-8", errors="replace"), seconds)

    def _started(self, module: str, arguments: list[str], folder: Path, out: Path, err: Path) -> int:
        if self.plain:
            how = [module] if module.endswith(".py") else ["-m", module]
            with out.open("w") as to_out, err.open("w") as to_err:
                return subprocess.Popen([sys.executable, *how, *arguments], cwd=folder, stdout=to_out, stderr=to_err).pid
        if "medlore" in sys.modules:
            raise RuntimeError("medlore was imported before the fork: its modules would be those of this process")
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            _become(module, arguments, folder, out, err)
        return process


def _become(module: str, arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    """In the forked child: be that program, and end with its status."""
    os.chdir(folder)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [module, *arguments]
    status = 0
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # what a fresh interpreter would print before it ends
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _waited(process: int, folder: Path, *, kill: bool) -> tuple[int, float]:
    began, killed, before = time.monotonic(), False, _checkpoints(folder)
    while True:
        found, code, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        late = time.monotonic() - began > LONGEST_SECONDS
        if late or (kill and not killed and _checkpoints(folder) - before):
            os.kill(process, signal.SIGKILL)
            killed = True
        time.sleep(_BEFORE_KILL if kill else 0.05)
    if time.monotonic() - began > LONGEST_SECONDS:
        raise RuntimeError(f"ran for more than {LONGEST_SECONDS:.0f} s")
    if kill and not killed:
        raise RuntimeError("ended before it could be killed at its first checkpoint")
    return os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime


def _checkpoints(folder: Path) -> set[Path]:
    """Finished checkpoints below a folder; temporary files have a hidden part in their path."""
    try:
        found = [path for pattern in _CHECKPOINTS for path in folder.rglob(pattern)]
    except FileNotFoundError:  # a temporary folder went away meanwhile
        return set()
    return {path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)}
