"""Shells are offered verbs, flags, values, methods, formats, and the labels of the pack on the line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("COMP_")}


def asked(shell: str, line: str) -> str:
    """What a shell is answered for a line, the cursor at its end."""
    words = line.split(" ")
    extra = {
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    environment = {**ENVIRONMENT, "_MEDLORE_COMPLETE": f"complete_{shell}", **extra}
    done = subprocess.run([sys.executable, "-m", "medlore"], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "line", "offered", "withheld"),
    [
        ("bash", "medlore seg", "segment", "study"),
        ("bash", "medlore segment --gr", "--grid", "--labels"),
        ("zsh", "medlore segment --grid p", "processed", "original"),
        ("fish", "medlore segment --format nifti,r", "nifti,rtstruct", "dicom-seg"),
        ("zsh", "medlore finetune --method sr", "sr-lora", "dora"),
        ("fish", "medlore segment --labels left_k", "left_kidney", "right_kidney"),
    ],
)
def test_what_is_offered(shell: str, line: str, offered: str, withheld: str) -> None:
    said = asked(shell, line)
    assert offered in said
    assert withheld not in said


def test_labels_are_those_of_the_pack_although_bash_takes_its_name_apart() -> None:
    found = asked("bash", "medlore segment --model medlore : seg-mini --modality t1 --labels cerebell").splitlines()
    assert "cerebellar_cortex" in found  # the pack's own; the vocabulary has none
    assert "cerebellar_cortex" not in asked("bash", "medlore segment --modality t1 --labels cerebell")


def test_the_script_for_bash_completes_in_bash(tmp_path: Path) -> None:
    (tmp_path / "medlore").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m medlore "$@"\n')
    (tmp_path / "medlore").chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program = """
source <(medlore --show-completion bash)
COMP_WORDS=(medlore segment --labels liver,spl) COMP_CWORD=3
_medlore_completion medlore
printf '%s\\n' "${COMPREPLY[@]}"
"""
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(["bash", "--norc", "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["liver,spleen"], done.stderr
