"""A whole study on made-up volumes: packs, table, dry run, an expert added later, few-shot tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medlore.decomposing.segmenters import few_shot
from medlore.decomposing.segmenters.add_expert import add_expert
from medlore.decomposing.segmenters.dry_run import plan_segmenter
from medlore.decomposing.segmenters.few_shot import FewShotSettings, tune_segmenter
from medlore.decomposing.segmenters.initialisation import start_from_teacher
from medlore.decomposing.segmenters.study import SegmentationResult, decompose_segmenter
from medlore.errors import CheckpointError, DataError, InputError
from medlore.files import read_json, write_json
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.network import Segmenter, SegmenterConfig
from medlore.segmenting.export import export
from medlore.segmenting.segmenter import load_segmenter as load_for_use
from tiny_segmentation import write_case, write_study


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SegmentationResult]:
    """The study in bf16, with `brainstem` given to the abdomen's expert by the study itself."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder)
    text = study.read_text().replace("variants: [teacher, shared, single, experts]", "variants: [teacher, shared, experts]")
    study.write_text(text + "precision: bf16\nregions: {mri/brainstem: abdomen}\n")
    return folder, decompose_segmenter(study, folder / "out", steps=2)


def forbidden(_name: str) -> Any:
    pytest.fail("a finished network was trained again")


def test_the_table_has_every_network_and_label(done: tuple[Path, SegmentationResult]) -> None:
    rows = done[1].table
    labels = {"mri/hippocampus", "mri/brainstem", "mri/liver"}
    assert {(r["network"], r["label"]) for r in rows} == {(n, label) for n in ("teacher", "shared", "experts") for label in labels}
    assert all(0 <= r["dice"] <= 1 and r["cases"] == 1 and r["note"] == "" for r in rows)
    report = read_json(done[0] / "out" / "report.json")
    facts = report["results"]["networks"]
    assert report["state"] == "done"
    assert report["results"]["cases"]["brain"] == {"train": 2, "validation": 1, "test": 1}
    assert facts["experts"]["parameters"]["expert brain"] > 0
    assert facts["experts"]["window_gflops"] > 0
    assert facts["experts"]["losses"][0].keys() >= {"masks", "distillation"}
    assert facts["experts"]["losses"][0]["distillation"] > 0
    assert len(facts["experts"]["losses"]) == 1
    assert facts["experts"]["losses"][0]["step"] == 2


def test_a_second_run_trains_nothing_and_says_the_same(done: tuple[Path, SegmentationResult]) -> None:
    folder, first = done
    assert decompose_segmenter(folder / "study.yaml", folder / "out", steps=2, narrate=forbidden).table == first.table


def test_the_dry_run_knows_what_is_trained(done: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    folder, _ = done
    found = plan_segmenter(folder / "study.yaml", folder / "out", steps=2)
    assert {name: entry["state"] for name, entry in found["networks"].items()} == dict.fromkeys(("teacher", "shared", "experts"), "trained")
    longer = plan_segmenter(folder / "study.yaml", folder / "out", steps=3)["networks"]
    assert (longer["teacher"]["state"], longer["experts"]["state"], longer["experts"]["steps"]) == ("trained", "to be trained", 3)
    new = plan_segmenter(folder / "study.yaml", tmp_path)
    assert new["networks"]["teacher"]["state"] == "to be trained"
    assert not (tmp_path / "networks").exists()


def test_a_second_stage_begins_with_the_first_ones_weights(done: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    """One step at a vanishing rate leaves the first stage's teacher as it was; other sizes are refused."""
    folder, first = done
    text = (folder / "study.yaml").read_text().replace("learning_rate: 3.0e-3, ema: 0.9", "learning_rate: 1.0e-12")
    stage = folder / "stage-2.yaml"
    stage.write_text(text.replace("teacher: {", f"teacher: {{start: {first.packs['teacher']}, "))
    second = decompose_segmenter(stage, tmp_path / "out", only="teacher").packs["teacher"]
    before, after = (load_segmenter(pack) for pack in (first.packs["teacher"], second))
    assert all(torch.equal(after.weights.base[name], tensor) for name, tensor in before.weights.base.items())
    assert torch.equal(after.queries(["liver"], "mri"), before.queries(["liver"], "mri"))
    stage.write_text(stage.read_text().replace(str(first.packs["teacher"]), str(first.packs["pack"])))
    with pytest.raises(InputError, match=r"teacher\.start"):
        decompose_segmenter(stage, tmp_path / "other", only="teacher")


def test_a_given_teacher_plans_its_students_too(done: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    folder, first = done
    study = folder / "given.yaml"
    text = (folder / "study.yaml").read_text()
    study.write_text(text.replace("teacher: {", f"teacher: {{source: {first.packs['teacher']}, "))
    found = plan_segmenter(study, tmp_path)
    assert set(found["networks"]) == {"shared", "experts"}
    assert found["ranks"]["brain"]


def test_the_pack_segments_with_the_regions_of_the_study(done: tuple[Path, SegmentationResult]) -> None:
    folder, result = done
    masks = load_for_use(result.packs["pack"]).segment(folder / "brain3.nii.gz", ["hippocampus", "brainstem"], modality="mri")
    assert masks["brainstem"].shape == (20, 20, 20)
    assert masks.segmentation.routes.by_region == {"brain": ["hippocampus"], "abdomen": ["brainstem"]}


def test_a_merged_expert_answers_as_the_pack(done: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    _, result = done
    export(result.packs["pack"], tmp_path / "abdomen", expert="abdomen")
    whole, merged = load_segmenter(result.packs["pack"]), load_segmenter(tmp_path / "abdomen")
    assert merged.prompts is not None
    assert set(merged.prompts.keys) == {"mri/liver", "mri/brainstem"}
    x, queries = torch.randn(1, 1, 16, 16, 16), whole.queries(["liver", "brainstem"], "mri")
    torch.testing.assert_close(merged.network("abdomen")(x, queries), whole.network("abdomen")(x, queries))


def test_a_damaged_network_is_named(done: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    import shutil

    folder, _ = done
    shutil.copytree(folder / "out", tmp_path / "out")
    weights = tmp_path / "out" / "networks" / "experts" / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"weights\.pt: damaged"):
        decompose_segmenter(folder / "study.yaml", tmp_path / "out", steps=2)


def test_wrong_orders_are_refused(done: tuple[Path, SegmentationResult]) -> None:
    study = done[0] / "study.yaml"
    with pytest.raises(InputError, match="--steps"):
        decompose_segmenter(study, done[0] / "out", steps=0)
    with pytest.raises(InputError, match="--only"):
        decompose_segmenter(study, done[0] / "out", only="student")


@pytest.fixture(scope="module")
def added(done: tuple[Path, SegmentationResult]) -> tuple[Path, SegmentationResult]:
    folder, _ = done
    lines = [write_case(folder, f"back{number}", {"spinal cord": [1]}, number) for number in range(4)]
    (folder / "back.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    study = (folder / "study.yaml").read_text()
    first, last = study.index("data:"), study.index("patch_size:")
    (folder / "more.yaml").write_text(study[:first] + "data: [{name: back, cases: back.jsonl, licence: made up}]\n" + study[last:])
    return folder, add_expert(folder / "more.yaml", folder / "out", region="spine", steps=4)


def test_an_added_expert_changes_no_other_by_one_bit(added: tuple[Path, SegmentationResult]) -> None:
    folder, result = added
    old, new = load_segmenter(folder / "out" / "pack"), load_segmenter(result.packs["pack"])
    assert set(new.regions) == {*old.regions, "spine"}
    assert result.packs["pack"] == folder / "out" / "pack-spine"
    x = torch.randn(1, 1, 16, 16, 16)
    assert old.prompts is not None
    for key in old.prompts.keys:
        modality, label = key.split("/")
        for region in (*old.regions, None):
            answers = [b.network(region)(x, b.queries([label], modality)) for b in (old, new)]
            assert torch.equal(*answers), (key, region)
    spine, base = new.network("spine"), new.network(None)
    query = new.queries(["spinal cord"], "mri")
    assert not torch.equal(spine(x, query), base(x, query))
    assert [row["label"] for row in result.table] == ["mri/spinal cord"]
    files = [sum(f.stat().st_size for f in (folder / "out" / name).rglob("base.safetensors")) for name in ("pack", "pack-spine")]
    assert files[0] == files[1], "16 bits stay 16 bits"


def test_a_label_that_returns_to_its_own_region_loses_the_older_word(added: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    """The pack said that `spinal cord` belongs to the brain; the vocabulary, and the study that adds the expert, say spine."""
    import shutil

    folder, _ = added
    pack = Path(shutil.copytree(folder / "out" / "pack", tmp_path / "pack"))
    manifest = read_json(pack / "manifest.json")
    manifest["preprocessing"]["label_regions"] = {"mri/spinal cord": "whole body", "mri/other": "brain"}
    write_json(pack / "manifest.json", manifest)
    result = add_expert(folder / "more.yaml", tmp_path / "out", region="spine", steps=1, pack=pack)
    assert load_segmenter(result.packs["pack"]).preprocessing["label_regions"] == {"mri/other": "brain"}


def test_experts_that_cannot_be_added_are_refused(added: tuple[Path, SegmentationResult]) -> None:
    folder, _ = added
    with pytest.raises(InputError, match="which has an expert"):
        add_expert(folder / "more.yaml", folder / "out", region="brain")
    with pytest.raises(DataError, match="no training case for thorax"):
        add_expert(folder / "more.yaml", folder / "out", region="thorax")
    with pytest.raises(InputError, match="without experts"):
        add_expert(folder / "more.yaml", folder / "out", region="spine", pack=folder / "out" / "teacher")


@pytest.mark.parametrize("method", ["sr-lora", "scratch"])
def test_few_shot_tuning_writes_a_pack_that_segments(
    added: tuple[Path, SegmentationResult], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = added
    settings = FewShotSettings(
        model=str(folder / "out" / "pack"), cases=folder / "back.jsonl", method=method, rank=2, steps=3, patch_size=(16, 16, 16),
        region="brain", precision="bf16",
    )  # type: ignore[arg-type]  # fmt: skip
    measured = []
    real = few_shot.measure_network
    monkeypatch.setattr(
        few_shot, "measure_network", lambda name, network, *rest: [measured.append(network), *real(name, network, *rest)][1:]
    )
    done = tune_segmenter(settings, tmp_path)
    written = load_segmenter(done.pack)
    held = written.network("brain").state_dict()
    assert all(torch.equal(held[name], value) for name, value in measured[-1].segmenter.state_dict().items()), "measured as written"
    assert torch.equal(written.queries(["spinal cord"], "mri"), measured[-1].prompts)
    assert (tmp_path / "plan.json").is_file() == (method == "sr-lora")
    assert [row["network"] for row in done.table] == [method]
    masks = load_for_use(done.pack).segment(folder / "back3.nii.gz", ["spinal cord"], modality="mri")
    assert masks["spinal cord"].dtype == np.bool_
    again = tune_segmenter(settings, tmp_path, narrate=forbidden)
    assert again.table == done.table
    if done.plan is not None:
        uniform = tune_segmenter(settings.changed(method="lora", steps=1), tmp_path / "lora")
        assert uniform.plan is not None
        assert len({layer.rank for layer in done.plan.layers}) > 1
        assert 0.97 <= done.plan.parameters / uniform.plan.parameters <= 1
        assert done.trainable == done.plan.parameters + 16  # and one prompt


def test_labels_of_two_regions_are_refused(added: tuple[Path, SegmentationResult], tmp_path: Path) -> None:
    folder, _ = added
    settings = FewShotSettings(model=str(folder / "out" / "pack"), cases=folder / "brain.jsonl", patch_size=(16, 16, 16))
    with pytest.raises(DataError, match="of 2 regions"):
        tune_segmenter(settings, tmp_path)


def test_a_student_begins_with_its_teachers_channels() -> None:
    sizes = {"strides": (1, 2), "patch": 2, "query_width": 4, "heads": 2, "decoder_layers": 1, "image_channels": 1}
    teacher = Segmenter(SegmenterConfig((8, 12), projection_width=8, mask_width=8, feedforward=8, **sizes))  # type: ignore[arg-type]
    student = Segmenter(SegmenterConfig((4, 6), projection_width=8, mask_width=16, feedforward=4, **sizes))  # type: ignore[arg-type]
    drawn = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    filled = start_from_teacher(student, teacher)
    there, own = teacher.state_dict(), student.state_dict()
    name = "backbone.decoder.stages.0.convs.0.conv.weight"  # 4 of 8 from below and 4 of 8 skipped over
    assert torch.equal(own[name], there[name][::2][:, [0, 2, 4, 6, 8, 10, 12, 14]])
    joined = "projection_layer.0.weight"  # maps of 8 and 12 channels one after another
    assert torch.equal(own[joined], there[joined][:, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]])
    assert "mask_embed_proj.0.weight" not in filled
    assert torch.equal(own["mask_embed_proj.0.weight"], drawn["mask_embed_proj.0.weight"])
