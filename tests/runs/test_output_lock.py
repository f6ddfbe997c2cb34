"""What a run writes is its own while it runs; what a dead one left goes, what a living one is writing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medlore.decomposing.trained_once import TrainedOnce
from medlore.errors import DataError, InputError
from medlore.files import atomic_folder, atomic_path, clear_remains, read_json, write_json, write_text
from medlore.runs.journal import append_line, read_lines
from medlore.runs.output_lock import OutputLock, refuse_held
from medlore.runs.report import Run, refuse_finished
from medlore.runs.settings import Settings
from medlore.runs.stopping import Stopped, ends_when_asked

WRITER = """
import sys, time
from medlore.files import atomic_folder, atomic_path
with (atomic_folder if sys.argv[2] == "folder" else atomic_path)(sys.argv[1]) as made:
    (made / "case.json" if sys.argv[2] == "folder" else made).write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def begun(path: Path, kind: str) -> subprocess.Popen[str]:
    """A process in the middle of writing a file or folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_what_a_living_process_writes_is_not_cleared_and_what_a_dead_one_left_is(tmp_path: Path) -> None:
    folder, file = begun(tmp_path / "ct", "folder"), begun(tmp_path / "deep" / "er" / "a.csv", "file")
    try:
        clear_remains(tmp_path)
        assert len(list(tmp_path.rglob(".part-*"))) == 2
        with pytest.raises(InputError, match="another process is writing it"), atomic_folder(tmp_path / "ct"):
            pass
        write_text(tmp_path / "deep" / "er" / "a.csv", "whole")  # files: each is whole, the last one stays
        assert (tmp_path / "deep" / "er" / "a.csv").read_text() == "whole"
        assert len(list(tmp_path.rglob(".part-*"))) == 2
    finally:
        end(folder)
        end(file)
    clear_remains(tmp_path)
    assert not list(tmp_path.rglob(".part-*"))


def test_the_next_writer_takes_over_what_a_kill_left(tmp_path: Path) -> None:
    for kind, path in (("folder", tmp_path / "pack"), ("file", tmp_path / "scores.csv")):
        end(begun(path, kind))
        assert len(list(tmp_path.glob(".part-*"))) == 1
        with (atomic_folder if kind == "folder" else atomic_path)(path) as made:
            assert list(made.iterdir()) == [] if kind == "folder" else made.read_bytes() == b""
            (made / "case.json" if kind == "folder" else made).write_text("whole")
        assert not list(tmp_path.glob(".part-*"))


def test_clearing_touches_nothing_of_others(tmp_path: Path) -> None:
    kept = ["a/.part-notes.txt", "a/b/c/d/.part-0123456789ab.txt", ".old-thesis/text.tex", "thesis/text.tex", ".git/.part-0123456789ab"]
    for name in (*kept, "a/b/.part-0123456789ab.nii.gz", ".part-x", "a/.old-ct/case.json"):
        write_text(tmp_path / name, name)
    clear_remains(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {*kept, "a/ct/case.json"}


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with OutputLock(tmp_path), pytest.raises(InputError, match="another run is writing there"):
        refuse_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_beside_a_file_leaves_no_folder_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "scores.csv"
    again = OutputLock.beside(target)
    with (
        OutputLock.beside(target),
        OutputLock.beside(target.with_name("other.csv")),
        pytest.raises(InputError, match=r"scores\.csv: another"),
    ):
        again.__enter__()
    assert not list(tmp_path.iterdir())


def test_a_run_says_running_until_it_ends_and_keeps_others_out(tmp_path: Path) -> None:
    with Run("example", tmp_path, settings={}):
        assert read_json(tmp_path / "report.json")["state"] == "running"
        with pytest.raises(InputError, match="another run"), Run("example", tmp_path, settings={}):
            pass
        assert read_json(tmp_path / "report.json")["state"] == "running"
    assert read_json(tmp_path / "report.json")["state"] == "done"
    with pytest.raises(InputError, match="holds a finished run of example"), Run("other", tmp_path, settings={}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


class Shots(Settings):
    """Settings of these tests."""

    shots: int = 5


def test_resuming_with_other_settings_does_not_replace_a_finished_run(tmp_path: Path) -> None:
    with Run("example", tmp_path, settings=Shots()):
        pass
    refuse_finished(tmp_path, overwrite=False, settings=Shots())
    for settings in (Shots(shots=1), None):
        with pytest.raises(InputError, match="holds a finished run"):
            refuse_finished(tmp_path, overwrite=False, settings=settings)


def test_of_several_processes_the_first_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run("example", tmp_path, settings=Shots()):
        monkeypatch.setenv("RANK", "1")
        refuse_held(tmp_path)
        with Run("example", tmp_path, settings=Shots()) as run:
            run.results["of"] = "the second"
        assert read_json(tmp_path / "report.json")["state"] == "running"
        monkeypatch.delenv("RANK")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_as_stopped(tmp_path: Path, kind: signal.Signals) -> None:
    before = signal.getsignal(kind)

    def asked_twice() -> None:
        with Run("example", tmp_path, settings={}):
            try:
                os.kill(os.getpid(), kind)
            finally:
                os.kill(os.getpid(), kind)  # to the whole group, a moment later: what is cleared away is not disturbed

    with pytest.raises(Stopped) as caught, ends_when_asked() as heard:
        asked_twice()
    assert caught.value.exit_status == 128 + kind
    assert [each.exit_status for each in heard] == [128 + kind]
    assert read_json(tmp_path / "report.json")["state"] == "stopped"
    assert not list(tmp_path.glob(".*"))
    assert signal.getsignal(kind) == before


def test_an_ignored_signal_stays_ignored_and_other_threads_change_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends_when_asked():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    seen: list[object] = []

    def look() -> None:
        with ends_when_asked():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_journal_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    append_line(path, {"name": "M\udcfcller", "value": float("nan")})
    path.write_bytes(path.read_bytes() + b'{"name": "cu')
    append_line(path, {"name": "next"})
    assert [record["name"] for _, record in read_lines(path)] == ["M\udcfcller", "next"]
    path.write_text("[]\n")
    with pytest.raises(DataError, match="line 1"):
        list(read_lines(path))


def test_a_finished_network_of_other_settings_is_put_aside_and_found_again(tmp_path: Path) -> None:
    once = TrainedOnce(tmp_path, SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, device="cpu"))
    trained: list[str] = []

    def finish(identity: str, value: float) -> float:
        network = nn.Linear(1, 1, bias=False)

        def train(_checkpoint: object) -> dict[str, object]:
            trained.append(identity)
            nn.init.constant_(network.weight, value)
            return {"losses": [value]}

        assert once.finish("student", identity, network, train) == {"losses": [value]}
        return float(network.weight.detach())

    first, second = "a" * 64, "b" * 64
    assert [finish(first, 1.0), finish(second, 2.0), finish(first, 1.0), finish(second, 2.0)] == [1.0, 2.0, 1.0, 2.0]
    assert trained == [first, second]
    assert once.state_of("student", first) == once.state_of("student", second) == "trained"
    assert torch.load(tmp_path / "student" / "weights.pt", weights_only=True)["weight"].item() == 2.0
    assert json.loads((tmp_path / "student-aaaaaaaa" / "history.json").read_text())["identity"] == first


def test_a_foreign_report_is_not_replaced(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"patient": "somebody"})
    with pytest.raises(InputError, match="that no run wrote"), Run("example", tmp_path, settings={}):
        pass
    assert read_json(tmp_path / "report.json") == {"patient": "somebody"}
