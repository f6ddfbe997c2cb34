"""A process that has imported MedLoRE once and runs its command lines in forks of itself, killed where it is asked to be.

One JSON object a line comes in: `argv`, `watched` (a folder), and either `event` (die before this operation on files below it, from 1),
`seconds` (be killed after so long), `number` (send this signal in place of SIGKILL), or none of them. One goes out: `status` (exit status,
or minus the signal), `events`, `seconds`, and `said`, what it wrote to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_LOADED = (
    "torch", "transformers", "peft", "accelerate", "nibabel", "scipy.ndimage", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "medlore.segmenting.cohort", "medlore.segmenting.model", "medlore.segmenting.outputs", "medlore.segmenting.evaluate",
    "medlore.segmenting.export", "medlore.tuning.finetune", "medlore.tuning.predict", "medlore.tuning.evaluate", "medlore.studies.run",
    "medlore.decomposing.segmenters.study", "medlore.decomposing.segmenters.few_shot", "medlore.decomposing.classifiers.study",
    "medlore.decomposing.classifiers.export", "medlore.inspecting.ranks", "medlore.pages.view", "medlore.pages.study_pictures",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def main() -> None:
    for name in (*_LOADED, *(f"medlore.commands.{verb}" for verb in _verbs())):
        importlib.import_module(name)
    _answer({"ready": True})
    for line in sys.stdin:
        _answer(_run(json.loads(line)))


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _verbs() -> tuple[str, ...]:
    from medlore.cli import VERBS

    return VERBS


def _run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _work(request, Path(folder))
        status = _waited(child, request, begun)
        seconds = time.monotonic() - begun
        _wait_for_session(child)
        counted = Path(folder) / "events"
        return {
            "status": status,
            "events": int(counted.read_text()) if counted.exists() else None,
            "seconds": seconds,
            "said": (Path(folder) / "stderr").read_text(encoding="utf-8", errors="replace")[-2000:],
        }


def _work(request: dict[str, Any], folder: Path) -> None:
    """In the child: the command line, and no way back."""
    os.setsid()
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 70
    try:
        from medlore.cli import main as command

        counted = _count(request["watched"], request.get("event"))
        status = command(request["argv"])
        (folder / "events").write_text(str(counted[0]))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _count(watched: str, last: int | None) -> list[int]:
    """Count the operations that change files below a folder from here on, and die before one of them."""
    seen = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
            return
        if watched not in "".join(str(each) for each in args[:2]):
            return
        seen[0] += 1
        if seen[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def _waited(child: int, request: dict[str, Any], begun: float) -> int:
    left = request.get("seconds")
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if left is not None and time.monotonic() - begun >= left:
            os.kill(child, request.get("number", signal.SIGKILL))
            left = None
        time.sleep(0.002)


def _wait_for_session(session: int, *, most: float = 60.0) -> None:
    """Until the workers of a killed run have seen that it is gone."""
    end = time.monotonic() + most
    while _alive(session):
        if time.monotonic() > end:
            raise SystemExit("workers outlived their run")
        time.sleep(0.05)


def _alive(session: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z" and "resource_tracker" not in (stat.parent / "cmdline").read_text():
                return True
    return False


if __name__ == "__main__":
    main()
