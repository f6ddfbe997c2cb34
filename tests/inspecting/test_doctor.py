"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from medlore.inspecting import doctor


def test_a_torchvision_that_does_not_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    importlib.invalidate_caches()
    finding = next(f for f in doctor.check_machine() if f.name == "torchvision")
    assert finding.state == "bad"
    assert "nms does not exist" in finding.seen
    assert "pip uninstall torchvision" in finding.fix


def test_an_old_or_missing_package_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise doctor.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = {f.name: f for f in doctor._packages()}
    assert findings["torch"].state == "bad"
    assert findings["peft"].seen == "not installed"


def test_little_disk_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: Usage(10, 9, 2**29))
    assert doctor._disk()[0].state == "note"


def test_versions_with_letters_compare_as_numbers() -> None:
    assert doctor._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor._numbers("2.8.0a0") >= (2, 8)


def test_the_command_runs_as_a_user_runs_it() -> None:
    result = subprocess.run([sys.executable, "-m", "medlore", "doctor"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "torchvision" in result.stdout
