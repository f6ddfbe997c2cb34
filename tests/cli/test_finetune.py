"""`medlore finetune`, `evaluate` and `predict` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.recipes.tiny_backbone import striped, write_backbone

from medlore.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and images in class folders, train and test apart."""
    root = tmp_path_factory.mktemp("place")
    write_backbone(root / "vit")
    for part, seed in (("train", 0), ("test", 1)):
        images = striped(8, seed=seed)
        for item in images.items:
            folder = root / "data" / part / images.classes[item.labels[0]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(item.source)).save(folder / f"{item.key}.png")
    return root


def words(place: Path, *more: str) -> list[str]:
    first = ["finetune", "--data", str(place / "data"), "--model", str(place / "vit"), "--shots", "3", "--epochs", "3", "--scale", "0.3"]
    return [*first, "--batch-size", "6", *more]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    out = place / "run"
    assert main(words(place, "--out", str(out), "--json")) == 0
    return out


def test_finetune_prints_a_table_and_writes_the_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "--out", str(tmp_path / "run"), "--method", "lora", "--rank", "2", "--flip", "horizontal")) == 0
    printed = capsys.readouterr()
    assert "balanced accuracy" in printed.out
    assert "majority answer" in printed.out
    assert "24 test images" in printed.out
    assert "loss" in printed.err  # the bar
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_json_is_one_object_and_nothing_else(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "--out", str(tmp_path / "run"), "--method", "linear-probe", "--json")) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["method"] == "linear-probe"
    assert found["data"]["test"]["images"] == 24
    assert 0 <= found["metrics"]["accuracy"] <= 1


def test_settings_come_from_yaml_and_flags_go_before_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: rslora\nrank: 2\nepochs: 50\n")
    assert main(words(place, "--settings", str(file), "--dry-run", "--json")) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["method"], settings["rank"], settings["epochs"]) == ("rslora", 2, 3)
    file.write_text("methd: rslora\nepochs: none\n")
    assert main(["finetune", "--settings", str(file), "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "2 faults" in message
    assert "methd: unknown setting; the nearest are method" in message


def test_evaluate_and_predict_use_the_run(place: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--data", str(place / "data"), "--split", "test", "--out", str(tmp_path / "e"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stored = json.loads((run / "report.json").read_text())["results"]["test"]
    assert report["metrics"]["accuracy"]["value"] == stored["metrics"]["accuracy"]["value"]
    assert main(["predict", str(run / "adapter"), str(place / "data" / "test"), "--out", str(tmp_path / "p.csv")]) == 0
    assert "24 images" in capsys.readouterr().out
    (tmp_path / "bad.png").write_bytes(b"x")
    good = next((place / "data" / "test").rglob("*.png"))
    line = ["predict", str(run), str(tmp_path / "bad.png"), str(good), "--out", str(tmp_path / "q.csv"), "--json"]
    assert main([*line, "--keep-going"]) == 1
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert main(line) == 2


def bad_lines(place: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    return {
        "no out": (words(place), "--out: nothing"),
        "no data": (["finetune", "--out", str(tmp_path / "o")], "--data: nothing"),
        "method": (words(place, "--out", str(tmp_path / "o"), "--method", "sr-loora"), "method"),
        "shots": (words(place, "--out", str(tmp_path / "o"), "--shots", "99"), "classes have fewer images"),
        "model": (
            ["finetune", "--data", str(place / "data"), "--model", str(tmp_path / "none.pth"), "--out", str(tmp_path / "o")],
            "none.pth",
        ),
        "rank": (words(place, "--out", str(tmp_path / "o"), "--rank", "many"), "rank"),
        "evaluate nothing": (["evaluate"], "no model or no --data"),
        "evaluate halves": (["evaluate", "--pred", str(tmp_path)], "give --pred and --truth"),
        "evaluate no run": (["evaluate", str(tmp_path / "none"), "--data", str(place / "data")], "no such folder"),
        "predict no run": (["predict", str(tmp_path), str(place / "data")], "nothing tuned in it"),
    }


@pytest.mark.parametrize(
    "case",
    ["no out", "no data", "method", "shots", "model", "rank", "evaluate nothing", "evaluate halves", "evaluate no run", "predict no run"],
)
def test_bad_lines_end_with_status_2_and_one_message(place: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, message = bad_lines(place, tmp_path)[case]
    assert main(line) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Accepted: " in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_set_with_other_classes_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cats").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cats" / "a.png")
    assert main(["evaluate", str(run), "--data", str(tmp_path)]) == 2
    assert "cats" in capsys.readouterr().err
