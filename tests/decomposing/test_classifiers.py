"""Decomposition end to end on two tiny tasks: every network, the pack, exact resume, live losses, clear refusals."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medlore.data.images.sampling import TaskBatch
from medlore.decomposing.classifiers import training
from medlore.decomposing.classifiers.study import decompose, plan
from medlore.decomposing.classifiers.tasks import split_by_group
from medlore.errors import CheckpointError, DataError, InputError, StepError, UnknownNameError
from medlore.files import read_json, write_json, write_text
from medlore.inspecting.files import describe
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.routing import route
from medlore.models.classifier_pack import load_classifier_pack
from medlore.ranks import RankPlan
from medlore.runs.hardware import seed_everything
from medlore.training.watching import Progress

SIZE = 32


def write_task(folder: Path, name: str, *, classes: int, seed: int) -> Path:
    """A MedMNIST-like file of blurred blocks: the class is the brightness of one quarter."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, count in (("train", 40), ("val", 16), ("test", 16)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 60, (count, SIZE, SIZE)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: SIZE // 2, : SIZE // 2] += np.uint8(180 * label // max(classes - 1, 1))
        arrays |= {f"{part}_images": images, f"{part}_labels": labels[:, None]}
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / f"{name}.npz"


def write_study(folder: Path, **changes: Any) -> Path:
    tasks = []
    for number, (name, classes) in enumerate((("left", 2), ("right", 3))):
        write_task(folder, name, classes=classes, seed=number)
        tasks.append({"name": name, "data": f"{name}.npz", "train": "train", "validation": "val", "test": "test", "licence": "made here"})
    study: dict[str, Any] = {
        "name": "tiny",
        "image_size": SIZE,
        "tasks": tasks,
        "teacher": {"source": "shufflenet", "steps": 4},
        "ranks": {"rule": "given", "given": {"left": 2, "right": 3}},
        "steps": 4,
        "batch_size": 8,
        "evaluate_every": 2,
        "device": "cpu",
        "weights": "fp32",
    }
    return write_text(folder / "study.yaml", yaml.safe_dump(study | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    decompose(write_study(folder), folder / "out")
    return folder


def test_every_network_has_a_row_for_every_task(finished: Path) -> None:
    report = read_json(finished / "out" / "report.json")
    assert report["state"] == "done"
    rows = report["results"]["table"]
    networks = ["majority", "teacher", "shared", "shared-distilled", "experts", "single"]
    assert [(r["network"], r["task"]) for r in rows] == [(n, t) for n in networks for t in ("left", "right")]
    experts = next(r for r in rows if r["network"] == "experts")
    teacher = next(r for r in rows if r["network"] == "teacher")
    # one merged expert is as large as the plain student, which here is the teacher's own architecture
    assert experts["deployed_parameters"] == teacher["deployed_parameters"]
    assert experts["mega_flops"] == pytest.approx(teacher["mega_flops"])
    assert experts["stored_parameters"] > teacher["stored_parameters"]
    low, value, high = (experts["report"]["metrics"]["balanced_accuracy"][k] for k in ("low", "value", "high"))
    assert low <= value <= high


def test_all_terms_of_the_loss_were_live(finished: Path) -> None:
    history = read_json(finished / "out" / "networks" / "experts" / "history.json")
    for entry in history["losses"]:
        assert min(entry["task"], entry["logit distillation"], entry["feature distillation"]) > 0
    assert "logit distillation" not in read_json(finished / "out" / "networks" / "shared" / "history.json")["losses"][0]


def test_a_merged_expert_answers_like_the_routed_one(finished: Path) -> None:
    pack = load_classifier_pack(finished / "out" / "pack")
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        routed = pack.network(images, [("right", 2)]).logits["right"]
        assert torch.allclose(pack.merged("right")(pixel_values=images).logits, routed, atol=1e-5)
        with route(pack.network.body, "left"):
            assert not torch.allclose(pack.network.heads["right"](pack.network.body(pixel_values=images).logits), routed, atol=1e-5)
    assert {m.ranks["left"] for m in pack.network.modules() if isinstance(m, ExpertLayer)} == {2}
    assert pack.experts["left"].licence == "made here"
    with pytest.raises(UnknownNameError, match="'left'"):
        pack.merged("lef")


def test_each_expert_lies_beside_the_pack_as_a_plan(finished: Path, tmp_path: Path) -> None:
    pack = load_classifier_pack(finished / "out" / "pack")
    for name, entry in pack.experts.items():
        kept = RankPlan.load(finished / "out" / "ranks" / f"{name}.json")
        assert {x.name: x.rank for x in kept.layers} == entry.ranks
        assert {kept.scaling(x) for x in kept.layers} == {2.0}
    (tmp_path / "left.json").write_text((finished / "out" / "ranks" / "left.json").read_text())
    given = write_study(tmp_path, ranks={"rule": "given", "given": {"left": "left.json", "right": 3}})
    planned = plan(given)
    assert planned["ranks"]["left"] == list(pack.experts["left"].ranks.values())
    assert set(planned["ranks"]["right"]) <= {1, 2, 3}


def test_teacher_shared_base_and_experts_are_backbones(finished: Path, tmp_path: Path) -> None:
    """What the transfer compares: each of the three loads as any other backbone does, with the same input."""
    from medlore.decomposing.classifiers.export import export_classifier
    from medlore.models.backbones.reading import load_backbone

    for name in ("base", "left"):
        export_classifier(finished / "out" / "pack", name, "safetensors", tmp_path / name)
    found = {p.name: load_backbone(p, classes=5) for p in (finished / "out" / "teacher", tmp_path / "base", tmp_path / "left")}
    images = torch.randn(2, 3, SIZE, SIZE)
    assert {(b.image_size, b.mean, tuple(b.model(pixel_values=images).logits.shape)) for b in found.values()} == {
        (SIZE, (0.5,) * 3, (2, 5))
    }
    weights = [b.model.conv1.conv.weight for b in found.values()]
    assert not torch.equal(weights[1], weights[2])
    pack = load_classifier_pack(finished / "out" / "pack")
    assert torch.equal(weights[1], pack.network.body.conv1.conv.base_layer.weight)
    with pytest.raises(InputError, match="which has no head"):
        export_classifier(finished / "out" / "pack", "base", "onnx", tmp_path / "onnx")


def test_a_second_run_takes_finished_networks_over(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "out" / "networks").rglob("best.pt")}
    trained: list[str] = []

    def narrate(name: str) -> Progress:
        trained.append(name)
        return lambda _step, _steps, _text: None

    again = decompose(finished / "study.yaml", finished / "out", narrate=narrate)
    assert trained == []
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(again.table) == 12


def test_other_data_under_the_same_name_is_trained_on_anew(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished, tmp_path / "again")
    write_task(tmp_path / "again", "left", classes=2, seed=77)
    trained: list[str] = []

    def narrate(name: str) -> Progress:
        trained.append(name)
        return lambda _step, _steps, _text: None

    decompose(tmp_path / "again" / "study.yaml", tmp_path / "again" / "out", narrate=narrate, variants=["single"])
    assert "single-left" in trained
    assert "single-right" not in trained


def test_what_is_measured_is_what_the_pack_holds() -> None:
    from medlore.decomposing.stored_weights import as_stored

    layer = torch.nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    as_stored(layer, "fp32")
    assert torch.equal(layer.weight, before)
    as_stored(layer, "fp16")
    assert torch.equal(layer.weight, before.half().float())
    assert not torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.bias[0] = 1e5
    with pytest.raises(StepError, match="bias: values beyond 65504"):
        as_stored(layer, "fp16")


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_ends(finished: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, variants=["experts"])

    def stop_at_third_step(name: str) -> Progress:
        def progress(step: int, _steps: int, _text: str) -> None:
            if name == "experts" and step == 3:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        decompose(study, tmp_path / "out", narrate=stop_at_third_step)
    assert read_json(tmp_path / "out" / "report.json")["state"] == "interrupted"
    assert list((tmp_path / "out" / "networks" / "experts").glob("checkpoint-*.pt"))
    seed_everything(99)  # nothing may hang on the global random state
    decompose(study, tmp_path / "out")
    broken = torch.load(tmp_path / "out" / "networks" / "experts" / "best.pt", weights_only=True)
    whole = torch.load(finished / "out" / "networks" / "experts" / "best.pt", weights_only=True)
    assert all(torch.equal(broken[k], whole[k]) for k in whole)


KEEP_EACH_PROCESS = """
import os, sys, torch
import medlore.decomposing.classifiers.study as recipe
train_all = recipe._train_all
def kept(context, teacher):
    rows, experts = train_all(context, teacher)
    torch.save(experts.state_dict(), f"{sys.argv[2]}-{os.environ['RANK']}.pt")
    return rows, experts
recipe._train_all = kept
recipe.decompose(sys.argv[1], sys.argv[2])
"""


@pytest.mark.full  # every kind of training has its two processes in tests/contracts/test_training_engine.py
def test_two_processes_stay_one_network(tmp_path: Path) -> None:
    """Each process sees its own rows: were the gradients of the experts not reduced, the weights of the two would part."""
    study = write_study(tmp_path, variants=["experts"], loss={"beta": 0, "feature": 0}, steps=3, evaluate_every=3)
    script = write_text(tmp_path / "keep.py", KEEP_EACH_PROCESS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29731"]
    done = subprocess.run(
        [*launch, str(script), str(study), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"out-{rank}.pt", weights_only=True) for rank in (0, 1))
    moved = [k for k in first if "lora_B" in k and first[k].abs().max() > 0]
    assert {k.split(".")[-1] for k in moved} == {"left", "right"}
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert load_classifier_pack(tmp_path / "out" / "pack").experts.keys() == {"left", "right"}


def test_other_rules_are_rows_and_the_teacher_answers_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every student sees the same images in a step, so the teacher's answer to it is kept; and kept answers change no weight."""
    asked: list[int] = []
    real = training.Distillation.answers

    def counted(self: training.Distillation, images: torch.Tensor, parts: list[tuple[str, int]], step: int) -> Any:
        asked.extend([step] if self.seen is None or step not in self.seen else [])
        return real(self, images, parts, step)

    monkeypatch.setattr(training.Distillation, "answers", counted)
    study = write_study(tmp_path, variants=["experts", "experts-uniform", "experts-stable-rank"], steps=2, evaluate_every=2)
    table = decompose(study, tmp_path / "out").table
    assert asked == [0, 1]
    assert [row["network"] for row in table[2:]] == ["experts"] * 2 + ["experts-uniform"] * 2 + ["experts-stable-rank"] * 2
    assert len({row["stored_parameters"] for row in table[2:]}) > 1
    kept = torch.load(tmp_path / "out" / "networks" / "experts" / "best.pt", weights_only=True)
    monkeypatch.setattr("medlore.decomposing.classifiers.study._ANSWER_BYTES", 0)
    decompose(write_study(tmp_path, variants=["experts"], steps=2, evaluate_every=2), tmp_path / "again")
    assert asked == [0, 1, 0, 1]
    again = torch.load(tmp_path / "again" / "networks" / "experts" / "best.pt", weights_only=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_weights_of_zero_skip_the_teacher(tmp_path: Path) -> None:
    study = write_study(tmp_path, loss={"beta": 0, "feature": 0}, variants=["experts"], steps=2, evaluate_every=1)
    decompose(study, tmp_path / "out")
    assert not (tmp_path / "out" / "networks" / "teacher").exists()
    assert set(read_json(tmp_path / "out" / "networks" / "experts" / "history.json")["losses"][0]) == {"step", "task"}


def test_dry_run_counts_without_training(tmp_path: Path) -> None:
    found = plan(write_study(tmp_path, ranks={"rule": "task-size", "rank": 4}))
    assert found["tasks"]["right"] == {"classes": ["0", "1", "2"], "kind": "single", "train": 40, "validation": 16, "test": 16}
    assert found["base_parameters"] == 1_253_604
    # two tasks of one size: the mean rank each; ShuffleNetV2 at r = 4 costs 43,308 per task in both layouts (but for the stem's kernel)
    assert set(found["ranks"]["left"]) == {4}
    assert found["expert_parameters"]["left"] == found["expert_parameters"]["right"]
    assert not (tmp_path / "out").exists()


def test_ranks_by_the_stable_rank_of_the_teacher_keep_their_mean(tmp_path: Path) -> None:
    found = plan(write_study(tmp_path, ranks={"rule": "stable-rank", "rank": 6}))
    ranks = found["ranks"]["left"]
    assert len(set(ranks)) > 1
    assert np.mean(ranks) == pytest.approx(6, abs=0.5)


def test_interleaved_layout_costs_what_the_reference_says(tmp_path: Path) -> None:
    """43,308 parameters per task at rank 4 (notes on LoRKD, section 2.2)."""
    found = plan(write_study(tmp_path, ranks={"rule": "uniform", "rank": 4, "layout": "interleaved"}))
    assert found["expert_parameters"] == {"left": 43_308, "right": 43_308}


def test_groups_never_stand_on_both_sides() -> None:
    from medlore.data.images.reading import from_arrays

    images = from_arrays(
        np.zeros((30, 4, 4), np.uint8), np.zeros(30, int), classes=("a",), name="g", groups=[str(i // 3) for i in range(30)]
    )
    part, rest = split_by_group(images, share=0.3, seed=0)
    assert len(part) == 9
    assert not set(part.groups) & set(rest.groups)
    assert split_by_group(images, share=0.3, seed=0)[0].keys == part.keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 5}, r"line \d+, shots: unknown setting"),
        ({"ranks": {"rule": "given", "given": {"left": 2}}}, r"ranks\.given has \['left'\]"),
        ({"ranks": {"rule": "given", "given": {"left": 2, "right": 0}}}, r"line \d+, ranks\.given\.right: .*greater than or equal to 1"),
        ({"teacher": None}, "need a teacher"),
        ({"variants": ["experts-uniform"], "ranks": {"rule": "uniform"}}, "the rule of the pack"),
        ({"teacher": {"source": "resnet-81"}}, "the nearest are 'resnet-18'"),
        ({"steps": 0, "batch_size": 0}, "2 faults"),
        ({"steps": True}, r"line \d+, steps: .*true and false are no numbers.*got True"),
        ({"ranks": {"rule": "given", "given": {"left": True, "right": 2}}}, r"line \d+, ranks\.given\.left: .*valid integer"),
        ({"tasks": [{"name": "../../x", "data": "left.npz"}]}, r"line \d+, tasks\.0\.name: .*names the expert's file.*'\.\./\.\./x'"),
        ({"tasks": [{"name": "a/b", "data": "left.npz"}]}, "letters, digits, blanks"),
        ({"tasks": [{"name": "keys", "data": "left.npz", "train": "train"}], "ranks": {"rank": 2}}, "torch's own words"),
        ({"tasks": [{"name": "left", "dat": "left.npz"}]}, r"line \d+, tasks\.0\.dat: unknown setting; the nearest are data"),
        ({"seed": -1}, r"line \d+, seed: .*greater than or equal to 0, got -1"),
        ({"image_size": 10**6}, r"line \d+, image_size: .*less than or equal to 2048"),
        ({"learning_rate": float("inf")}, r"line \d+, learning_rate: .*finite number, got inf"),
        ({"variants": ["experts", "single", "single"]}, "variants name one twice"),
        ({"student": {"norm": "batch"}, "variants": ["teacher", "experts"]}, "couple the samples"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decompose(write_study(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_reported_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "medlore.decomposing.classifiers.study.train_network",
        lambda *_args, **_more: pytest.fail("trained before the folder was looked at"),
    )
    study = write_study(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        decompose(study, tmp_path / "file")
    with pytest.raises(StepError, match="could not be written"):
        decompose(study, "/proc/no")


def test_all_tasks_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    (tmp_path / "left.npz").unlink()
    (tmp_path / "right.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="2 of 2 cannot be read") as caught:
        decompose(study, tmp_path / "out")
    assert caught.value.faults[0].startswith("left:")
    assert caught.value.faults[1].startswith("right:")


def test_the_trained_weights_stay_where_no_score_is_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path, variants=["experts"], loss={"beta": 0, "feature": 0})
    monkeypatch.setattr(training, "validation_score", lambda *_: math.nan)
    decompose(study, tmp_path / "out")
    assert read_json(tmp_path / "out" / "networks" / "experts" / "history.json")["best_step"] == 4
    weights = torch.load(tmp_path / "out" / "networks" / "experts" / "best.pt", weights_only=True)
    assert any("lora_B" in name and tensor.any() for name, tensor in weights.items())


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_sees_every_task(count: int) -> None:
    parts = [TaskBatch("a", np.arange(5)), TaskBatch("b", np.arange(1)), TaskBatch("c", np.arange(10, 17))]
    shares = [
        training._share_of_process(parts, SimpleNamespace(num_processes=count, process_index=rank))  # type: ignore[arg-type]
        for rank in range(count)
    ]
    assert all({"a", "c"} <= {part.task for part in share} for share in shares)
    sizes = [sum(len(part.indices) for part in share) for share in shares]
    assert sum(sizes) == 13
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        assert sorted(i for share in shares for p in share if p.task == part.task for i in p.indices) == part.indices.tolist()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path, variants=["experts"], loss={"beta": 0, "feature": 0})
    real = training.task_loss
    calls = iter(range(1000))
    monkeypatch.setattr(training, "task_loss", lambda *a: real(*a) * (math.nan if next(calls) >= 5 else 1.0))
    with pytest.raises(StepError, match=r"step 2: the loss is nan"):
        decompose(study, tmp_path / "out")
    assert list((tmp_path / "out" / "networks" / "experts").glob("checkpoint-*.pt"))


def test_a_pack_that_was_touched_is_refused(finished: Path, tmp_path: Path) -> None:
    import shutil

    pack = Path(shutil.copytree(finished / "out" / "pack", tmp_path / "pack"))
    file = pack / "experts" / "left.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    (pack / "experts" / "right.safetensors").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 files"):
        describe(pack)
    with pytest.raises(CheckpointError, match="2 of 3 files") as caught:
        load_classifier_pack(pack)
    assert "altered" in caught.value.faults[0]
    assert "missing" in caught.value.faults[1]


def test_a_pack_of_another_base_is_refused_in_one_report(finished: Path, tmp_path: Path) -> None:
    import shutil

    pack = Path(shutil.copytree(finished / "out" / "pack", tmp_path / "pack"))
    manifest = read_json(pack / "manifest.json")
    manifest["experts"]["left"]["classes"] = ["only"]
    write_json(pack / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        load_classifier_pack(pack)
    assert [f.split(":")[0] for f in caught.value.faults] == ["misshapen", "misshapen"]
    write_json(pack / "manifest.json", {k: v for k, v in manifest.items() if k != "student"} | {"experts": []})
    with pytest.raises(CheckpointError, match="2 fault") as caught:
        load_classifier_pack(pack)
    assert list(caught.value.faults) == ["student: missing", "experts: of a wrong kind"]
    manifest["experts"]["left"] |= {"ranks": {"conv1.conv": "two"}, "kind": "double"}
    wrong = {"student": {"kind": "resnet-81", "depth": 3}, "layout": "chanel", "preprocessing": manifest["preprocessing"] | {"mean": None}}
    write_json(pack / "manifest.json", manifest | wrong)
    for read in (load_classifier_pack, describe):
        with pytest.raises(CheckpointError, match=r"6 fault\(s\)") as caught:
            read(pack)
        places = ["student.depth", "student.kind", "preprocessing.mean", "layout", "experts.left.ranks", "experts.left.kind"]
        assert [fault.split(":")[0] for fault in caught.value.faults] == places
    write_json(pack / "manifest.json", manifest | {"schema": "medlore/expert-pack/0"})
    with pytest.raises(CheckpointError, match="expert-pack/0"):
        load_classifier_pack(pack)
