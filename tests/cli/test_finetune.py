"""`medlore finetune`, `evaluate` and `predict` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medlore.cli import main
from tiny_backbone import striped, write_backbone


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
    first = ["finetune", "--data", str(place / "data"), "--model", str(place / "vit"), "--shots", "3", "--epochs", "3"]
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


def test_a_finished_run_is_not_replaced_without_a_word(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = words(place, "--out", str(tmp_path / "run"), "--method", "linear-probe", "--json")
    assert main(line) == 0
    first = (tmp_path / "run" / "report.json").read_text()
    capsys.readouterr()
    assert main(line) == 2
    assert "holds a finished run of finetune, which would be replaced" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.json").read_text() == first
    assert main([*line, "--overwrite"]) == 0
    assert (tmp_path / "run" / "report.json").read_text() != first


def test_resume_with_other_settings_does_not_replace_a_finished_run(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(words(place, "--out", str(run), "--method", "linear-probe", "--resume", "--json")) == 2
    assert "holds a finished run of finetune, which would be replaced" in capsys.readouterr().err
    evaluate = ["evaluate", str(run), "--data", str(place / "data"), "--out"]
    assert main([*evaluate, str(run)]) == 2  # neither does another verb
    assert "holds a finished run of finetune" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    scores = tmp_path / "scores"
    assert [main([*evaluate, str(scores), *more]) for more in ([], [], ["--split", "train"], ["--split", "train", "--overwrite"])] == [
        0,
        0,
        2,
        0,
    ]


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
    assert (settings["method"], settings["allocation"]["rank"], settings["training"]["epochs"]) == ("rslora", 2, 3)
    file.write_text("methd: rslora\nepochs: none\n")
    assert main(["finetune", "--settings", str(file), "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "2 faults" in message
    assert "unknown setting; the nearest are method" in message


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


@pytest.mark.full  # every kind of training has its two processes in tests/contracts/test_training_engine.py
def test_two_processes_train_the_weights_of_one(place: Path, tmp_path: Path) -> None:
    line = ["finetune", "--data", str(place / "data"), "--model", str(place / "vit"), "--shots", "4", "--epochs", "3", "--batch-size", "6"]
    line += ["--method", "lora", "--rank", "2", "--no-augment", "--device", "cpu", "--lr", "5e-3"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2"]
    start += ["-m", "medlore"]
    two = subprocess.run([*start, *line, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=240, check=False)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("balanced accuracy") == 1  # one of the two speaks
    assert main([*line, "--out", str(tmp_path / "one")]) == 0
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert any(bool(tensor.any()) for name, tensor in one.items() if "lora_B" in name)
    reports = [json.loads((tmp_path / name / "report.json").read_text())["results"] for name in ("one", "two")]
    losses = [[record["train_loss"] for record in report["history"]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert reports[0]["test"]["metrics"] == reports[1]["test"]["metrics"]


def bad_lines(place: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    return {
        "resume without out": (words(place, "--resume"), "--resume: no output folder"),
        "no data": (["finetune", "--out", str(tmp_path / "o")], "--data: nothing"),
        "method": (words(place, "--out", str(tmp_path / "o"), "--method", "sr-loora"), "'sr-loora'; the nearest of 23 are sr-lora"),
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
        "predict a file": (["predict", __file__, str(place / "data")], "test_finetune.py: a file"),
        "out": (words(place, "--out", __file__), "test_finetune.py: is a file"),
        "idle": (words(place, "--out", str(tmp_path / "o"), "--rank", "4"), "--rank: can have no effect"),
        "mean": (words(place, "--out", str(tmp_path / "o"), "--mean", "0.5,0.5,x", "--std", "1,1,1"), "mean.2: "),
        "data seed": (words(place, "--out", str(tmp_path / "o"), "--data-seed", "-1"), "data_seed: "),
    }


def bad_uses_of_a_run(place: Path, run: Path) -> dict[str, tuple[list[str], str]]:
    image, data = str(next((place / "data" / "test").rglob("*.png"))), str(place / "data")
    return {
        "seed": (["evaluate", str(run), "--data", data, "--seed", "-1"], "seed: "),
        "bootstrap": (["evaluate", str(run), "--data", data, "--bootstrap", "-1"], "bootstrap: "),
        "out is a folder": (["predict", str(run), image, "--out", str(place)], "is a folder"),
        "out below a file": (["predict", str(run), image, "--out", f"{place}/list.txt/x.csv"], "list.txt: is a file"),
        "out is a file": (["evaluate", str(run), "--data", data, "--out", f"{place}/list.txt"], "list.txt: is a file"),
        "challenge": (["predict", str(run), image, "--out", str(place / "x.csv"), "--medfmc", "endo:5"], "a model of 3 classes"),
        "list": (["predict", str(run), str(place / "list.txt"), "--out", str(place / "x.csv")], "1 fault. Accepted"),
    }


@pytest.mark.parametrize("case", ["seed", "bootstrap", "out is a folder", "out below a file", "out is a file", "challenge", "list"])
def test_a_run_that_is_used_wrongly_writes_nothing(place: Path, run: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "list.txt").write_text("absent.png\n")
    before = set(place.rglob("*"))
    line, message = bad_uses_of_a_run(place, run)[case]
    assert main(line) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Accepted: " in printed.err
    assert printed.out == ""
    assert set(place.rglob("*")) == before


@pytest.mark.parametrize(
    "case",
    ["resume without out", "no data", "method", "shots", "model", "rank", "evaluate nothing", "evaluate halves", "evaluate no run",
     "predict no run", "predict a file", "out", "idle", "mean", "data seed"],
)  # fmt: skip
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
