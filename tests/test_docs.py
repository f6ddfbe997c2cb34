"""What the documents say holds: paths exist, verbs exist, doctests run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE = ROOT / "src" / "medlore"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if "commands" not in p.parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_verbs_in_code_blocks_exist(page: Path) -> None:
    from medlore.cli import VERBS

    for block in re.findall(r"```(?:console|bash|sh)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for verb in re.findall(r"^\$? ?medlore ([a-z]+)", block, flags=re.MULTILINE):
            assert verb in VERBS, f"{page.name} shows `medlore {verb}`"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_docstring_examples(path: Path) -> None:
    if ">>>" not in path.read_text(encoding="utf-8"):
        return
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_nothing_names_this_machine() -> None:
    """No absolute path of a developer's machine in what is shipped."""
    import subprocess

    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    for name in filter(None, listed):
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cff"}
            and path.is_file()
            and path.name != "test_docs.py"
        ):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.])/(work|root)/", text), name


def test_tables_of_settings_are_those_of_the_settings() -> None:
    from maintenance.setting_tables import DOCS, TABLES, rewritten

    pages = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
    shown = {name for text in pages.values() for name in re.findall(r"<!-- settings: (\w+) -->", text)}
    assert shown == set(TABLES)
    for page, text in pages.items():
        assert rewritten(text) == text, f"{page.name}: run python -m maintenance.setting_tables"
