"""The public surface: sorted, whole, lazy; documents send nobody elsewhere."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medlore

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOORS = {"decompose", "finetune", "get_peft_model", "load_segmenter", "plan_ranks", "segment"}


def test_names_are_sorted_and_all_there() -> None:
    names = list(medlore.__all__)
    assert names == sorted(names, key=lambda name: (name[0].islower(), name))
    assert set(names) >= DOORS
    assert set(names) - {"__version__"} == set(medlore._HOMES) == set(dir(medlore)) - {"__version__"}
    for name in medlore._HOMES:
        found = getattr(medlore, name)
        assert found.__name__ == name
        assert found.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(medlore.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == medlore._HOMES


def test_settings_and_the_door_cost_no_torch() -> None:
    code = "import sys, medlore; medlore.FinetuneSettings(epochs=2); medlore.SegmentSettings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_use_public_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    inner = re.findall(r"(?:from|import) (medlore\.[\w.]+)", text)
    assert not inner, f"{page.name} sends its readers to {inner}"
    named = re.findall(r"from medlore import ([\w, ]+)", text)
    used = {name.strip() for line in named for name in line.split(",")} | set(
        re.findall(r"(?<![\w/.-])medlore\.(?!json)(\w+)(?=[(`])", text)
    )
    rooms = {name for name in used - set(medlore.__all__) if hasattr(importlib.import_module(f"medlore.{name}"), "__all__")}
    assert used <= set(medlore.__all__) | rooms, f"{page.name} names {sorted(used - set(medlore.__all__) - rooms)}"


def test_the_reference_shows_every_public_name() -> None:
    shown = set(re.findall(r"^::: medlore\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert shown == set(medlore.__all__) - {"__version__"}
