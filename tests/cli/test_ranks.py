"""`medlore ranks` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import medlore
from medlore.cli import main
from medlore.errors import InputError
from medlore.ranks import RankPlan


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    decay = torch.arange(1, 33) ** -0.7
    state = {
        f"blocks.{i}.attn.{name}.weight": torch.randn(rows, 32, generator=g) * decay
        for i in range(3)
        for name, rows in (("qkv", 96), ("proj", 32))
    }
    save_file(state, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_everything_at_once(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = weights.parent
    status = main(
        [
            "ranks",
            str(weights),
            "--granularity",
            "fused",
            "--out",
            f"{out}/plan.json",
            "--plot",
            f"{out}/ranks.png",
            "--peft",
            f"{out}/peft",
            "--full",
        ]
    )
    shown = capsys.readouterr()
    plan = RankPlan.load(out / "plan.json")
    assert status == 0
    assert f"9 factor pairs, {plan.parameters:,} parameters" in shown.out
    assert f"the same parameters at one rank for all: {plan.uniform_rank:.1f}" in shown.out
    for layer in plan.layers:
        assert any(line.split()[:2] == [layer.name, layer.part] and str(layer.rank) in line.split() for line in shown.out.splitlines())
    assert "plan written to" in shown.err
    assert "use medlore.get_peft_model(model, plan)" in shown.err
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert len(peft.PeftConfig.from_pretrained(f"{out}/peft").rank_pattern) == 6
    assert sorted(p.name for p in out.iterdir()) == ["peft", "plan.json", "ranks.png", "vit.safetensors"]


def test_json_is_one_object_with_the_totals(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", str(weights), "--json", "--proof", "--k", "--alpha", "rslora*4"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == "medlore/rank-plan/2"
    assert [x["part"] for x in shown["layers"]] == ["q", "k", "v", "o"] * 3
    assert shown["totals"]["parameters"] == sum(x["rank"] * 64 for x in shown["layers"])
    assert sum(shown["totals"]["decided_by"].values()) == 12
    assert (shown["alpha_rule"], shown["proof"]) == ("rslora*4", True)


def test_given_lists_and_plans(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = weights.parent / "ranks.txt"
    ranks.write_text("[[9, 10], [25, 31], [4, 5]]")
    plan = weights.parent / "plan.json"
    assert main(["ranks", str(weights), "--ranks", str(ranks), "--out", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["ranks_by_block"] == [[9, 10], [25, 31], [4, 5]]
    assert main(["ranks", str(weights), "--ranks", str(plan), "--json"]) == 0
    capsys.readouterr()
    other = weights.parent / "other.safetensors"
    save_file({f"blocks.{i}.attn.{n}.weight": torch.ones(r, 32) for i in range(3) for n, r in (("qkv", 96), ("proj", 32))}, other)
    assert main(["ranks", str(other), "--ranks", str(plan)]) == 2
    assert "9 of 9 layers of" in capsys.readouterr().err
    assert main(["ranks", str(other), "--ranks", str(plan), "--any-weights", "--json"]) == 0


@pytest.mark.parametrize(("rule", "cut"), [(["--rule", "uniform:999"], 9), (["--scale", "1e300"], 9), (["--rule", "uniform:32"], 0)])
def test_ranks_that_were_cut_to_the_matrix_are_reported(
    weights: Path, rule: list[str], cut: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ranks", str(weights), *rule]) == 0
    note = f"note: {cut} of 9 layers have the smaller side of their matrix as rank"
    assert (note in capsys.readouterr().err) == bool(cut)
    assert main(["ranks", str(weights), *rule, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [x["rank"] for x in shown["layers"]] == [32] * 9
    assert len(shown["totals"]["cut_to_the_smaller_side"]) == cut


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no.safetensors"], "no such file"),
        (["{w}", "--targets", "atention"], "nearest are 'attention'"),
        (["{w}", "--rule", "uniform"], "use stable-rank, or for example uniform:8"),
        (["{w}", "--budget", "lots"], "--budget: 'lots'"),
        (["{w}", "--budget", "10"], "at least 576 (rank 1 everywhere)"),
        (["{w}", "--alpha", "most"], "alpha: 'most'"),
        (["{w}", "--rounding", "up"], "unknown name 'up'"),
        (["{w}", "--ranks", "nowhere.json"], "--ranks nowhere.json: no such file"),
        (["{w}", "--ranks", "medlore:rank-lists/vit-b"], "nearest are 'vit-b-"),
        (["{w}", "--ranks", "medlore:rank-lists/swin-t"], "12 blocks in the list, 3 in the model"),
        (["{w}", "--scale", "inf"], "a positive number"),
        (["x" * 5000 + ".pth"], "(5004 characters)"),
        ([""], "an empty text"),
        (["{w}", "--min-rank", "9", "--max-rank", "3"], "9 and 3"),
    ],
)
def test_wrong_use_is_one_message_and_writes_nothing(
    weights: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)
    status = main(["ranks", *(a.replace("{w}", "vit.safetensors") for a in arguments), "--out", "plan.json", "--plot", "ranks.png"])
    shown = capsys.readouterr()
    assert status == 2
    assert text in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out
    assert [p.name for p in weights.parent.iterdir()] == ["vit.safetensors"]


def test_a_trained_adapter_is_never_replaced_by_a_configuration(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "trained"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weeks of work")
    assert main(["ranks", str(weights), "--out", str(tmp_path / "fresh.json"), "--peft", str(adapter)]) == 2
    assert "holds a trained adapter" in capsys.readouterr().err
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"weeks of work"
    assert not (tmp_path / "fresh.json").exists()


def test_a_short_table_by_default_and_the_totals_alone_when_quiet(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", str(weights)]) == 0
    shown = capsys.readouterr()
    plan = medlore.plan_ranks(weights)
    for i in range(3):
        ranks = [str(x.rank) for x in plan.layers if x.block == i]
        assert f"blocks.{i}.attn" in shown.out
        assert any(line.split() == [f"blocks.{i}.attn", *ranks] for line in shown.out.splitlines())
    assert "3 attention modules seen: 3 taken; rows of 3 fused identified by name" in shown.err
    assert shown.out.splitlines()[0].split() == ["block", "q", "v", "o"]
    assert repr(plan).splitlines()[1:5] == shown.out.splitlines()[:4]
    assert main(["ranks", str(weights), "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out == f"9 factor pairs, {plan.parameters:,} parameters, {100 * plan.parameters / 12288:.2f} % of 12,288\n"
    assert quiet.err == ""


def test_moving_averages_are_taken_when_asked_for(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(weights)
    averaged = {k: v * torch.arange(1, 33) for k, v in state.items()}
    both, alone = weights.parent / "both.pth", weights.parent / "alone.pth"
    torch.save({"model": state, "model_ema": averaged, "epoch": 3}, both)
    torch.save({"model_ema": {"module." + k: v for k, v in averaged.items()}}, alone)
    assert medlore.plan_ranks(both).sha256 == medlore.plan_ranks(weights).sha256
    assert main(["ranks", str(both), "--ema", "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)["sha256"]
    assert taken == medlore.plan_ranks(alone, ema=True).sha256
    assert taken != medlore.plan_ranks(weights).sha256
    assert main(["ranks", str(alone)]) == 2
    assert "averaged weights alone ('model_ema')" in capsys.readouterr().err
    torch.save(state, both)
    assert main(["ranks", str(both), "--ema"]) == 2
    assert "no averaged weights" in capsys.readouterr().err
    assert main(["ranks", str(weights), "--ema"]) == 2


def test_an_adapter_names_its_base(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = weights.parent / "peft"
    assert main(["ranks", str(weights), "--peft", str(out), "--quiet"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(weights)
    capsys.readouterr()
    save_file({"base_model.model.q.lora_A.weight": torch.ones(1, 4)}, out / "adapter_model.safetensors")
    for place in (out, out / "adapter_model.safetensors"):
        assert main(["ranks", str(place)]) == 2
        assert f"an adapter, not a model; its base is {weights}" in capsys.readouterr().err


def test_a_tuned_model_is_refused_and_a_bare_one_is_planned_for() -> None:
    net = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in ("q", "k", "v", "o")})})
    wanted = medlore.plan_ranks(net)
    tuned = medlore.get_peft_model(net)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == wanted.parameters
    with pytest.raises(InputError, match="a PEFT model already \\(adapter 'default' on ModuleDict\\)"):
        medlore.plan_ranks(tuned)


def test_a_network_without_q_and_v_says_which_targets_would_match() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ModuleDict({"up": torch.nn.Linear(4, 8), "down": torch.nn.Linear(8, 4)}))
    with pytest.raises(InputError) as caught:
        medlore.plan_ranks(net)
    assert caught.value.fix == r"use --targets all-linear or --targets '.*\.(down|up)' or --targets conv"
    for wanted in ("all-linear", r".*\.(down|up)", "conv"):
        assert medlore.plan_ranks(net, targets=wanted, rule="uniform:1").layers


def test_a_tower_is_chosen_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {f"{t}.blocks.0.attn.{n}.weight": torch.randn(8, 8) for t in ("visual", "text") for n in ("q_proj", "v_proj", "out_proj")}
    save_file(blocks, tmp_path / "two.safetensors")
    for tower, names in (("auto", {"visual"}), ("vision", {"visual"}), ("text", {"text"}), ("both", {"visual", "text"})):
        assert main(["ranks", str(tmp_path / "two.safetensors"), "--tower", tower, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert {x["name"].split(".")[0] for x in shown["layers"]} == names
        assert len(shown["coverage"]) == 2
    assert main(["ranks", str(tmp_path / "two.safetensors"), "--tower", "left"]) == 2
    assert "--tower: unknown name 'left'" in capsys.readouterr().err
