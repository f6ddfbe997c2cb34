"""Whatever the moment in which a run is killed: the same command afterwards leaves what an unbroken run leaves, and nothing else.

Kills come before a random operation on the files of a run, its last ones included, or at a random moment. Three kills come one after the
other before the command may end, so that what one kill leaves is met by the next. `-m full` has 40 kills a verb (MEDLORE_KILLS for
another number); the fixed part has three of the verbs that start fast.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kill_verbs import VERBS, write_inputs
from medlore.errors import InputError
from medlore.runs.output_lock import OutputLock

_IN_A_ROW = 3
_EVENTS = "events.out.tfevents"  # TensorBoard's own logs: one file a process by its time, also of one that was killed
_VOLATILE = {
    "seconds", "peak_memory_bytes", "command", "phases", "process", "training_seconds", "tuning_seconds", "machine", "git", "files",
    "read", "write", "hardware", "memory_bytes", "waited",
}  # fmt: skip


class Server:
    """The other process (`kill_server.py`)."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEDLORE_TRACEBACK": "1", "PYTHONWARNINGS": "ignore"}
        words = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
        self._log = (folder / "server.log").open("w")
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=folder
        )
        self._answer()

    def run(self, words: list[str], watched: Path, **how: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": words, "watched": str(watched), **how}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, Path(self._log.name).read_text()[-3000:]
        return dict(json.loads(line))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(60)
        self._log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_inputs(folder)
    return folder


def words_of(name: str, place: Path, out: Path, server: Server) -> list[str]:
    """The command line of a verb whose inputs are there."""
    for needed in VERBS[name].needs:
        if not (place / needed / "report.json").is_file():
            answer = server.run(words_of(needed, place, place / needed, server), place / needed)
            assert answer["status"] == 0, answer
    return VERBS[name].words(place, out)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def left_by(out: Path) -> dict[str, Any]:
    """Everything in a folder, hidden files too, without what differs between two runs that are equal."""
    files = [file for file in sorted(out.rglob("*")) if not file.is_dir() and not file.name.startswith(_EVENTS)]
    return {file.relative_to(out).as_posix(): _content(file, out) for file in files}


def _content(file: Path, out: Path) -> Any:
    if file.suffix in (".json", ".jsonl"):
        text = file.read_text().replace(str(out), "OUT")
        lines = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
        if file.name == ".written.json":
            return sorted(lines["files"])  # sizes and sums of files that hold seconds
        return _steady(lines)
    if file.suffix == ".csv":
        with file.open(newline="") as stream:
            return [_steady(row) for row in csv.DictReader(stream)]
    if file.suffix in (".html", ".md") or file.name == "README.md":
        return None  # made of what is compared here, and tells seconds
    return file.read_bytes()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in _VOLATILE and "seconds" not in key}
    if isinstance(value, list):
        found = [_steady(each) for each in value]
        return sorted(found, key=json.dumps) if found and all(isinstance(e, dict) and "fingerprint" in e for e in found) else found
    return value


def same(unbroken: dict[str, Any], found: dict[str, Any], *, resumed: bool) -> list[str]:
    """Names that only one of two has, and those whose contents differ."""
    faults = [f"left over: {name}" for name in found.keys() - unbroken.keys()]
    faults += [f"missing: {name}" for name in unbroken.keys() - found.keys()]
    for name in unbroken.keys() & found.keys():
        one, two = (_without_states(each[name]) if resumed and name == "report.json" else each[name] for each in (unbroken, found))
        if one != two:
            faults += [f"differs: {name}{where}" for where in _differences(one, two)]
    return sorted(faults)


def _differences(one: Any, two: Any) -> Iterator[str]:
    """Places in which two contents differ, with what stands there."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from (f" {key}{where}" for where in _differences(one[key], two[key]))
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from (f" {number}{where}" for where in _differences(*pair))
    elif one != two:
        yield f": {str(one)[:200]} | {str(two)[:200]}"


def _without_states(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a cohort without which of its cases were done by which run; what is done is in the folders."""
    results = dict(report["results"])
    if "counts" in results:
        counts = results.pop("counts")
        results["finished"] = counts["done"] + counts["skipped"], counts["failed"]
        results["cases"] = [entry["folder"] for entry in results["cases"]]
    return {**report, "results": results}


# -- kills -------------------------------------------------------------------------------------------------------------


def moments(name: str, unbroken: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Two of three kills come before an operation on files, half of those among the last ten; the rest at any moment."""
    draw = random.Random(os.environ.get("MEDLORE_KILL_SEED", "0") + name)
    events, found = unbroken["events"], []
    for number in range(count):
        if number % 3 == 2:
            found.append({"seconds": draw.uniform(0.2, 1.0) * unbroken["seconds"]})
        else:
            found.append({"event": draw.randint(max(1, events - 10) if number % 2 else 1, events)})
    return found


def kill_and_repeat(name: str, server: Server, place: Path, tmp_path: Path, kills: int) -> tuple[int, list[str]]:
    """How many kills landed, and every difference of what the repeated runs left from what an unbroken one leaves."""
    outs = [tmp_path / "unbroken", *(tmp_path / f"killed{number}" for number in range(0, kills, _IN_A_ROW))]
    for out in outs:
        out.parent.mkdir(exist_ok=True)
        if VERBS[name].file:
            out.mkdir()
    first = server.run(words_of(name, place, outs[0], server), outs[0])
    assert first["status"] == 0, first
    unbroken = left_by(outs[0])
    assert not [n for n in unbroken if Path(n).name.startswith((".part-", ".old-", ".lock"))]
    planned, landed, faults = moments(name, first, kills), 0, list[str]()
    for number, out in enumerate(outs[1:]):
        words, chain = words_of(name, place, out, server), planned[number * _IN_A_ROW : (number + 1) * _IN_A_ROW]
        for kill in chain:
            answer = server.run(words, out, **kill)
            assert answer["status"] in (0, -signal.SIGKILL), (kill, answer)
            landed += answer["status"] < 0
        last = server.run(words, out)
        assert last["status"] == 0, (chain, last)
        faults += [f"{chain}: {fault}" for fault in same(unbroken, left_by(out), resumed=True)]
    sys.stdout.write(f"{name}: {landed} of {kills} kills landed, {len(outs) - 1} comparisons, {first['events']} operations on files\n")
    return landed, faults


@pytest.mark.parametrize("name", [name for name, verb in VERBS.items() if not verb.full])
def test_three_kills_of_the_quick_verbs(name: str, server: Server, place: Path, tmp_path: Path) -> None:
    landed, faults = kill_and_repeat(name, server, place, tmp_path, 3)
    assert not faults, "\n".join(faults)
    assert landed >= 1


@pytest.mark.full
@pytest.mark.parametrize("name", VERBS)
def test_many_kills_of_every_verb(name: str, server: Server, place: Path, tmp_path: Path) -> None:
    if name.endswith("Ray"):
        pytest.importorskip("ray")
    kills = int(os.environ.get("MEDLORE_KILLS", "40"))
    landed, faults = kill_and_repeat(name, server, place, tmp_path, kills)
    assert not faults, "\n".join(faults)
    assert landed >= kills // 3


# -- signals that ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segment", "finetune", "export"])
def test_sigterm_ends_like_ctrl_c(name: str, server: Server, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if VERBS[name].file:
        out.mkdir()
    words, status = words_of(name, place, out, server), 0
    after = 1.0
    while status == 0:  # until one comes before it has ended
        answer = server.run(words, out, seconds=after, number=signal.SIGTERM)
        status, after = answer["status"], after / 2
    assert status == 143, answer
    assert "stopped by a signal" in answer["said"]
    hidden = [path for path in out.rglob(".*") if path.name != ".written.json"]
    assert not hidden
    if (out / "report.json").is_file() and not VERBS[name].file:
        assert json.loads((out / "report.json").read_text())["state"] in ("stopped", "done")
    assert server.run(words, out)["status"] == 0


# -- two at a time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * verb.full) for name, verb in VERBS.items() if name not in ("segment on Ray", "view")],
)
def test_two_processes_do_not_write_to_one_place(name: str, server: Server, place: Path, tmp_path: Path) -> None:
    words = words_of(name, place, tmp_path / "out", server)
    held = Path(words[words.index("--out") + 1])
    held.parent.mkdir(exist_ok=True)
    with OutputLock.beside(held) if VERBS[name].file else OutputLock(held):
        before = left_by(tmp_path / "out")
        answer = server.run(words, tmp_path / "out")
        assert answer["status"] == 2, answer
        assert "another run is writing there" in answer["said"]
        assert left_by(tmp_path / "out") == before
    with pytest.raises(InputError, match="another run is writing there"), OutputLock(tmp_path), OutputLock(tmp_path):
        pass
