"""The demo as a user runs it, on the installed package alone: short, then read back from disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medlore.cli import main
from medlore.errors import DataError
from medlore.recipes.comparison import CONTENDERS, run_cell, standings
from medlore.recipes.demo import DemoSettings, digits, print_demo, run_demo
from medlore.recipes.finetune_settings import FinetuneSettings

SHORT = DemoSettings(shots=1, draws=2, epochs=1, test_images=60)


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
    result = run_demo(SHORT, tmp_path / "demo", quiet=True)
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
    assert main(["demo", "--draws", "1", "--shots", "1", "--out", str(blocked)]) == 1
    assert "could not be written" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
