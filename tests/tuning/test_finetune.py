"""Whole tuning runs on real (small) networks and images: outputs, selection, resuming after a kill, evaluation, prediction."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medlore.commands.screens.progress import ProgressBar
from medlore.data.images.imageset import ImageSet
from medlore.data.images.reading import read_images
from medlore.data.images.splits import SplitRules, hold_out, read_splits, split_images
from medlore.data.images.transforms import Preprocessing
from medlore.errors import CheckpointError, DataError, InputError, MedloreError, StepError
from medlore.files import read_json
from medlore.runs.settings_file import check_settings
from medlore.training.watching import Watchers
from medlore.tuning.evaluate import EvaluateSettings, evaluate
from medlore.tuning.examples import image_examples
from medlore.tuning.finetune import FinetuneSettings, dry_run, finetune
from medlore.tuning.predict import PredictSettings, predict, write_medfmc
from medlore.tuning.tuned import load_tuned
from tiny_backbone import striped, two_labels, write_backbone

# As published: a random start, one rate, epochs, validation images that are not trained on; test_recipe.py has the other way.
PUBLISHED: dict[str, Any] = {"start": "random", "features": "own", "refit": False}
FAST: dict[str, Any] = {
    **PUBLISHED,
    "validation_shots": 4,
    "epochs": 4,
    "batch_size": 6,
    "bootstrap": 50,
    "shots": 4,
    "degrees": 0.0,
    "crop": (0.9, 1.0),
}
SR_LORA = {**FAST, "scale": 0.3}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "vit")


@pytest.fixture(scope="module")
def run(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One complete run of sr-lora, for all tests that only look."""
    out = tmp_path_factory.mktemp("run") / "out"
    settings = FinetuneSettings(**{**SR_LORA, "epochs": 12}, model=str(backbone), learning_rate=5e-3, track_stable_rank=True)
    return out, finetune(settings, out, train=striped())


def save_npz(path: Path, images: ImageSet) -> Path:
    pixels = np.stack([item.source for item in images.items])
    labels = images.targets().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    cut = len(order) * 2 // 3
    parts = {"train": order[:cut], "test": order[cut:]}
    arrays = {f"{n}_{kind}": v[i] for n, i in parts.items() for kind, v in (("images", pixels), ("labels", labels))}
    np.savez(path, **arrays)
    return path


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_everything_it_promises(run: tuple[Path, Any]) -> None:
    out, result = run
    assert {p.name for p in out.iterdir()} == {"adapter", "report.json", "predictions.csv", "curves.png", "plan.json", "stable_ranks.png"}
    report = read_json(out / "report.json")
    assert report["state"] == "done"
    assert report["results"]["test"]["metrics"]["accuracy"]["value"] == result.metrics["accuracy"]
    assert report["results"]["data"]["train"]["images"] == 12
    assert report["results"]["data"]["validation"]["counts"] == {"rows": 4, "columns": 4, "diagonal": 4}
    assert report["results"]["backbone"]["statistics_from"].startswith("published")
    assert any("held out" in note for note in report["results"]["notes"])
    assert report["results"]["trainable_parameters"] == report["results"]["factor_parameters"] + report["results"]["head_parameters"]
    with Image.open(out / "curves.png") as plot:
        assert plot.size == (1050, 600)


def test_tuning_learns_something(run: tuple[Path, Any]) -> None:
    _, result = run
    assert result.metrics["balanced_accuracy"] > 0.6
    assert result.history.epochs[-1]["train_loss"] < result.history.epochs[0]["train_loss"]


def folder_of_images(place: Path, *, broken: tuple[str, ...]) -> Path:
    """Five images of each of two classes in `train` and in `test`, some of them cut off."""
    noise = np.random.default_rng(5)
    for part in ("train", "test"):
        for name in ("dark", "light"):
            (place / part / name).mkdir(parents=True)
            for i in range(5):
                pixels = noise.integers(0, 128, (16, 16, 3), np.uint8) + np.uint8(128 * (name == "light"))
                Image.fromarray(pixels).save(place / part / name / f"{i}.png")
    for name in broken:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: len(content) // 2])
    return place


BROKEN = ("train/dark/0.png", "test/dark/3.png", "test/light/4.png")


def test_broken_images_of_all_parts_are_named_before_anything_is_trained(backbone: Path, tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "data", broken=BROKEN)
    with pytest.raises(DataError, match="3 of 20 cannot be read") as caught:
        finetune(FinetuneSettings(model=str(backbone), method="linear-probe", data=data, epochs=1), tmp_path / "out")
    assert sorted(fault.partition(": ")[0] for fault in caught.value.faults) == sorted(str(data / name) for name in BROKEN)


def test_broken_images_are_named_at_once_where_they_are_read_batch_by_batch(tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "data", broken=BROKEN)
    with pytest.raises(DataError) as caught:
        image_examples(read_images(data, split="test"), Preprocessing(16), cache_bytes=0)
    assert len(caught.value.faults) == 2


def test_predictions_are_those_of_the_report(run: tuple[Path, Any]) -> None:
    out, result = run
    rows = rows_of(out / "predictions.csv")
    assert len(rows) == len(result.targets)
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert right == pytest.approx(result.metrics["accuracy"])
    scores = np.array([[float(row[c]) for c in ("rows", "columns", "diagonal")] for row in rows])
    assert np.allclose(scores, result.scores, atol=1e-7)
    assert np.allclose(scores.sum(1), 1, atol=1e-6)


def test_the_adapter_gives_the_run_s_output_in_plain_peft_and_through_our_door(run: tuple[Path, Any], backbone: Path) -> None:
    import peft
    import transformers

    out, result = run
    x = torch.randn(4, 3, 16, 16)
    base = transformers.AutoModelForImageClassification.from_pretrained(backbone, num_labels=3, ignore_mismatched_sizes=True)
    with torch.inference_mode():
        expected = result.model(pixel_values=x).logits
        plain = peft.PeftModel.from_pretrained(base, str(out / "adapter")).eval()
        assert torch.allclose(plain(pixel_values=x).logits, expected, atol=1e-5)
        assert torch.allclose(load_tuned(out).model(pixel_values=x).logits, expected, atol=1e-5)


def test_stable_ranks_are_followed(run: tuple[Path, Any]) -> None:
    out, result = run
    epochs = read_json(out / "report.json")["results"]["history"]
    first = next(iter(result.plan.layers))
    before = result.report["stable_rank"][first.name]
    assert before == pytest.approx(first.stable_rank, rel=1e-6)
    weight = result.model.get_submodule(first.name).weight.detach()
    values = torch.linalg.svdvals(weight.double())
    last = epochs[result.history.best_epoch - 1]["stable_rank_sum"][first.name]
    assert last == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=1e-4)
    assert 1 <= epochs[-1]["stable_rank_update"][first.name] <= first.rank


BARE = {"epochs": 4, "batch_size": 6, "bootstrap": 50, "shots": 4}
OTHER: dict[str, dict[str, Any]] = {"linear-probe": BARE, "partial": {**FAST, "last_blocks": 1}, "full": FAST}


@pytest.mark.parametrize("method", list(OTHER))
def test_other_forms_come_back_from_disk(method: Any, backbone: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**OTHER[method], model=str(backbone), method=method)
    result = finetune(settings, tmp_path / "out", train=striped())
    x = torch.randn(4, 3, 16, 16)
    loaded = load_tuned(tmp_path / "out")
    with torch.inference_mode():
        assert torch.allclose(loaded.model(pixel_values=x).logits, result.model(pixel_values=x).logits, atol=1e-6)
    assert loaded.card.form == ("model" if method == "full" else "weights")


def test_nothing_is_written_without_a_folder(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = split_images(striped(), SplitRules(shots=4))
    result = finetune(
        FinetuneSettings(epochs=2, bootstrap=0, model=str(backbone), method="linear-probe"),
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
    )
    assert list(tmp_path.iterdir()) == []
    assert result.scores is not None
    assert result.folder is None


def test_the_same_seed_gives_the_same_bits(backbone: Path) -> None:
    settings = FinetuneSettings(**SR_LORA, model=str(backbone), partial_update="nested")
    first, again = (finetune(settings, train=striped()) for _ in range(2))
    other = finetune(settings.changed(seed=1), train=striped())
    assert first.scores is not None
    assert np.array_equal(first.scores, again.scores)
    assert not np.array_equal(first.scores, other.scores)


def test_test_labels_change_nothing_but_the_report(backbone: Path) -> None:
    parts = split_images(striped(), SplitRules(shots=4))
    assert parts.test is not None
    settings = FinetuneSettings(**{**SR_LORA, "shots": None, "validation_shots": None}, model=str(backbone))
    honest = finetune(settings, train=parts.train, validation=parts.validation, test=parts.test)
    shuffled = parts.test.subset(range(len(parts.test)))
    wrong = [type(i)(i.key, i.source, ((i.labels[0] + 1) % 3,), i.group) for i in shuffled.items]
    lied = finetune(
        settings,
        train=parts.train,
        validation=parts.validation,
        test=type(shuffled)(shuffled.name, shuffled.classes, shuffled.task, tuple(wrong), shuffled.source),
    )
    assert np.array_equal(honest.scores, lied.scores)  # type: ignore[arg-type]
    assert honest.history.best_epoch == lied.history.best_epoch
    assert honest.metrics["accuracy"] != lied.metrics["accuracy"]


def test_multi_label_runs_select_by_auc(backbone: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**FAST, "epochs": 8}, model=str(backbone), method="rslora", rank=2, learning_rate=3e-3)
    result = finetune(settings, tmp_path, train=two_labels())
    assert result.report["selection"] == "macro_auc"
    assert result.metrics["macro_auc"] is not None
    rows = rows_of(tmp_path / "predictions.csv")
    assert {r["label"] for r in rows} <= {"", "bright", "columns", "bright|columns"}
    assert result.scores is not None
    assert not np.allclose(result.scores.sum(1), 1, atol=1e-2)


def test_equal_rank_has_about_the_parameters_of_the_stable_ranks(backbone: Path) -> None:
    ours = finetune(FinetuneSettings(**{**SR_LORA, "epochs": 1}, model=str(backbone)), train=striped())
    equal = finetune(FinetuneSettings(**{**SR_LORA, "epochs": 1, "rank": "equal"}, model=str(backbone), method="lora"), train=striped())
    assert ours.plan is not None
    assert equal.plan is not None
    one = sum(sum(layer.shape) for layer in equal.plan.layers)
    assert abs(ours.plan.parameters - equal.plan.parameters) <= one / 2 + 1
    assert len({layer.rank for layer in equal.plan.layers}) == 1


def test_a_plan_file_is_used_and_one_for_other_weights_refused(run: tuple[Path, Any], backbone: Path, tmp_path: Path) -> None:
    out, result = run
    settings = FinetuneSettings(**{**FAST, "epochs": 1}, model=str(backbone), plan=out / "plan.json")
    assert finetune(settings, train=striped()).plan == result.plan
    stranger = write_backbone(tmp_path / "stranger", seed=9)
    with pytest.raises(MedloreError, match="hold other weights"):
        finetune(settings.changed(model=str(stranger)), train=striped())


KILLED = """
import sys
from pathlib import Path
from medlore.tuning.finetune import FinetuneSettings, finetune
from tiny_backbone import striped
settings = FinetuneSettings.model_validate_json(sys.argv[1])
finetune(settings, Path(sys.argv[2]), train=striped())
"""


def test_a_killed_run_resumes_to_the_same_bits(backbone: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(**{**SR_LORA, "epochs": 40}, model=str(backbone), partial_update="nested", dropout=0.1)
    out, root = tmp_path / "killed", Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "tests")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    child = subprocess.Popen([sys.executable, "-c", KILLED, settings.model_dump_json(), str(out)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (out / "checkpoint.pt").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    _, message = child.communicate()
    assert child.returncode == -signal.SIGKILL, message
    assert not (out / "adapter").exists()
    resumed = finetune(settings, out, train=striped(), resume=True)
    whole = finetune(settings, train=striped())
    assert np.array_equal(resumed.scores, whole.scores)  # type: ignore[arg-type]
    assert resumed.history == whole.history
    assert not (out / "checkpoint.pt").exists()
    assert read_json(out / "report.json")["state"] == "done"


# ---- evaluate and predict -------------------------------------------------------------------------------------------------


def test_evaluate_finds_the_numbers_of_the_run(run: tuple[Path, Any], backbone: Path, tmp_path: Path) -> None:
    data = save_npz(tmp_path / "stripes.npz", striped())
    settings = FinetuneSettings(**{**SR_LORA, "epochs": 2}, model=str(backbone), data=data, classes=("rows", "columns", "diagonal"))
    tuned = finetune(settings, tmp_path / "run")
    found = evaluate(EvaluateSettings(tuned=tmp_path / "run", data=data, split="test", bootstrap=50), tmp_path / "evaluated")
    assert found.report["metrics"]["accuracy"]["value"] == tuned.metrics["accuracy"]
    assert read_json(tmp_path / "evaluated" / "report.json")["results"]["test"]["items"] == 20
    assert (tmp_path / "evaluated" / "predictions.csv").read_bytes() == (tmp_path / "run" / "predictions.csv").read_bytes()


def test_evaluate_names_every_broken_image(backbone: Path, tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "data", broken=())
    finetune(FinetuneSettings(model=str(backbone), method="linear-probe", data=data, epochs=1, bootstrap=0), tmp_path / "run")
    for name in BROKEN:
        (data / name).write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="2 of 10 cannot be read") as caught:
        evaluate(EvaluateSettings(tuned=tmp_path / "run", data=data, bootstrap=0), tmp_path / "evaluated")
    assert [name for name in BROKEN if any(name in fault for fault in caught.value.faults)] == list(BROKEN[1:])


def test_predict_reads_files_folders_and_lists(run: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = run
    deep = tmp_path / "images" / "deep"
    deep.mkdir(parents=True)
    for i, item in enumerate(striped(2).items):
        Image.fromarray(np.asarray(item.source)).save(deep / f"{i}.png")
    wide = np.asarray(striped(1).items[0].source).astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "sixteen.png")
    (tmp_path / "list.txt").write_text("deep/3.png\ndeep/0.png\n".replace("deep", "images/deep"))
    folder = predict(out, [tmp_path / "images"], tmp_path / "a.csv")
    assert folder.images.keys == tuple(f"deep/{i}.png" for i in range(6))
    listed = predict(out, [tmp_path / "list.txt"], tmp_path / "b.csv")
    assert np.allclose(listed.scores, folder.scores[[3, 0]], atol=1e-6)
    single = predict(out, [tmp_path / "sixteen.png", deep / "0.png"], tmp_path / "c.csv")
    assert np.allclose(single.scores[1], folder.scores[0], atol=1e-6)
    assert single.scores[0].argmax() == np.asarray(folder.scores[0]).argmax() or single.scores[0].max() < 1
    rows = rows_of(tmp_path / "a.csv")
    assert [r["label"] for r in rows] == [""] * 6
    assert list(rows[0]) == ["image", "label", "predicted", "rows", "columns", "diagonal"]


def test_predict_reads_dicom(run: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    pixels = np.asarray(striped(1).items[0].source)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(tmp_path / "a.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.WindowCenter, data.WindowWidth = 7, 128, 256
    data.PixelData = pixels.tobytes()
    data.save_as(tmp_path / "a.dcm")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = predict(run[0], [tmp_path / "a.dcm", tmp_path / "a.png"], tmp_path / "out.csv")
    assert np.allclose(found.scores[0], found.scores[1], atol=0.02)


def test_predict_writes_the_challenge_s_file(run: tuple[Path, Any], tmp_path: Path) -> None:
    for i, item in enumerate(striped(1).items):
        Image.fromarray(np.asarray(item.source)).save(tmp_path / f"{i}.png")
    predicted = predict(run[0], [tmp_path], tmp_path / "p.csv")
    with pytest.raises(DataError, match="one column per class of endo"):
        write_medfmc(predicted, tmp_path, "endo:5")
    two = type(predicted)(predicted.images, predicted.scores[:, :2])
    file = write_medfmc(two, tmp_path, "colon:1")
    assert file.name == "colon_1-shot_submission.csv"
    assert file.read_text().splitlines()[0].startswith("0.png,0.")


def test_predict_names_bad_images_and_can_go_on(run: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png"):
        predict(run[0], [tmp_path], tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()
    with pytest.raises(StepError, match="not one image"):
        predict(run[0], [tmp_path], tmp_path / "p.csv", PredictSettings(keep_going=True))
    Image.fromarray(np.asarray(striped(1).items[0].source)).save(tmp_path / "good.png")
    predicted = predict(run[0], [tmp_path], tmp_path / "p.csv", PredictSettings(keep_going=True))
    assert predicted.images.keys == ("good.png",)
    assert len(predicted.faults) == 1
    with pytest.raises(InputError, match=r"1 fault\.") as caught:
        predict(run[0], [tmp_path / "nowhere.png"], tmp_path / "p.csv")
    assert "nowhere.png: no such file or folder" in str(caught.value)


# ---- parts ----------------------------------------------------------------------------------------------------------------


def test_held_out_parts_share_no_group_and_keep_the_balance() -> None:
    pool = striped(20, groups=True)
    rest, held = hold_out(pool, 0.2, seed=0)
    assert len(rest) + len(held) == len(pool)
    assert not set(rest.groups) & set(held.groups)
    assert held.counts() == {"rows": 4, "columns": 4, "diagonal": 4}
    assert hold_out(pool, 0.2, seed=0)[1].keys == held.keys
    assert hold_out(pool, 0.2, seed=1)[1].keys != held.keys


def test_parts_are_disjoint_and_the_data_set_s_own_come_first(tmp_path: Path) -> None:
    data = save_npz(tmp_path / "stripes.npz", striped())
    parts = read_splits(data, SplitRules(shots=3, validation_shots=3))
    assert parts.test is not None
    assert parts.validation is not None
    assert len(parts.test) == 20
    assert len(parts.train) == 9
    assert len(parts.validation) == 9
    assert not set(parts.train.keys) & set(parts.validation.keys)
    assert parts.notes == ()


# ---- bad input ------------------------------------------------------------------------------------------------------------


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(InputError, match="4 faults") as caught:
        check_settings(FinetuneSettings, {"shots": 0, "method": "sr-lor", "rank": -1, "epoch": 3}, where="run.yaml")
    message = str(caught.value)
    assert all(word in message for word in ("shots", "method", "rank", "epoch: unknown setting; the nearest are epochs"))


def bad_runs(backbone: Path, tmp_path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any], type[MedloreError], str]]:
    few = striped(3)
    blank = ImageSet("blank", few.classes, few.task, tuple(type(i)(i.key, i.source, (), i.group) for i in few.items), "blank.csv")
    return {
        "no data": ({}, {}, InputError, "--data: nothing"),
        "missing data": ({"data": tmp_path / "nowhere"}, {}, InputError, "no such file or folder"),
        "few": ({"shots": 9}, {"train": few}, DataError, "rows: "),
        "unlabelled": ({"shots": None, "validation_shots": None}, {"train": blank, "test": few}, DataError, "have no labels"),
        "method": ({"method": "dora", "partial_update": "nested"}, {"train": striped()}, InputError, "leave --partial-update off"),
        "size": ({"image_size": 17}, {"train": striped()}, InputError, "multiple of the patch size"),
        "targets": ({"targets": "nothing.like.it"}, {"train": striped()}, InputError, "nothing.like.it"),
        "diverged": ({"learning_rate": 1e30, "clip": None, "warmup_fraction": 0.0}, {"train": striped()}, StepError, "the loss is"),
    }


@pytest.mark.parametrize("case", ["no data", "missing data", "few", "unlabelled", "method", "size", "targets", "diverged"])
def test_bad_input_is_one_clear_error_and_nothing_tuned_is_left(backbone: Path, tmp_path: Path, case: str) -> None:
    changes, arguments, kind, message = bad_runs(backbone, tmp_path)[case]
    with pytest.raises(kind, match=message):
        finetune(FinetuneSettings(**{**FAST, "model": str(backbone), **changes}), tmp_path / "out", **arguments)
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_an_adapter_for_another_model_is_refused(run: tuple[Path, Any], tmp_path: Path) -> None:
    stranger = write_backbone(tmp_path / "stranger", seed=9)
    with pytest.raises(CheckpointError, match="the same backbone that it was tuned on"):
        load_tuned(run[0], model=stranger)
    with pytest.raises(InputError, match="nothing tuned in it"):
        load_tuned(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "renamed", "card"])
def test_damaged_adapters_are_refused(run: tuple[Path, Any], tmp_path: Path, damage: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(run[0] / "adapter", tmp_path / "adapter"))
    file = folder / "adapter_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "renamed":
        save_file({k.replace("lora_A", "lora_X", 1): v for k, v in load_file(file).items()}, file)
    else:
        card = json.loads((folder / "medlore.json").read_text())
        (folder / "medlore.json").write_text(json.dumps({**card, "task": "both", "extra": 1}))
    with pytest.raises(MedloreError) as caught:
        load_tuned(folder)
    assert caught.value.exit_status == 2
    assert str(folder) in str(caught.value)


def test_a_weights_file_that_lost_a_tensor_is_refused(backbone: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    finetune(FinetuneSettings(epochs=1, bootstrap=0, shots=4, model=str(backbone), method="bitfit"), tmp_path, train=striped())
    file = tmp_path / "weights" / "trained.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.fc1" not in k}, file, header)
    with pytest.raises(MedloreError, match=r"(?s)1 do not fit.*layers\.1\.mlp\.fc1\.bias: missing"):
        load_tuned(tmp_path)


def test_patients_that_nobody_names_cannot_be_drawn(backbone: Path) -> None:
    settings = FinetuneSettings(**FAST, model=str(backbone), per="group")
    with pytest.raises(InputError, match="no image has a patient or study"):
        finetune(settings, train=striped())
    assert finetune(settings.changed(epochs=1), train=striped(groups=True)).report["data"]["train"]["images"] == 24


@pytest.fixture
def killed(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FinetuneSettings, Path]:
    """A run that was stopped after its first epoch: its settings and folder."""
    settings = FinetuneSettings(epochs=3, bootstrap=0, model=str(backbone), method="linear-probe", **PUBLISHED)
    parts = split_images(striped(), SplitRules())
    taken = 0

    def stop(records: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > 1:
            raise KeyboardInterrupt
        return original(records)

    from medlore.tuning import training

    original = training._key
    with monkeypatch.context() as patch:
        patch.setattr(training, "_key", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path, train=parts.train, validation=parts.validation, test=parts.test)
    assert (tmp_path / "checkpoint.pt").is_file()
    return settings, tmp_path


def test_a_checkpoint_belongs_to_its_validation_images(killed: tuple[FinetuneSettings, Path]) -> None:
    settings, out = killed
    parts = split_images(striped(), SplitRules())
    assert parts.validation is not None
    fewer = parts.validation.subset(range(len(parts.validation) - 1))
    with pytest.raises(CheckpointError, match="other settings, data or weights"):
        finetune(settings, out, train=parts.train, validation=fewer, test=parts.test, resume=True)
    done = finetune(settings, out, train=parts.train, validation=parts.validation, test=parts.test, resume=True)
    assert [record["epoch"] for record in done.history.epochs] == [1.0, 2.0, 3.0]


def test_a_checkpoint_belongs_to_its_number_of_processes(backbone: Path) -> None:
    from medlore.training.accelerator import make_accelerator
    from medlore.tuning.facts import fingerprint_of
    from medlore.tuning.preparing import Workshop, prepare

    settings = FinetuneSettings(model=str(backbone), method="linear-probe")
    parts = split_images(striped(), SplitRules())
    prepared = prepare(settings, parts.train, parts.validation, Workshop(make_accelerator("cpu", "fp32", None)))
    assert fingerprint_of(settings, prepared, 1) != fingerprint_of(settings, prepared, 2)


def test_resuming_says_so_when_there_is_nothing_to_resume(backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = FinetuneSettings(epochs=1, bootstrap=0, shots=4, model=str(backbone), method="linear-probe")
    finetune(settings, tmp_path / "new", train=striped(), resume=True, watcher=ProgressBar(enabled=False))
    assert f"note: no checkpoint in {tmp_path / 'new'}: starting from the beginning" in capsys.readouterr().err
    with pytest.raises(InputError, match="--resume: no output folder"):
        finetune(settings, train=striped(), resume=True)
    with pytest.raises(InputError, match="--resume: given with --no-checkpoints"):
        finetune(settings.changed(checkpoints=False), tmp_path, train=striped(), resume=True)


def test_the_bar_goes_on_where_an_earlier_run_stopped() -> None:
    bar = ProgressBar(enabled=False)
    watcher = Watchers([bar])
    watcher.start(12, 4)
    watcher.skip(9)
    watcher.step(0.5)
    assert bar._bar.tasks[0].completed == 10


def test_dry_run_writes_and_trains_nothing(backbone: Path, tmp_path: Path) -> None:
    data = save_npz(tmp_path / "stripes.npz", striped())
    facts = dry_run(FinetuneSettings(**FAST, model=str(backbone), data=data))
    assert facts["steps"] == 8
    assert facts["data"]["test"]["images"] == 20
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("policy", ["negative", "ignore"])
def test_missing_labels_go_through_tuning_evaluation_and_study(backbone: Path, tmp_path: Path, policy: str) -> None:
    from medlore.studies.parts import parts_of
    from medlore.studies.settings import DataEntry

    images, unknown = two_labels(), np.random.default_rng(3).random((40, 2)) < 0.3
    rows = ["file,split,bright,columns"]
    for i, item in enumerate(images.items):
        Image.fromarray(item.source).save(tmp_path / f"{i}.png")  # type: ignore[arg-type]
        cells = ["" if gap else str(label) for gap, label in zip(unknown[i], item.labels, strict=True)]
        rows.append(f"{i}.png,{'train' if i < 28 else 'test'},{','.join(cells)}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    how: dict[str, Any] = {"data": tmp_path / "t.csv", "missing_labels": policy}
    settings = FinetuneSettings(**how, model=str(backbone), method="linear-probe", epochs=2, bootstrap=20, validation_fraction=0.3)
    with pytest.raises(DataError, match="--missing-labels"):
        finetune(settings.changed(missing_labels="fault"), tmp_path / "refused")
    result = finetune(settings, tmp_path / "run")
    labelled = [entry["labelled"] for entry in result.report["test"]["per_class"]]
    gaps = unknown[28:].sum(axis=0)
    assert labelled == ([12, 12] if policy == "negative" else (12 - gaps).tolist())
    assert all(np.isfinite(epoch["train_loss"]) and np.isfinite(epoch["validation_loss"]) for epoch in result.history.epochs)
    assert any("labels are missing" in note for note in result.report["notes"])
    written = rows_of(tmp_path / "run" / "predictions.csv")
    if policy == "ignore":
        assert [row["unknown"] for row in written] == ["|".join(np.array(images.classes)[gap]) for gap in unknown[28:]]
    assert "unknown" in written[0] or policy == "negative"
    again = evaluate(EvaluateSettings(tuned=tmp_path / "run", bootstrap=20, **how))
    assert again.report["per_class"] == result.report["test"]["per_class"]
    entry = DataEntry(name="x", data="t.csv", missing_labels=policy).model_dump(mode="json")
    parts = parts_of(entry, {"validation_shots": None, "data_seed": 0}, tmp_path, shots=3, draw=1)
    assert parts.test is not None
    assert parts.test.missing_labels == (0 if policy == "negative" else gaps.sum())
