"""Put a section into a page of results, in place of the one with the same title."""

from __future__ import annotations

from pathlib import Path

from medlore.files import write_text


def put_section(page: Path, text: str) -> None:
    """Replace the section that begins with the first line of `text` (`## ...`), or append it; the rest of the page stays as it is."""
    title = text.splitlines()[0]
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next((number for number, line in enumerate(lines) if line == title), len(lines))
    stop = next((number for number in range(start + 1, len(lines)) if lines[number].startswith("## ")), len(lines))
    parts = ["\n".join(lines[:start]).strip("\n"), text.strip("\n"), "\n".join(lines[stop:]).strip("\n")]
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
