"""The door: fast help without torch, exit statuses, one clear line for every error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from medlore import cli
from medlore.errors import InputError, StepError


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    probe = """
import sys
from medlore.cli import main
assert main(["--help"]) == 0
heavy = {"torch", "numpy", "pandas", "matplotlib", "transformers", "peft", "scipy", "nibabel", "pydantic"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    result = run_python(probe)
    assert result.returncode == 0, result.stderr
    for verb in cli.VERBS:
        assert verb in result.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb_imports_no_torch(verb: str) -> None:
    result = run_python(
        f"import sys; from medlore.cli import main; assert main([{verb!r}, '--help']) == 0; sys.exit(int('torch' in sys.modules))"
    )
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_import_costs_no_torch() -> None:
    assert run_python("import medlore, sys; medlore.MedloreError; sys.exit(int('torch' in sys.modules))").returncode == 0


def test_public_names_are_sorted_and_there() -> None:
    import medlore

    names = [n for n in medlore.__all__ if n != "__version__"]
    assert names == sorted(names, key=lambda n: (n[0].islower(), n))
    for name in names:
        assert getattr(medlore, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = medlore.nonsense


@pytest.mark.parametrize("words", [["nonsense"], ["doctor", "--nope"]])
def test_wrong_use_is_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["finetune", "--data", "", "--out", "x"], "the word after --data"),
        (["info", " "], "the word after info"),
        (["info", "--region="], "--region"),
    ],
)
def test_empty_words_are_refused(words: list[str], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert f"{place}: an empty text. Accepted: a value." in capsys.readouterr().err


def test_a_name_beyond_the_system_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "x" * 5000]) == 2
    printed = capsys.readouterr().err
    assert "(5000 characters): a name longer than the system takes. Accepted: " in printed
    assert len(printed) < 400


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("a", "b", "c", "d"), 2),
        (StepError("a", "b", "c", "d"), 1),
        (KeyboardInterrupt(), 1),
        (OSError(28, "No space left"), 1),
        (KeyError("bug"), 1),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_machine() -> None:
        raise error

    monkeypatch.setattr("medlore.inspecting.doctor.check_machine", check_machine)
    assert cli.main(["doctor"]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_doctor_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"python", "torch", "torchvision", "disk", "bf16 on CPU"} <= {f["name"] for f in findings}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import medlore

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == medlore.__version__
