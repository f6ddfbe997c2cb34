"""What a study leaves to be read: its page, in a browser too, its pictures and its Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.studies.test_study import TEXT, save_images, write_study

from chromium import browser, browser_path
from medlore.pages.view import view
from medlore.runs import workers as segment_workers
from medlore.studies.cells import StudyCell, cells_of
from medlore.studies.faults import read_study
from medlore.studies.records import append_record
from medlore.studies.run import run_study
from medlore.studies.table import ranks_of
from medlore.studies.worker import lost_cell, record_of
from tiny_backbone import striped, write_backbone

METHODS = ("sr-lora", "linear-probe", "full", "a method with a long name")


def record(cell: StudyCell, score: float) -> dict[str, Any]:
    """As a cell that ran leaves it."""
    return record_of(cell) | {
        "state": "done", "measure": "balanced_accuracy", "score": score, "majority": 0.25, "metrics": {}, "validation": 0.5,
        "trained_parameters": 4_284_676, "head_parameters": 1028, "factor_parameters": 103_424, "steps": 18, "best_epoch": 3,
        "images": {"train": 20, "validation": 20, "test": 200}, "learning_rate": 1e-3, "trials": [], "tuning_seconds": 2.0,
        "training_seconds": 1.0, "seconds": 3.0, "peak_memory_bytes": 2**29, "process": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three draws in which one cell was killed; nothing is trained: its cells are there already."""
    place = tmp_path_factory.mktemp("study")
    write_backbone(place / "model")
    save_images(place / "stripes.npz", striped(10))
    entries = "\n  - full\n  - {method: full, name: a method with a long name, rate: 0.001}\nequal_controls: false\ndraws: 3\n"
    text = TEXT.replace("draws: 2\n", "").replace("\n  - linear-probe\n", f"\n  - linear-probe{entries}")
    study = write_study(place, text)
    cells, noise = cells_of(read_study(study)), np.random.default_rng(0)
    out = place / "run with a space"
    out.mkdir()
    for number, cell in enumerate(cells):
        found = lost_cell((cell,), "killed <b>") if number == 2 else record(cell, float(noise.uniform(0.4, 0.6)))
        append_record(out, found)
    run_study(study, out, workers=0, only=["draw=3", "method=sr-lora"], resume=True)  # which is there
    return out


def test_mean_ranks_are_over_draws_that_all_methods_have(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "Each of 2 draws ranks all methods. Draws left out because a method is missing: 1." in page
    assert page.count("data:image/png;base64") == 3  # differences, mean ranks, ranks of the plan
    with Image.open(folder / "mean_ranks.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_rank_per_draw_in_closed_form() -> None:
    def made(method: str, draw: int, score: float | None, seed: int = 0) -> dict[str, Any]:
        return {"data": "a", "shots": 5, "draw": draw, "seed": seed, "method": method, "state": "done", "score": score}

    records = [made("x", 1, 0.4), made("y", 1, 0.5), made("x", 2, 0.2), made("x", 2, 0.6, seed=1), made("y", 2, 0.35), made("x", 3, 0.1)]
    found = ranks_of(records, ["x", "y"])
    assert found is not None
    assert (found["ranks"], found["draws"], found["draws_left_out"]) == ({"x": 1.5, "y": 1.5}, 2, 1)  # seeds of a draw are averaged first
    assert ranks_of([*records, made("y", 3, None)], ["x", "y"]) == found  # a score that is not defined is none
    assert ranks_of(records[:2], ["x", "y"]) is None


def test_markdown_has_every_method_and_says_what_is_missing(folder: Path) -> None:
    text = (folder / "tables.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows] == ["method", *METHODS, "majority class"]
    assert {row.count("|") for row in rows} == {7}
    assert "11 of 12 cells are done, 1 failed, 0 have not run." in text


def test_a_killed_cell_reports_only_what_a_study_can_do(folder: Path) -> None:
    cell = cells_of(read_study(folder.parent / "study.yaml"))[0]
    assert lost_cell((cell,), segment_workers._KILLED)["reason"].endswith("for its memory: give fewer --workers")


def test_view_shows_the_page_of_a_study(folder: Path) -> None:
    page = view(folder).read_text()
    assert "<h1>Study: tiny</h1>" in page
    assert "killed &lt;b&gt;" in page
    assert "1 cell failed" in page
    assert "Mean ranks" in page


@pytest.mark.skipif(browser_path() is None, reason="no Chromium on this machine: the page was not opened")
def test_the_page_opens_in_a_browser(folder: Path) -> None:
    page = view(folder)
    with browser() as tab:
        tab.open(page, width=1280)
        widths = tab.run("[...document.querySelectorAll('.wide')].map(box => [box.scrollWidth, box.clientWidth])")
        assert len(widths) >= 2
        assert all(inside <= box for inside, box in widths)  # no table is wider than the page
        heights = tab.run(
            "[...document.querySelectorAll('section table')][0].querySelectorAll('tbody tr').values().map(r => r.offsetHeight).toArray()"
        )
        assert max(heights) < 1.5 * min(heights)  # no row is broken into lines
        tab.run("document.querySelectorAll('section table')[0].querySelectorAll('th')[1].click()")
        shown = tab.run(
            "[...document.querySelectorAll('section table')[0].querySelectorAll('td:nth-child(2)')].map(c => parseFloat(c.innerText))"
        )
        assert shown in (sorted(shown), sorted(shown, reverse=True))
        assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        assert tab.run("document.querySelectorAll('section b').length") == 0
        tab.open(page, width=420, dark=True)
        assert tab.run("document.documentElement.scrollWidth") <= 420
        assert tab.console == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in tab.requests if url.startswith("file:")]) == 2  # opened twice
