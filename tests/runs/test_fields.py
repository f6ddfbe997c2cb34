"""One field says everything: flat and nested names, validated changes, what decides a result; and nobody goes round it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pydantic
import pytest

from medlore.decomposing.segmenters.settings import DataSettings, SegmentationSettings
from medlore.layers.tuning.methods import METHODS
from medlore.runs.settings import Settings, Subject, found_beside, setting
from medlore.segmenting.settings import SegmentSettings
from medlore.tuning.settings import FinetuneSettings

SOURCE = Path(__file__).resolve().parents[2] / "src" / "medlore"
# A report of a run before settings were nested, as far as it is needed here.
FLAT = {
    "data": None, "format": "auto", "shots": 5, "model": "medlore:vit-mini", "method": "lora", "rank": 4, "mini_loras": 4,
    "prompt_length": 10, "bottleneck": None, "adapter_scale": None, "last_blocks": 2, "epochs": 7, "seed": 3, "flip": "none",
    "device": "cpu", "checkpoints": True,
}  # fmt: skip


def test_names_are_nested_or_flat_and_read_both_ways() -> None:
    flat = FinetuneSettings(epochs=7, shots=5, method="LoRA", rank=4)
    nested = FinetuneSettings(training={"epochs": 7}, parts={"shots": 5}, method="lora", allocation={"rank": 4})
    assert flat == nested
    assert (flat.training.epochs, flat.epochs) == (7, 7)
    assert flat.stated() == {"epochs": 7, "shots": 5, "method": "lora", "rank": 4}
    assert json.loads(flat.model_dump_json())["training"]["epochs"] == 7
    with pytest.raises(AttributeError, match="nothing"):
        _ = flat.nothing


def test_a_report_of_an_earlier_version_is_read() -> None:
    settings = FinetuneSettings.model_validate(FLAT)
    assert settings.flat() | FLAT == settings.flat()


def test_a_change_is_validated() -> None:
    settings = FinetuneSettings(epochs=7)
    changed = settings.changed(shots=3, epochs=2)
    assert (changed.stated(), settings.stated()) == ({"epochs": 2, "shots": 3}, {"epochs": 7})
    with pytest.raises(pydantic.ValidationError):
        settings.changed(epochs=0)
    with pytest.raises(pydantic.ValidationError):
        settings.changed(epoch=1)
    with pytest.raises(pydantic.ValidationError, match="twice"):
        FinetuneSettings(training={"epochs": 1}, epochs=2)


def test_two_settings_of_one_flat_name_are_no_class() -> None:
    class Inner(Subject):
        rate: float = setting(1.0, "Rate.")

    with pytest.raises(TypeError, match="rate"):

        class Outer(Settings):
            rate: float = setting(0.1, "Another rate.")
            inner: Inner = Inner()


def test_what_decides_a_run_is_distinguished() -> None:
    base = SegmentSettings(model="m", out=Path("o"))
    assert base.changed(workers=3, picture=False, memory="1GiB").decisive() == base.decisive()
    for change in ({"overlap": 0.25}, {"published": True}, {"region": "brain"}, {"redraw_tissues": False}):
        assert base.changed(**change).decisive() != base.decisive()
    tuning = FinetuneSettings(epochs=3)
    assert tuning.changed(device="cpu", bootstrap=0, checkpoints=False, track="tensorboard").decisive() == tuning.decisive()
    assert tuning.changed(seed=1).decisive() != tuning.decisive()


def test_what_decides_a_student_does_not_decide_its_teacher() -> None:
    study = SegmentationSettings(name="s", data=(DataSettings(name="d", cases=Path("c.jsonl")),))
    other = study.changed(loss={"distillation": 0.5}, experts={"rank": 8}, student={"steps": 5})
    assert other.decides("teacher") == study.decides("teacher")
    assert other.decides("student") != study.decides("student")
    assert study.changed(experts={"rank": 8}).decides("student") == study.decides("student")
    assert study.changed(experts={"rank": 8}).decides("student", "experts") != study.decides("student", "experts")


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_is_known_in_any_case(method: str) -> None:
    assert FinetuneSettings(method=method.upper()).method == method


def test_a_path_in_a_file_starts_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study" / "teacher").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert found_beside(tmp_path / "study", "teacher", where="x") == str(tmp_path / "study" / "teacher")
    assert found_beside(tmp_path / "study", "google/vit", where="x") == "google/vit"
    assert found_beside(tmp_path / "study", "medlore:vit-mini", where="x") == "medlore:vit-mini"
    with pytest.raises(Exception, match="write \\.\\./elsewhere"):
        found_beside(tmp_path / "study", "elsewhere", where="x")


def calls_in(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def test_no_change_of_settings_goes_round_their_validation() -> None:
    ways = ("model_copy", "model_construct")
    found = [path for path in SOURCE.rglob("*.py") for call in calls_in(path) if getattr(call.func, "attr", "") in ways]
    assert not found


def test_the_library_never_prints() -> None:
    """Everything that prints lives in `commands` and `cli`."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        if path.is_relative_to(SOURCE / "commands") or path.name == "cli.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
            imported = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if name in ("print", "sys.stdout", "sys.stderr", "Console", "typer.echo") or imported.split(".")[0] in ("rich", "typer"):
                wrong.append(f"{path.relative_to(SOURCE)}, line {node.lineno}: {name or imported}")
    assert not wrong
