"""The examples of docs/data.md are right."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from medlore.data.images.lists import MEDFMC_SIZES, VTAB_CLASSES, medfmc_format, parse_list
from medlore.data.images.reading import read_images

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_lines_of_medfmc() -> None:
    for dataset, count in (("chest", 19), ("colon", 1), ("endo", 4)):
        line = re.search(rf"^\| {dataset} \| `(.+?)` \|", PAGE, flags=re.MULTILINE)
        assert line is not None
        parsed = parse_list(line.group(1), medfmc_format(dataset))  # type: ignore[arg-type]
        assert parsed.faults == ()
        assert len(parsed.lines[0].labels) == count


def test_the_numbers_of_the_page() -> None:
    flat = " ".join(PAGE.split())
    for task, classes in VTAB_CLASSES.items():
        assert f"{task} ({classes})" in flat
    for column, dataset in enumerate(("chest", "colon", "endo")):
        for name in ("trainval", "test_WithLabel", "test_WithoutLabel"):
            row = re.search(rf"^\| `{name}`.*$", PAGE, flags=re.MULTILINE)
            assert row is not None
            assert f"{MEDFMC_SIZES[dataset][name]:,}" in row.group(0).split("|")[2 + column]


def test_the_tables(tmp_path: Path) -> None:
    tables = re.findall(r"^```\n(file,.+?)```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(tables) == 2
    for number, (text, task) in enumerate(zip(tables, ("single", "multi"), strict=True)):
        folder = tmp_path / str(number)
        for line in text.splitlines()[1:]:
            path = folder / line.split(",")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(path)
        (folder / "labels.csv").write_text(text)
        assert read_images(folder).task == task
