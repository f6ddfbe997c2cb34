"""Every script of ../shared/cases is a test with its right value: the tests that carry its name as a mark."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_script_has_a_test_of_its_name(shared: Path) -> None:
    scripts = {path.stem for path in (shared / "cases").glob("*.py") if not path.stem.startswith("_")}
    marks = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r'^@pytest\.mark\.case\("(\w+)"\)', path.read_text(), re.M)}
    assert len(scripts) >= 19
    assert marks == scripts
