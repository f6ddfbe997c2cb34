"""The `report.json` that each run leaves: what was asked, with what, on what, and what came out."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medlore.errors import InputError, StepError
from medlore.files import read_json, sha256_of, write_json
from medlore.runs.output_lock import OutputLock, is_first_process, refuse_held
from medlore.runs.settings import Settings
from medlore.runs.stopping import Stopped

REPORT_SCHEMA = "medlore/report/1"
_SCHEMA_START, _SCHEMA_WITHIN = b'"medlore/report/', 200  # it stands in the first line
_REPORTED_PACKAGES = ("medlore", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "nibabel", "scikit-learn")


class Run:
    """One run of a recipe; as a context manager it holds the lock of OUT, and writes `OUT/report.json` however the run ends.

    Args:
        verb: the command, e.g. `finetune`.
        out: folder of the outputs; created.
        settings: what the run was asked to do; written out in full.
        seed: seed of the run, if it draws at random.
        device: device on which it runs, if any.

    The report holds: schema, verb, command, state, versions, git, machine, settings, seed, device, inputs (path -> sha256),
    outputs (name -> path below OUT), results, seconds, peak_memory_bytes. The state is `running` from the start on, and then
    `done`, `failed`, `interrupted` (Ctrl-C) or `stopped` (SIGTERM, SIGHUP); a run that was killed stays `running`.

    Raises:
        InputError: on entering: another run is writing there, or OUT holds a finished run of another verb.
        StepError: the folder cannot be written.
    """

    def __init__(
        self, verb: str, out: str | Path, *, settings: Settings | Mapping[str, Any], seed: int | None = None, device: str | None = None
    ) -> None:
        self.out = Path(out)
        self.results: dict[str, Any] = {}
        self._inputs: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._head: dict[str, Any] = {
            "schema": REPORT_SCHEMA,
            "verb": verb,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "settings": settings.model_dump(mode="json") if isinstance(settings, Settings) else dict(settings),
            "seed": seed,
            "device": device,
        }
        self._start = time.perf_counter()
        self._machine: dict[str, Any] = {}
        self._lock: OutputLock | None = None

    def add_input(self, path: str | Path) -> None:
        """Record an input file or folder with its hash."""
        self._inputs[str(path)] = sha256_of(path)

    def add_output(self, name: str, path: str | Path) -> None:
        """Record an output below the run's folder."""
        self._outputs[name] = os.path.relpath(path, self.out)

    def write(self, state: str) -> Path:
        """Write `report.json` as it stands."""
        self._machine = self._machine or describe_machine()  # once a run: git is asked
        report = {
            **self._head,
            "state": state,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "results": self.results,
            "seconds": round(time.perf_counter() - self._start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            **self._machine,
        }
        return write_json(self.out / "report.json", report)

    def __enter__(self) -> Self:
        if is_first_process():
            self._lock = OutputLock(self.out)
            self._lock.__enter__()
        try:
            self._refuse_others()
            if is_first_process():
                self.write("running")
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None:
                self.results["error"] = f"{kind.__name__ if kind else ''}: {error}"
            if is_first_process():
                self.write(_state_after(error))
        finally:
            self._unlock()

    def _refuse_others(self) -> None:
        """Neither the report of another verb nor a file of somebody's that has its name is replaced."""
        path, found = self.out / "report.json", _finished(self.out)
        if found is not None and found.get("verb") != self._head["verb"]:
            came = f"holds a finished run of {found.get('verb')}, whose report would be replaced"
            raise InputError(f"--out {self.out}", came, "a new folder, or one of the same verb", "name another folder")
        if path.is_file() and path.stat().st_size and not _is_of_a_run(path):
            came = "holds a report.json that no run wrote, which would be replaced"
            raise InputError(f"--out {self.out}", came, "a folder for the outputs alone", "name another folder")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.__exit__()
            self._lock = None


def _is_of_a_run(path: Path) -> bool:
    with path.open("rb") as stream:
        return _SCHEMA_START in stream.read(_SCHEMA_WITHIN)


def _state_after(error: BaseException | None) -> str:
    if error is None:
        return "done"
    if isinstance(error, Stopped):
        return "stopped"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _finished(out: Path) -> dict[str, Any] | None:
    """The report of a finished run in a folder."""
    try:
        found = read_json(out / "report.json")
    except InputError:  # none, or cut off: nothing finished
        return None
    return found if isinstance(found, dict) and found.get("state") == "done" else None


def refuse_finished(out: str | Path, *, overwrite: bool, settings: Settings | None = None) -> None:
    """Keep the results of a finished run from being replaced without a word.

    Args:
        out: folder of the outputs.
        overwrite: replace them.
        settings: of the new run, where the same ones may run again: they give the same results.

    Raises:
        InputError: OUT/report.json says that a run is finished, or another one is writing there.
    """
    if overwrite or not Path(out).is_dir():
        return
    refuse_held(Path(out))
    found = _finished(Path(out))
    same = settings is not None and found is not None and found.get("settings") == settings.model_dump(mode="json")
    if found is not None and not same:
        came = f"{out} holds a finished run of {found.get('verb')}, which would be replaced"
        raise InputError("--out", came, "a new folder", "name another folder, or give --overwrite")


@contextlib.contextmanager
def next_run(name: str, folder: str | Path = "runs") -> Iterator[Path]:
    """A new folder `FOLDER/NAME-NUMBER`, the first number that is free; no two runs get the same one.

    It is taken away again if nothing was written into it.

    Raises:
        InputError: several processes train together: each would take a number of its own.
        StepError: it cannot be made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--out", "nothing", "a folder that all processes share", "give --out runs/NAME")
    for number in itertools.count(1):
        found = Path(folder) / f"{name}-{number}"
        try:
            found.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise StepError(str(found), error.strerror or str(error), "a folder that can be made", "give --out") from error
        break
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):
            found.rmdir()


def describe_machine() -> dict[str, Any]:
    """Versions, git state and machine, for reports."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _REPORTED_PACKAGES}},
        "git": _git_state(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux hands the peak of `getrusage` on from a parent to the program that it starts, so its own high-water mark is read.
    """
    try:
        marks = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in marks if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):  # another system
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the working copy that medlore itself was imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True)  # noqa: S607  # nosec B603 B607 # fixed words
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, timeout=30, check=True)  # noqa: S607  # nosec B603 B607 # fixed words
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}
