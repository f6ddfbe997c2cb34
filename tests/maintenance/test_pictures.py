"""Pictures of README and docs: small, described in words, and the diagram is the one that its program draws."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from maintenance.pictures import MOST_BYTES, halves_svg, main

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "pictures"


def test_the_diagram_is_that_of_the_program() -> None:
    assert (FOLDER / "halves.svg").read_text(encoding="utf-8") == halves_svg()
    texts = [node.text for node in ET.fromstring(halves_svg()).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Certified stable ranks", "Shared base + experts"} <= set(texts)


def test_pictures_are_small_and_each_is_shown_with_words() -> None:
    pictures = sorted(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in pictures) <= MOST_BYTES
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = [
        found for page in pages for found in re.findall(r"!\[([^\]]*)\]\((?:docs/)?pictures/([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert {name for _, name in shown} == {path.name for path in pictures}
    assert all(len(words) > 30 for words, _ in shown)


def test_a_folder_without_a_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--demo", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
