"""The demo as a user runs it, on the installed package alone: short, then read back from disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.cli import main
from medlore.commands.screens.demo import print_demo
from medlore.data.images.digits import digits
from medlore.demo.demo import DemoSettings, run_demo
from medlore.demo.segmentation import SHIPPED, segment_template, why_left_out
from medlore.errors import DataError, InputError
from medlore.pages.view import page_of
from medlore.tuning.comparison import CONTENDERS, run_cell, standings
from medlore.tuning.settings import FinetuneSettings

SHORT = DemoSettings(shots=1, draws=2, epochs=1, test_images=60)


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter with random weights that sees the head at 6 mm: fast, and wrong."""
    from small_segmenter import write_small_pack

    return write_small_pack(tmp_path_factory.mktemp("packs") / "pack", roi_size=(16, 16, 16), spacing_mm=(6.0, 6.0, 6.0))


def test_digits_are_split_without_overlap() -> None:
    pool, test = digits(400, seed=0)
    assert len(pool) + len(test) == 1797
    assert abs(len(test) - 400) <= 10
    assert not set(pool.keys) & set(test.keys)
    brightest = max(int(np.asarray(item.source).max()) for item in test.items)
    assert brightest == 255
    with pytest.raises(DataError, match="less than 1797"):
        digits(1797, seed=0)


def test_demo_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(SHORT, tmp_path / "demo")
    print_demo(result, as_json=False)
    printed = capsys.readouterr().out
    assert [row.contender for row in result.table] == ["sr-lora", "lora", "linear-probe"]
    for row in result.table:
        assert str(row.score) in printed
    for words in ("majority class", "medlore finetune --data FOLDER", "stable rank", "sr-lora minus it"):
        assert words in printed
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["state"] == "done"
    assert [cell["score"] for cell in report["results"]["cells"]] == [cell.score for cell in result.cells]
    assert sum(report["results"]["ranks"].values()) == sum(layer.rank for layer in result.plan.layers)
    assert "Segmentation: left out" in printed or "by text prompts" in printed
    assert result.peak_memory_bytes > 1e8
    page = (tmp_path / "demo" / "page.html").read_text()
    for row in result.table:
        assert str(row.score) in page
    for picture in ("ranks.png", "digits.png"):
        with Image.open(tmp_path / "demo" / picture) as image:
            assert image.width > 600
            assert image.height > 200
    factors = {cell.contender: cell.factors for cell in result.cells}
    half_a_rank = sum(sum(layer.shape) for layer in result.plan.layers) / 2
    assert abs(factors["sr-lora"] - factors["lora"]) <= half_a_rank  # equal up to what whole ranks allow
    assert factors["linear-probe"] is None


def test_every_method_of_the_tables_runs_and_repeats() -> None:
    pool, test = digits(50, seed=0)
    settings = FinetuneSettings(epochs=1, batch_size=8, device="cpu")
    cells = [run_cell(name, settings, pool=pool, test=test, shots=1, draw=1) for name in CONTENDERS]
    again = run_cell("sr-lora nested", settings, pool=pool, test=test, shots=1, draw=1)
    assert again.score == next(cell.score for cell in cells if cell.contender == "sr-lora nested")
    assert {cell.train_images for cell in cells} == {10}
    trained = {cell.contender: cell.trained for cell in cells}
    assert trained["linear-probe"] < trained["sr-lora"] < trained["full"]
    assert [row.difference is None for row in standings(cells)] == [True] + [False] * (len(CONTENDERS) - 1)


def test_wrong_use_ends_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--shots", "0", "--out", str(tmp_path / "x")]) == 2
    assert main(["demo", "--draws", "x"]) == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--draws", "1", "--shots", "1", "--out", str(blocked)]) == 2
    assert "is a file. Accepted: a folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_template_is_segmented_on_its_own_grid(pack: Path, tmp_path: Path) -> None:
    import nibabel as nib

    from medlore.demo.segmentation import template_file

    record = segment_template(str(pack), tmp_path, prompts=("grey matter", "hippocampus", "no such part"))
    assert record["without_prompt"] == ["no such part"]
    grey, hippocampus = record["labels"]
    assert grey["kmeans_dice"] > 0.85
    assert 0 <= grey["dice"] < grey["kmeans_dice"]  # random weights
    assert hippocampus["dice"] is None
    image, mask = nib.load(template_file()), nib.load(tmp_path / "template" / "grey matter.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    assert grey["volume_ml"] == pytest.approx(np.asarray(mask.dataobj).sum() / 1000, abs=0.01)
    (tmp_path / "report.json").write_text(json.dumps({"verb": "demo", "results": {"segmentation": record}}))
    page = page_of(tmp_path)
    assert page.sections[0].title == "Segmentation by text prompts"
    viewer, table = page.sections[0].pieces[0], page.sections[0].pieces[-3]
    assert [label.name for label in viewer.labels] == ["grey matter", "hippocampus"]
    assert table.rows[0] == ["grey matter", grey["volume_ml"], grey["dice"], grey["kmeans_dice"]]
    with pytest.raises(DataError, match="no prompt for any part"):
        segment_template(str(pack), tmp_path, prompts=("no such part",))


def test_a_segmenter_that_is_asked_for_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = why_left_out(SHIPPED)
    assert reason is None or "not part of this installation" in reason
    with pytest.raises(InputError, match="unknown name"):
        why_left_out("medlore:no-such-pack")
    assert main(["demo", "--segmenter", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
