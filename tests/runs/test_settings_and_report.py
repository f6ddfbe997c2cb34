"""Settings report all their faults at once; every run leaves a report, however it ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch

from medlore.errors import InputError
from medlore.files import read_json, write_text
from medlore.runs.hardware import choose_device, seed_everything
from medlore.runs.report import Run
from medlore.runs.settings import Settings
from medlore.runs.settings_file import read_settings


class Example(Settings):
    """Settings of these tests."""

    shots: int = 5
    rate: float = 0.1


def test_flags_lie_over_the_file_and_none_does_not(tmp_path: Path) -> None:
    file = write_text(tmp_path / "s.yaml", "shots: 1\nrate: 0.5\n")
    assert read_settings(Example, file, shots=10, rate=None) == Example(shots=10, rate=0.5)


def test_all_faults_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    file = write_text(tmp_path / "s.yaml", "shot: 1\nrate: fast\n")
    with pytest.raises(InputError, match=r"s\.yaml: 2 faults") as caught:
        read_settings(Example, file)
    assert any("rate" in fault and "'fast'" in fault for fault in caught.value.faults)
    assert any("shot: unknown setting; the nearest are shots" in fault for fault in caught.value.faults)


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    text = "shots: 1\nshot: 2\nshots: 3\nlist:\n  - {a: 1, b: 2, a: 3}\n  - inner:\n      rate: 1\n      other: 2\n      rate: 2\n"
    with pytest.raises(InputError) as caught:
        read_settings(Example, write_text(tmp_path / "s.yaml", text))
    given = "given before in line {}; which one is meant?"
    assert caught.value.faults[:3] == (
        f"line 3, shots: {given.format(1)}", f"line 5, list.0.a: {given.format(5)}", f"line 9, list.1.inner.rate: {given.format(7)}",
    )  # fmt: skip
    assert caught.value.faults[3].startswith("line 2, shot: unknown")


def test_one_word_in_several_mappings_is_no_repetition(tmp_path: Path) -> None:
    class Inner(Settings):
        a: int = 0
        rates: dict[str, int] = pydantic.Field(default_factory=dict)

    class Outer(Settings):
        each: tuple[Inner, ...] = ()
        a: int = 0

    text = "each:\n  - &first {a: 1}\n  - {a: 1, rates: {a: 1}}\n  - *first\na: 2\n"
    assert read_settings(Outer, write_text(tmp_path / "s.yaml", text)).each[2].a == 1


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="a YAML mapping of settings"):
        read_settings(Example, write_text(tmp_path / "s.yaml", text))


def test_report_of_a_finished_run(tmp_path: Path) -> None:
    given = write_text(tmp_path / "in.txt", "x")
    with Run("example", tmp_path / "out", settings=Example(), seed=3, device="cpu") as run:
        run.add_input(given)
        run.add_output("plan", tmp_path / "out" / "plan.json")
        run.results["auc"] = float("nan")
    report = read_json(tmp_path / "out" / "report.json")
    assert report["state"] == "done"
    assert report["settings"] == {"shots": 5, "rate": 0.1}
    assert report["outputs"] == {"plan": "plan.json"}
    assert report["results"]["auc"] is None
    assert len(report["inputs"][str(given)]) == 64
    assert report["versions"]["torch"] == torch.__version__
    assert report["peak_memory_bytes"] > 1e6


@pytest.mark.parametrize(("error", "state"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_report_of_a_run_that_ends_badly(tmp_path: Path, error: type[BaseException], state: str) -> None:
    with pytest.raises(error), Run("example", tmp_path, settings={}):
        raise error
    assert read_json(tmp_path / "report.json")["state"] == state


def test_device_and_seed() -> None:
    assert choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda', which is not on this machine"):
            choose_device("cuda")
    seed_everything(7)
    first = (torch.rand(2).tolist(), np.random.rand())  # noqa: NPY002
    seed_everything(7)
    assert (torch.rand(2).tolist(), np.random.rand()) == first  # noqa: NPY002
