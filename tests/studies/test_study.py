"""A study: its grid, what is kept, what fails, what chooses, what it counts."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medlore.data.images.imageset import ImageSet
from medlore.errors import DataError, InputError, UnknownNameError
from medlore.runs.settings_file import read_settings
from medlore.studies import worker
from medlore.studies.cells import cells_of, chosen_cells, contenders_of
from medlore.studies.faults import read_study
from medlore.studies.records import append_record, read_records
from medlore.studies.run import run_study
from medlore.studies.settings import StudySettings
from medlore.studies.table import means_over_sets, tables_of
from medlore.studies.worker import work_on
from tiny_backbone import striped, two_labels, write_backbone

STUDIES = Path(__file__).resolve().parents[2] / "studies"
SHIPPED = ("quick", "shared-data", "medfmc", "vtab1k", "medmnist")

TEXT = """\
name: tiny
data:
  - {name: stripes, data: stripes.npz, test_fraction: 0.5}
shots: [2]
draws: 2
methods:
  - sr-lora
  - linear-probe
settings: {model: MODEL, image_size: 16, epochs: 1, device: cpu, precision: fp32, augment: false}
"""


def save_images(path: Path, images: ImageSet) -> None:
    np.savez(path, images=np.stack([item.source for item in images.items]), labels=np.array(images.targets()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_backbone(folder / "model")
    save_images(folder / "stripes.npz", striped(10))
    save_images(folder / "labels.npz", two_labels())
    return folder


def write_study(place: Path, text: str = TEXT, name: str = "study") -> Path:
    path = place / f"{name}.yaml"
    path.write_text(text.replace("MODEL", str(place / "model")), encoding="utf-8")
    return path


def settings_of(**changes: Any) -> StudySettings:
    given = {"name": "s", "data": [{"name": "a", "data": "a.npz"}], "shots": [1], "methods": ["sr-lora"]} | changes
    return StudySettings.model_validate(given)


def test_a_grid_is_every_combination_once_and_draw_by_draw() -> None:
    study = settings_of(
        data=[{"name": "a", "data": "a.npz"}, {"name": "b", "data": "b.npz"}],
        shots=[1, "all"],
        draws=3,
        seeds=[0, 7],
        methods=[{"method": "lora", "grid": {"rank": [2, 4]}}, "full"],
    )
    cells = cells_of(study)
    assert len(cells) == 2 * 2 * 3 * 2 * 3
    assert len({cell.fingerprint for cell in cells}) == len(cells)
    assert [cell.draw for cell in cells] == sorted(cell.draw for cell in cells)
    assert [cell.method for cell in cells[:3]] == ["lora rank=2", "lora rank=4", "full"]
    assert cells[0].settings["rank"] == 2
    assert {cell.settings["seed"] for cell in cells if cell.seed == 7 and cell.draw == 3} == {7003}


def test_shots_and_methods_lay_their_settings_over_those_of_the_study() -> None:
    study = settings_of(
        shots=[1, 5],
        settings={"epochs": 8, "batch_size": 2},
        shots_settings={5: {"epochs": 3}},
        methods=["full", {"method": "lora", "settings": {"batch_size": 16}}],
        draws=1,
    )
    found = {(cell.shots, cell.method): (cell.settings["epochs"], cell.settings["batch_size"]) for cell in cells_of(study)}
    assert found == {(1, "full"): (8, 2), (1, "lora"): (8, 16), (5, "full"): (3, 2), (5, "lora"): (3, 16)}


def test_one_rank_of_equal_parameters_is_added_once_and_only_where_it_is_missing() -> None:
    names = [each.name for each in contenders_of(settings_of(methods=["sr-lora", "full"]))]
    assert names == ["sr-lora", "lora equal", "full"]
    scaled = {"method": "sr-lora", "grid": {"scale": [0.5, 1.0]}}
    added = [each for each in contenders_of(settings_of(methods=[scaled])) if each.control_of]
    assert [dict(each.changes) for each in added] == [{"scale": 0.5, "rank": "equal"}, {"scale": 1.0, "rank": "equal"}]
    own = {"method": "lora", "name": "mine", "settings": {"rank": "equal"}}
    assert [each.name for each in contenders_of(settings_of(methods=["sr-lora", own]))] == ["sr-lora", "mine"]
    assert len(contenders_of(settings_of(equal_controls=False))) == 1


def test_every_method_tries_the_same_number_of_settings() -> None:
    study = settings_of(methods=["full", "linear-probe"], tuning={"rate_factors": [1, 0.3, 3]}, draws=1)
    assert [[round(rate, 8) for rate in cell.rates] for cell in cells_of(study)] == [[5e-6, 1.5e-6, 1.5e-5], [5e-4, 1.5e-4, 1.5e-3]]
    assert {len(cell.rates) for cell in cells_of(study, trials=2)} == {2}
    published = settings_of(methods=["full", "linear-probe"], tuning={"rate_factors": [1, 0.3, 3]}, draws=1, settings={"start": "random"})
    assert [[round(rate, 6) for rate in cell.rates] for cell in cells_of(published)] == [[1e-4, 3e-5, 3e-4], [1e-2, 3e-3, 3e-2]]


def test_only_names_cells() -> None:
    cells = cells_of(settings_of(shots=[1, 5], draws=2, methods=["sr-lora", "full"]))
    assert {(c.shots, c.method) for c in chosen_cells(cells, ["shots=5", "method=full,lora equal"])} == {(5, "full"), (5, "lora equal")}
    with pytest.raises(UnknownNameError, match="ful"):
        chosen_cells(cells, ["method=ful"])
    with pytest.raises(UnknownNameError, match="methd"):
        chosen_cells(cells, ["methd=full"])
    with pytest.raises(InputError, match="NAME=VALUE"):
        chosen_cells(cells, ["full"])


def test_a_study_runs_is_resumed_and_one_cell_runs_again_alone(place: Path, tmp_path: Path) -> None:
    study = write_study(place)
    found = run_study(study, tmp_path, workers=0)
    assert found.results["cells"] == {"all": 6, "done": 6, "failed": 0, "missing": 0}
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 6
    equal, ours = ({r["method"]: r for r in map(json.loads, lines)}[name] for name in ("lora equal", "sr-lora"))
    assert equal["test_sha256"] == ours["test_sha256"]
    with (tmp_path / "cells.csv").open() as stream:
        assert [float(row["score"]) for row in csv.DictReader(stream)] == [json.loads(line)["score"] for line in lines]
    page = found.page.read_text()
    assert "lora equal" in page
    assert "majority class" in page
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["results"]["tables"][0]["rows"][1]["method"] == "lora equal"
    assert (tmp_path / "plan.json").is_file()

    with pytest.raises(InputError, match="--resume"):
        run_study(study, tmp_path, workers=0)
    run_study(study, tmp_path, workers=0, resume=True)
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines  # nothing ran
    run_study(study, tmp_path, workers=0, only=["method=linear-probe", "draw=2"])
    again = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(again) == 7
    first, last = (json.loads(lines[-1]), json.loads(again[-1]))
    assert (first["fingerprint"], first["score"]) == (last["fingerprint"], last["score"])


def test_the_probe_stands_beside_a_study_that_does_not_name_it(place: Path, tmp_path: Path) -> None:
    text = (
        TEXT.replace("  - linear-probe\n", "").replace("  - sr-lora", "  - {method: bitfit, rate: 0.01}").replace("epochs: 1", "steps: 40")
    )
    found = run_study(write_study(place, text, "alone"), tmp_path / "alone", workers=0)
    records = [json.loads(line) for line in (tmp_path / "alone" / "cells.jsonl").read_text().splitlines()]
    both = run_study(write_study(place, name="both"), tmp_path / "both", workers=0)
    solved = [r for r in map(json.loads, (tmp_path / "both" / "cells.jsonl").read_text().splitlines()) if r["method"] == "linear-probe"]
    assert [r["probe"] for r in records] == [r["score"] for r in solved]  # of the same draws
    assert all(r["probe"] == r["score"] for r in solved)
    over = found.results["tables"][0]["rows"][0]["over_probe"]
    assert over["mean"] == pytest.approx(np.mean([r["score"] - r["probe"] for r in records]))
    assert "against its probe" in found.results["verdict"]
    assert "it minus its probe" in (tmp_path / "alone" / "tables.md").read_text()
    assert "it minus its probe" in found.page.read_text()
    assert both.results["tables"][0]["rows"][-1]["over_probe"]["mean"] == 0


def test_a_cell_that_fails_costs_no_other_and_runs_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(place)
    real = worker.finetune

    def out_of_memory(settings: Any, *args: Any, **parts: Any) -> Any:
        if settings.method == "lora" and settings.seed == 1:
            raise MemoryError("no room")
        return real(settings, *args, **parts)

    monkeypatch.setattr(worker, "finetune", out_of_memory)
    found = run_study(study, tmp_path, workers=0)
    assert found.failed == 1
    assert found.results["failed"] == [
        {"data": "stripes", "shots": 2, "draw": 1, "method": "lora equal", "seed": 0, "reason": "MemoryError: no room"}
    ]
    assert "MemoryError: no room" in found.page.read_text()
    differences = {row["method"]: row["difference"]["draws"] for row in found.results["tables"][0]["rows"] if row["difference"]}
    assert differences == {"lora equal": 1, "linear-probe": 2}
    monkeypatch.undo()
    assert run_study(study, tmp_path, workers=0, resume=True).failed == 0
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 7


def test_a_cell_names_its_broken_images_before_it_trains(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(tmp_path / "set" / part / name / f"{i}.png")
    (tmp_path / "set" / "test" / "a" / "2.png").write_bytes(b"\x89PNG")
    (tmp_path / "set" / "test" / "b" / "5.png").write_text("no image")
    monkeypatch.setattr(worker, "finetune", lambda *_args, **_parts: pytest.fail("it was trained"))
    study = read_settings(StudySettings, write_study(place))
    cells = cells_of(study.changed(data=(study.data[0].changed(data="set"),)))
    found = work_on(cells[0], str(tmp_path), 0)
    assert found["state"] == "failed"
    assert all(f"set/test/{name}" in found["reason"] for name in ("a/2.png", "b/5.png"))


def test_tuning_never_sees_the_test_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(
        write_study(
            place,
            TEXT.replace("augment: false", "augment: false, start: random, features: own") + "tuning: {rate_factors: [1, 0.001, 10]}\n",
        )
    )
    cell = next(cell for cell in cells_of(study) if cell.method == "sr-lora")
    seen, judged = [], []
    real, real_judge = worker.finetune, worker.judge

    def watched(settings: Any, **parts: Any) -> Any:
        seen.append((settings.learning_rate, parts["test"], len(parts["train"])))
        return real(settings, **parts)

    def looked(model: Any, *args: Any, **how: Any) -> Any:
        judged.append(len(seen))
        return real_judge(model, *args, **how)

    monkeypatch.setattr(worker, "finetune", watched)
    monkeypatch.setattr(worker, "judge", looked)
    monkeypatch.setattr(worker, "best_validation", lambda result: {0.001: 0.4, 1e-6: 0.9}.get(seen[-1][0], 0.5))
    record = work_on(cell, str(place), 0)
    assert record["state"] == "done", record
    assert [rate for rate, _, _ in seen] == [pytest.approx(1e-3), pytest.approx(1e-6), pytest.approx(1e-2)]
    assert [test for _, test, _ in seen] == [None] * 3
    assert judged == [3]  # once, after all trials
    assert record["learning_rate"] == pytest.approx(1e-6)


def test_the_chosen_network_is_judged_as_a_tuning_run_would(place: Path) -> None:
    """The network that the trials chose is the one a run of its own at that rate would have given."""
    study = read_study(
        write_study(
            place, TEXT.replace("augment: false", "augment: false, start: random, features: own") + "tuning: {rate_factors: [1, 300]}\n"
        )
    )
    cell = next(cell for cell in cells_of(study) if cell.method == "sr-lora")
    record = work_on(cell, str(place), 0)
    parts = worker.parts_of(cell.entry, cell.rules, str(place), shots=cell.shots, draw=cell.draw)
    scores = {}
    for rate in cell.rates:
        settings = worker.FinetuneSettings.model_validate({**cell.settings, "learning_rate": rate})
        scores[rate] = worker.finetune(settings, train=parts.train, validation=parts.validation, test=parts.test).metrics
    assert record["metrics"] == scores[record["learning_rate"]]
    assert len({str(metrics) for metrics in scores.values()}) == 2  # or the comparison would say nothing


def test_the_first_of_equal_trials_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1e-3: 0.35, 3e-3: 0.35000000000000003, 1e-2: None}
    monkeypatch.setattr(worker, "_trial", lambda settings, parts, rate: worker.Trial(rate, scores[rate], 1.0, None))
    best, trials = worker.tried_on_validation(None, None, list(scores))
    assert (best.rate, [trial["validation"] for trial in trials]) == (1e-3, list(scores.values()))
    assert worker.tried_on_validation(None, None, [1e-2, 3e-3])[0].rate == 3e-3


def test_without_validation_all_training_images_train(place: Path) -> None:
    study = read_study(write_study(place, TEXT + "validation_shots: none\n"))
    cell = cells_of(study)[0]
    record = work_on(cell, str(place), 0)
    parts = worker.parts_of(cell.entry, cell.rules, str(place), shots=cell.shots, draw=cell.draw)
    assert parts.validation is None
    best, _ = worker.tried_on_validation(worker.FinetuneSettings.model_validate(cell.settings), parts, cell.rates)
    assert best.result.report["data"]["train"]["images"] == len(parts.train) == record["images"]["train"]
    assert (record["validation"], record["trials"][0]["validation"]) == (None, None)


def made(method: str, draw: int, score: float | None, *, seed: int = 0, data: str = "a", state: str = "done") -> dict[str, Any]:
    return {
        "data": data, "shots": 5, "draw": draw, "seed": seed, "method": method, "state": state, "measure": "accuracy", "score": score,
        "majority": 0.25, "images": {"test": 40}, "trained_parameters": 10, "factor_parameters": None,
        "training_seconds": float(draw), "peak_memory_bytes": draw * 100,
    }  # fmt: skip


def test_table_numbers_in_closed_form() -> None:
    records = [made("x", d, s) for d, s in ((1, 0.6), (2, 0.8), (3, 0.7))] + [made("y", d, s) for d, s in ((1, 0.5), (2, 0.8), (4, 0.9))]
    (table,) = tables_of(records, methods=["x", "y"], reference="x")
    x, y = table.rows
    assert x.score.mean == pytest.approx(0.7)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert (x.score.low, x.score.high) == (pytest.approx(0.7 - half), pytest.approx(0.7 + half))
    assert x.difference is None
    assert y.difference is not None
    assert (y.difference.mean, y.difference.draws) == (pytest.approx(0.05), 2)  # draws 1 and 2 alone
    assert y.difference.high == pytest.approx(0.05 + 12.706204736432095 * 0.05, rel=1e-6)
    assert y.wins == (1, 1, 0)
    assert (x.seconds, x.peak_memory_bytes, table.majority) == (2.0, 300, 0.25)


def test_seeds_of_a_draw_count_as_one() -> None:
    records = [
        made("x", 1, 0.2),
        made("x", 1, 0.4, seed=1),
        made("x", 2, 0.5),
        made("x", 2, None, seed=1),
        made("x", 3, None, state="failed"),
    ]
    (table,) = tables_of(records, methods=["x"], reference="x")
    assert (table.rows[0].score.mean, table.rows[0].score.draws) == (pytest.approx(0.4), 2)


def test_both_means_of_vtab() -> None:
    scores = {"a": 0.2, "b": 0.4, "c": 0.9}
    tables = tables_of([made("x", 1, s, data=d) for d, s in scores.items()] + [made("y", 1, 0.5)], methods=["x", "y"], reference="x")
    (mean,) = means_over_sets(tables, {"a": "natural", "b": "natural", "c": "structured"}, ["x", "y"])
    assert (mean["method"], mean["mean_of_sets"], mean["mean_of_groups"]) == ("x", pytest.approx(0.5), pytest.approx(0.6))
    assert means_over_sets(tables, {"a": None}, ["x"])[0]["mean_of_groups"] is None


def assert_reported(study: Path, *parts: str, match: str | None = None) -> None:
    """A study is refused with one list of faults that holds all of these parts."""
    with pytest.raises(InputError, match=match) as caught:
        read_study(study)
    message = "\n".join(caught.value.faults)
    for part in parts:
        assert part in message


def test_faults_of_words_come_at_once_with_their_lines(place: Path) -> None:
    text = TEXT.replace("shots: [2]", "shotss: [2]").replace("  - linear-probe", "  - linear-prob").replace("epochs: 1", "epoch: 1")
    assert_reported(
        write_study(place, text, "words"),
        "line 4, shotss: unknown",
        "line 8, methods.1.method: no such method; the nearest are linear-probe",
        "line 9, settings.epoch: unknown setting; the nearest are epochs",
        match="4 faults",
    )


def test_impossible_cells_come_at_once_with_their_lines(place: Path) -> None:
    text = TEXT.replace("shots: [2]", "shots: [2, 90]").replace("    test_fraction", "test_fraction")
    text = text.replace("shots: [2, 90]", "  - {name: many, data: labels.npz, task: multi}\n  - {name: gone, data: no.npz}\nshots: [2, 90]")
    assert_reported(
        write_study(place, text + "measure: balanced_accuracy\nreference: lora equl\n", "impossible"),
        "line 3, data.0 (stripes), 90 shots",
        "line 5, data.2 (gone)",
        "line 12, measure: balanced_accuracy",
        "line 13, reference",
        "nearest are lora equal",
    )


def test_settings_that_belong_elsewhere_or_do_nothing_are_faults(place: Path) -> None:
    text = TEXT.replace(
        "  - linear-probe", "  - {method: linear-probe, settings: {rank: 4, seed: 1}}\n  - {method: full, grid: {epochs: [0]}}"
    )
    assert_reported(
        write_study(place, text, "elsewhere"),
        "line 8, methods.1.settings.seed: the study decides it",
        "line 8, methods.1.settings.rank: can have no",
        "line 9, methods.2",
        match="3 faults",
    )


def test_nothing_may_choose_without_validation_images(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_study(write_study(place, TEXT + "validation_shots: none\ntuning: {rate_factors: [1, 3]}\n", "blind"))
    assert any("line 11, tuning" in fault for fault in caught.value.faults)


def test_a_line_that_was_cut_off_is_run_again_and_harms_no_other(tmp_path: Path) -> None:
    append_record(tmp_path, {"fingerprint": "a", "score": 1})
    with (tmp_path / "cells.jsonl").open("a") as stream:
        stream.write('{"fingerprint": "b", "sco')
    assert set(read_records(tmp_path)) == {"a"}
    append_record(tmp_path, {"fingerprint": "c", "score": 3})
    assert set(read_records(tmp_path)) == {"a", "c"}
    append_record(tmp_path, {"fingerprint": "a", "score": 2})
    assert read_records(tmp_path)["a"]["score"] == 2
    (tmp_path / "cells.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1"):
        read_records(tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_have_a_head_and_can_be_expanded(name: str) -> None:
    text = (STUDIES / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("Paper:", "Command:", "Run time:", "Expected:"):
        assert any(line.startswith(f"# {word}") for line in head), f"{name}.yaml does not say {word}"
    assert f"medlore study studies/{name}.yaml" in "\n".join(head)
    study = read_settings(StudySettings, STUDIES / f"{name}.yaml")
    assert study.name == name
    assert len({cell.fingerprint for cell in cells_of(study)}) == len(cells_of(study))
    assert study.reference is None or study.reference in [each.name for each in contenders_of(study)]


def test_quick_study_has_no_fault() -> None:
    assert read_study(STUDIES / "quick.yaml").name == "quick"


@pytest.mark.full
def test_two_ray_workers(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found = run_study(write_study(place), tmp_path, engine="ray", workers=2)
    assert found.results["cells"]["done"] == 6
    processes = {json.loads(line)["process"] for line in (tmp_path / "cells.jsonl").read_text().splitlines()}
    assert len(processes) == 2
