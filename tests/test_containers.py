"""Recipes of containers say what the project says: versions, extras, files that are there. They are read here, not built."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from medlore.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "containers"
TORCH = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["Dockerfile", "medlore.def"])
def test_copied_files_are_there_and_torch_is_the_tested_one(name: str) -> None:
    text = (PLACE / name).read_text()
    if name == "Dockerfile":
        copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    else:
        copied = [line.split()[0] for line in text.split("%files")[1].split("%post")[0].strip().splitlines()]
    assert {"pyproject.toml", "constraints.txt", "src"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    assert "grep '^torch==' constraints.txt" in text
    assert TORCH is not None


def test_the_environment_has_the_tested_torch_and_python() -> None:
    content = yaml.safe_load((PLACE / "environment.yaml").read_text())
    assert TORCH is not None
    (pip,) = [entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict)]
    assert f"torch=={TORCH[1]}" in pip
    assert (PLACE / pip[0].split()[1]).resolve() == ROOT / "constraints.txt"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert "python=3.11" in content["dependencies"]
    assert wanted == ">=3.11"


@pytest.mark.parametrize("name", ["Dockerfile", "medlore.def", "environment.yaml"])
def test_extras_are_those_of_the_project(name: str) -> None:
    named = re.findall(r"(?:EXTRAS=|\[)([a-z,]+)(?:\]|$)", (PLACE / name).read_text(), re.MULTILINE)
    assert named
    assert set(",".join(named).split(",")) <= set(EXTRAS)
