from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.formula import formula_weight
from golden.published import TINY, filled, lorkd_shapes, write_published
from medlore.cli import main
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.prompts import PromptTable

WORDS = ["[PAD]", *[f"[unused{i}]" for i in range(99)], "[UNK]", "[CLS]", "[SEP]", "liver", "left", "kid", "##ney"]


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    return write_published(tmp_path / "vision.pth", filled(lorkd_shapes(TINY, (3, 2, 2, 1, 2, 2, 3, 1))))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    keys = ("ct/liver", "ct/left kidney", "ct/heart", "mri/liver", "ct/left earring")
    return PromptTable(keys, torch.randn(5, TINY.query_width)).write(tmp_path / "table.safetensors")


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, Path]:
    """A text encoder of the network's query width, and BERT's form of a word list."""
    width = TINY.query_width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings": (len(WORDS) + 5, width),
        "embeddings.position_embeddings": (514, width),
        "encoder.relative_attention_bias": (32, 4),
    }
    dense = {f"encoder.layer.0.attention.attn.{p}": (width, width) for p in "qkvo"} | {"pooler.dense": (width, width)}
    dense |= {"encoder.layer.0.intermediate.dense": (96, width), "encoder.layer.0.output.dense": (width, 96)}
    norms = ["embeddings.LayerNorm", "encoder.layer.0.attention.LayerNorm", "encoder.layer.0.output.LayerNorm"]
    state = {f"module.text_tower.biolord.{n}.weight": s for n, s in {**shapes, **dense, **dict.fromkeys(norms, (width,))}.items()}
    state |= {f"module.text_tower.biolord.{n}.bias": (s[0],) for n, s in {**dense, **dict.fromkeys(norms, (width,))}.items()}
    state |= {f"module.projection_layer.{i}.weight": (width, width) for i in (0, 2)}
    state |= {f"module.projection_layer.{i}.bias": (width,) for i in (0, 2)}
    state |= {"module.modality_embed.weight": (4, width)}
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(WORDS))
    return write_published(tmp_path / "text.pth", {n: formula_weight(n, s) for n, s in state.items()}), vocab


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


def test_checkpoint_and_pack_tell_the_same(vision: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_json(["export", str(vision), "--out", str(tmp_path / "pack"), "--prompt-embeddings", str(table)], capsys)
    assert summary["prompts"] == 5
    file, pack = run_json(["info", str(vision)], capsys), run_json(["info", str(tmp_path / "pack")], capsys)
    assert pack["kind"] == "segmenter pack"
    assert {k: file[k] for k in ("model", "parameters", "experts", "form")} == {
        k: pack[k] for k in ("model", "parameters", "experts", "form")
    }
    assert pack["about"]["source_sha256"] == file["sha256"]


def test_a_text_encoder_fills_the_pack_with_the_whole_vocabulary(
    vision: Path, text: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, vocab = text
    pack = tmp_path / "pack"
    arguments = ["export", str(vision), "--out", str(pack), "--text", str(encoder), "--tokenizer", str(vocab)]
    assert run_json(arguments, capsys)["prompts"] == run_json(["info", "--labels"], capsys)["pairs_with_modality"]
    assert run_json(["info", str(encoder)], capsys)["sha256"] == run_json(["info", str(pack)], capsys)["text_sha256"]
    made = tmp_path / "prompts.safetensors"
    assert main(["export", str(encoder), "--tokenizer", str(vocab), "--out", str(made)]) == 0
    capsys.readouterr()
    assert run_json(["info", str(made)], capsys)["kind"] == "prompt table"
    torch.testing.assert_close(PromptTable.read(made).embeddings, load_segmenter(pack).prompts.embeddings)  # type: ignore[union-attr]


def test_a_merged_expert_keeps_the_prompts_of_its_region(
    vision: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "abdomen"
    run_json(["export", str(vision), "--out", str(pack), "--expert", "abdomen", "--prompt-embeddings", str(table)], capsys)
    labels = run_json(["info", str(pack), "--labels"], capsys)["labels"]
    assert {row["label"] for row in labels} == {"liver", "left kidney", "left earring"}
    assert "merged for abdomen" in run_json(["info", str(pack)], capsys)["model"]


def test_an_expert_taken_from_a_pack_stays_bound(vision: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    first = run_json(["export", str(vision), "--out", str(whole), "--prompt-embeddings", str(table)], capsys)
    assert any("bound from now on" in note for note in first["notes"])
    second = run_json(["export", str(whole), "--out", str(part), "--expert", "abdomen"], capsys)
    assert second["notes"] == []
    assert second["prompts"] == 4


def test_labels_are_listed_by_modality_and_region(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run_json(["info", "--labels", "--modality", "mr", "--region", "lower limb"], capsys)
    assert {"femur bone", "femur cartilage"} <= {row["label"] for row in listed["labels"]}
    assert {row["region"] for row in listed["labels"]} == {"lower limb"}
    assert main(["info", "--labels", "--region", "spine"]) == 0
    assert "lumbar vertebrae 6 (l6)" in capsys.readouterr().out


def test_other_things_are_recognised(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 4)}, tmp_path / "vit.safetensors")
    assert run_json(["info", str(tmp_path / "vit.safetensors")], capsys)["parameters"] == 12
    (tmp_path / "plan.json").write_text('{"schema": "medlore/rank-plan/1", "budget": 12, "targets": [1, 2]}')
    assert run_json(["info", str(tmp_path / "plan.json")], capsys)["kind"] == "medlore/rank-plan/1"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "rank_pattern": {"q": 4}}')
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(4, 6)}, adapter / "adapter_model.safetensors")
    facts = run_json(["info", str(adapter)], capsys)
    assert (facts["kind"], facts["parameters"], facts["rank_pattern"]) == ("PEFT adapter", 24, {"q": 4})
    assert run_json(["info", str(shared_data / "bccd.zip")], capsys)["kind"] == "images"
    volume = run_json(["info", str(shared_data / "totalseg/example_ct_sm.nii.gz")], capsys)
    assert (volume["kind"], len(volume["shape"]), len(volume["orientation"])) == ("volume", 3, 3)
    case = {"image": str(shared_data / "totalseg/example_ct_sm.nii.gz"), "label": ["liver", "hart", "left kidney"], "modality": "ct"}
    (tmp_path / "cases.jsonl").write_text(json.dumps(case) + "\n" + json.dumps({**case, "image": "absent.nii.gz"}) + "\n")
    assert main(["info", str(tmp_path / "cases.jsonl"), "--json"]) == 1  # one image is missing, one label unknown
    cases = json.loads(capsys.readouterr().out)
    assert (cases["cases"], cases["regions"], len(cases["missing_images"])) == (2, {"abdomen": 4}, 1)
    assert cases["unknown_labels"] == ["line 1: unknown name 'hart'", "line 2: unknown name 'hart'"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info"], "PATH"),
        (["info", "absent.pth"], "no such file or folder"),
        (["info", "--modality", "ct"], "without --labels"),
        (["info", "--labels", "--region", "torso"], "unknown name 'torso'"),
        (["info", "--labels", "--modality", "xray"], "unknown name 'xray'"),
        (["info", "medlore:nothing-like-it"], "nothing-like-it"),
        (["info", "pyproject.toml"], "no kind that is known"),
    ],
)
def test_wrong_use_of_info_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(arguments, capsys)


def test_wrong_use_of_export_is_refused(
    vision: Path, text: tuple[Path, Path], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, encoder = ["--out", str(tmp_path / "p")], str(text[0])
    assert "'abdomen'" in refused(["export", str(vision), *out, "--expert", "abdomn"], capsys)
    assert "--tokenizer" in refused(["export", str(vision), *out, "--text", encoder], capsys)
    assert "leave one out" in refused(["export", str(vision), *out, "--text", encoder, "--prompt-embeddings", str(table)], capsys)
    assert "constant scaling" in refused(["export", str(vision), *out, "--lora-alpha", "3"], capsys)
    assert ".safetensors file" in refused(["export", encoder, *out], capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "is no pack" in refused(["export", str(vision), "--out", str(tmp_path / "mine")], capsys)
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"
    assert not (tmp_path / "p").exists()


def test_a_folder_with_broken_images_is_described_and_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / f"{name}.png")
    assert run_json(["info", str(tmp_path)], capsys)["faults"] == []
    (tmp_path / "a" / "text.png").write_text("no image")
    (tmp_path / "b" / "cut.png").write_bytes((tmp_path / "b" / "b.png").read_bytes()[:40])
    assert main(["info", str(tmp_path), "--json"]) == 1
    shown = capsys.readouterr()
    assert [Path(fault.split(": ")[0]).name for fault in json.loads(shown.out)["faults"]] == ["text.png", "cut.png"]
    assert "2 of the above cannot be used as they are" in shown.err


def test_names_that_are_data_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = r"^layers\.0\.attention\.q_proj"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "rank_pattern": {name: 5}}))
    assert main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"  {name}: 5" in shown
    assert "peft type: LORA" in shown


def test_networks_runs_and_cases_are_distinguished_from_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    from medlore.assets import asset_path

    shipped = run_json(["info", "medlore:vit-mini"], capsys)
    assert (shipped["kind"], shipped["architecture"], shipped["attention_blocks"]) == ("transformers folder", "ViTModel", 8)
    assert shipped["parameters"] > 4_000_000
    weights = run_json(["info", str(asset_path("medlore:vit-mini") / "model.safetensors")], capsys)
    assert (weights["kind"], weights["parameters"]) == ("weights of a transformers folder", shipped["parameters"])

    width = 64
    timm = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width), "patch_embed.proj.weight": (width, 3, 8, 8)}
    timm |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    for name, shape in {"attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (128, 64), "mlp.fc2": (64, 128)}.items():
        timm |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    timm |= {f"blocks.0.norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    save_file({name: torch.zeros(shape) for name, shape in timm.items()}, tmp_path / "vit.safetensors")
    facts = run_json(["info", str(tmp_path / "vit.safetensors")], capsys)
    assert (facts["kind"], facts["architecture"], facts["naming"], facts["hidden_size"]) == ("image network", "ViT", "timm-vit", width)
    assert facts["attention_blocks"] == 1
    rotary = {name: torch.zeros(shape) for name, shape in timm.items()} | {"rope.freqs": torch.zeros(8)}
    save_file(rotary, tmp_path / "rotary.safetensors")
    facts = run_json(["info", str(tmp_path / "rotary.safetensors")], capsys)
    assert (facts["kind"], facts["layout"]) == ("network with attention blocks", "timm")
    save_file({"a.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    assert run_json(["info", str(tmp_path / "other.safetensors")], capsys)["kind"] == "weights of another family"

    run = tmp_path / "run"
    failed = {"name": "b", "state": "failed", "error": "no such file"}
    report = {
        "schema": "medlore/report/1",
        "verb": "segment",
        "state": "done",
        "command": ["medlore", "segment"],
        "outputs": {"x": "x.png"},
    }
    (run / "ct").mkdir(parents=True)
    (run / "report.json").write_text(json.dumps({**report, "results": {"cases": [{"name": "a", "state": "done"}, failed], "seconds": 2}}))
    for place in (run, run / "report.json"):
        facts = run_json(["info", str(place)], capsys)
        assert (facts["kind"], facts["verb"], facts["cases"]) == ("run", "segment", {"done": 1, "failed": 1})
        assert facts["failed"] == {"b": "no such file"}
        assert facts["missing_outputs"] == ["x"]
    labels = [{"value": 1, "label": "liver", "volume_ml": 3.0}]
    (run / "ct" / "case.json").write_text(json.dumps({"schema": "medlore/case/1", "labels": labels, "model": {"name": "LoRKD-Nano"}}))
    facts = run_json(["info", str(run / "ct")], capsys)
    assert (facts["kind"], facts["labels"], facts["model"]) == ("segmented case", labels, "LoRKD-Nano")
