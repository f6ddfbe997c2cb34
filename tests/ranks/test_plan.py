"""RankPlan: certified against a full SVD, saved, edited, renamed, refused for other weights, exported to PEFT."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import medlore
from medlore.errors import DataError, InputError, TargetError
from medlore.ranks import PlannedLayer, RankPlan, uniform_plan
from medlore.ranks.export import write_peft_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}


def vit(head: bool = True) -> nn.Module:
    kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    model: nn.Module = kind(transformers.ViTConfig(**SMALL))
    for name, parameter in model.named_parameters():  # trained-like spectra, different in every layer
        if parameter.ndim == 2:
            torch.manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn_like(parameter) * torch.arange(1, parameter.shape[1] + 1) ** -torch.rand(1)
    return model


def stable_rank_by_svd(w: Tensor) -> float:
    s = np.linalg.svd(w.detach().double().numpy(), compute_uv=False)
    return float((s**2).sum() / s[0] ** 2)


class Timm(nn.Module):
    """The names of a timm ViT."""

    def __init__(self, blocks: int = 3, d: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})}) for _ in range(blocks)
        )


def timm_of(model: nn.Module) -> Timm:
    """The attention weights of a transformers ViT under timm's names."""
    twin, state = Timm(), model.state_dict()
    for i, block in enumerate(twin.blocks):
        path = f"vit.layers.{i}.attention"
        block["attn"]["qkv"].weight.data = torch.cat([state[f"{path}.{n}_proj.weight"] for n in "qkv"])  # type: ignore[index]
        block["attn"]["proj"].weight.data = state[f"{path}.o_proj.weight"].clone()  # type: ignore[index]
    return twin


@pytest.mark.parametrize("proof", [False, True])
def test_ranks_equal_those_of_a_full_svd(proof: bool) -> None:
    model = vit()
    plan = medlore.plan_ranks(model, targets="attention+mlp", include_k=True, proof=proof)
    weights = dict(model.named_parameters())
    for layer in plan.layers:
        exact = stable_rank_by_svd(weights[f"{layer.name}.weight"])
        assert layer.lower * (1 - 1e-9) <= exact <= layer.upper * (1 + 1e-9)  # type: ignore[operator]
        assert layer.rank == round(exact)
        assert layer.alpha == layer.rank
    assert len({layer.rank for layer in plan.layers}) > 3
    assert plan.proof is proof


def test_projection_and_fused_differ_as_the_reference_says() -> None:
    g = np.random.default_rng(7)
    decay = np.arange(1, 65)
    q, k, v = g.standard_normal((64, 64)) * decay**-0.2, 3 * g.standard_normal((64, 64)) * decay**-1.0, g.standard_normal((64, 64))
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(64, 192, bias=False), "proj": nn.Linear(64, 64)})}).double()
    model["attn"]["qkv"].weight.data = torch.from_numpy(np.vstack([q, k, v]))  # type: ignore[index]
    apart = medlore.plan_ranks(model, include_k=True)
    assert [round(x.stable_rank or 0, 3) for x in apart.layers[:3]] == [13.786, 1.646, 16.372]
    merged = medlore.plan_ranks(model, granularity="fused")
    assert [(x.part, round(x.stable_rank or 0, 3), x.rank, x.measured_shape) for x in merged.layers[:2]] == [
        ("q", 9.199, 9, (192, 64)),
        ("v", 9.199, 9, (192, 64)),
    ]


def test_options_reach_the_ranks() -> None:
    model = vit()
    plain = medlore.plan_ranks(model)
    doubled = medlore.plan_ranks(model, scale=2.0)
    assert all(
        b.rank in (2 * a.rank - 1, 2 * a.rank, 2 * a.rank + 1) or b.rank == 32 for a, b in zip(plain.layers, doubled.layers, strict=True)
    )
    bounded = medlore.plan_ranks(model, min_rank=4, max_rank=5)
    assert {x.rank for x in bounded.layers} == {4, 5}
    down, up = (medlore.plan_ranks(model, rounding=r).parameters for r in ("floor", "ceil"))  # type: ignore[arg-type]
    assert down < plain.parameters < up
    constant = medlore.plan_ranks(model, alpha=1)
    assert [constant.scaling(x) for x in constant.layers] == [1 / x.rank for x in constant.layers]


def test_budgets_in_every_unit() -> None:
    model = vit()
    pair = medlore.plan_ranks(model, budget="uniform:4")
    assert 0 <= medlore.plan_ranks(model, rule="uniform:4").parameters - pair.parameters < 64
    assert len({x.rank for x in pair.layers}) > 1
    assert {x.decided_by for x in pair.layers} == {"budget"}
    share = medlore.plan_ranks(model, budget="3%")
    assert 0 <= 0.03 * share.model_parameters - share.parameters < 64
    assert share.model_parameters == sum(p.numel() for p in model.parameters())
    assert share.budget == "3%"


def test_what_a_plan_has_decided_is_not_asked_for_again(tmp_path: Path) -> None:
    model = vit()
    file = medlore.plan_ranks(model, targets="attention+mlp").save(tmp_path / "plan.json")
    assert medlore.plan_ranks(model, ranks=file, targets="attention+mlp").targets == "attention+mlp"
    with pytest.raises(InputError, match=r"--targets, --budget: typo, 2% beside the plan .*plan\.json, which has decided it"):
        medlore.plan_ranks(model, ranks=file, targets="typo", budget="2%")


def test_uniform_plan_has_nearly_the_same_parameters() -> None:
    plan = medlore.plan_ranks(vit())
    flat = uniform_plan(plan)
    assert {x.rank for x in flat.layers} == {round(plan.uniform_rank)}
    assert abs(flat.parameters - plan.parameters) <= 0.5 * sum(sum(x.shape) for x in plan.layers)
    assert flat.uniform_rank == round(plan.uniform_rank)
    assert {x.alpha for x in flat.layers} == {flat.layers[0].rank}
    assert {x.rank for x in uniform_plan(plan, 99).layers} == {32}
    with pytest.raises(InputError, match="got 0"):
        uniform_plan(plan, 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "magic"}, "--rule: 'magic'"),
        ({"rule": "uniform"}, "--rule: 'uniform'"),
        ({"rule": "given"}, "'given' without --ranks"),
        ({"rule": "uniform:3", "budget": "2%"}, "--budget: with --rule uniform:3"),
        ({"granularity": "row"}, "--granularity: 'row'"),
        ({"min_rank": 0}, "--min-rank and --max-rank: 0 and None"),
        ({"min_rank": 5, "max_rank": 4}, "5 and 4"),
        ({"alpha": "much"}, "alpha: 'much'"),
        ({"scale": 0.0}, "scale: got 0"),
        ({"rounding": "banker"}, "unknown name 'banker'"),
    ],
)
def test_wrong_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        medlore.plan_ranks(vit(), **options)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = medlore.plan_ranks(timm_of(vit()), granularity="fused", alpha="rslora*4", budget="uniform:3")
    path = plan.save(tmp_path / "deep" / "plan.json")
    assert RankPlan.load(path) == plan
    assert json.loads(path.read_text())["schema"] == "medlore/rank-plan/2"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_all_faults_of_a_plan_file_at_once(tmp_path: Path) -> None:
    plan = medlore.plan_ranks(vit())
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["layers"][0]["rank"] = "eight"
    content["layers"][1]["part"] = "x"
    content["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"(?s)3 faults.*layers\.0\.rank.*layers\.1\.part.*colour"):
        RankPlan.load(path)
    content = json.loads(plan.save(path).read_text())
    content["layers"][0]["rank"] = 33
    content["layers"][1]["alpha"] = 0
    content["layers"][3] = content["layers"][2]
    content["alpha_rule"] = "most"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"(?s)4 faults.*layers\.0 .*rank: from 1.*layers\.1 .*alpha.*stands 2 times.*alpha_rule"):
        RankPlan.load(path)


@pytest.mark.parametrize("text", ["[]", '{"schema": "medlore/rank-plan/3"}', "{", '{"layers": []}'])
def test_files_that_are_no_plans(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"schema|list|not JSON"):
        RankPlan.load(path)


def test_a_plan_refuses_other_weights_unless_asked_to_ignore_it() -> None:
    model = vit()
    plan = medlore.plan_ranks(model)
    model.vit.layers[1].attention.v_proj.weight.data[3, 4] += 1e-3  # type: ignore[union-attr, index, operator]
    with pytest.raises(TargetError, match=r"(?s)1 of 9 layers .* hold other weights.*vit\.layers\.1\.attention\.v_proj holds other"):
        plan.for_model(model)
    assert plan.for_model(model, check=False) == plan
    with pytest.raises(TargetError, match="hold other weights"):
        plan.to_lora_config(model=model)
    with pytest.raises(TargetError, match="hold other weights"):
        medlore.get_peft_model(model, plan)
    assert medlore.get_peft_model(model, plan, check=False)


def test_names_follow_the_model_in_both_directions() -> None:
    model = vit()
    twin = timm_of(model)
    apart, fused = medlore.plan_ranks(model), medlore.plan_ranks(twin)
    assert apart.sha256 == fused.sha256
    there = apart.for_model(twin)
    assert [(x.name, x.rows) for x in there.layers] == [(x.name, x.rows) for x in fused.layers]
    assert there.layout == "timm"
    back = fused.for_model(model)
    assert [(x.name, x.rows, x.rank) for x in back.layers] == [(x.name, x.rows, x.rank) for x in apart.layers]
    bare = vit(head=False)
    bare.load_state_dict(model.vit.state_dict(), strict=False)  # type: ignore[union-attr]
    assert apart.for_model(bare).layers[0].name == "layers.0.attention.q_proj"


def test_an_edited_plan_keeps_its_places() -> None:
    model = vit()
    plan = medlore.plan_ranks(model)
    edited = RankPlan(**{**vars(plan), "layers": plan.layers[3:]})  # the first block taken out
    assert [x.block for x in edited.for_model(timm_of(model)).layers] == [1, 1, 1, 2, 2, 2]


def test_a_plan_of_another_shape_or_depth_is_refused() -> None:
    plan = medlore.plan_ranks(timm_of(vit()))
    with pytest.raises(TargetError, match="3 attention blocks in the plan, 2 in the model"):
        plan.for_model(nn.ModuleDict({"net": Timm(2)}), check=False)
    with pytest.raises(TargetError, match=r"(?s)9 layers do not fit.*\(32, 32\) in the plan, \(16, 16\)"):
        plan.for_model(Timm(3, 16), check=False)
    with pytest.raises(TargetError, match="no weight answers"):
        plan.for_model(nn.Sequential(nn.Linear(4, 4)), check=False)


def test_free_targets_are_found_by_the_end_of_their_names() -> None:
    plan = medlore.plan_ranks(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), targets=r"\d", rule="uniform:2")
    holder = nn.ModuleDict({"net": nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))})
    assert [x.name for x in plan.for_model(holder, check=False).layers] == ["net.0", "net.1"]
    with pytest.raises(TargetError, match=r"(?s)1 layers do not fit.*1: no such module"):
        plan.for_model(nn.ModuleDict({"net": nn.Sequential(nn.Linear(6, 5))}), check=False)


def test_a_given_plan_is_taken_over_for_its_own_weights_only(tmp_path: Path) -> None:
    model = vit()
    path = medlore.plan_ranks(model, alpha="rank*2", max_rank=4).save(tmp_path / "plan.json")
    twin = timm_of(model)
    taken = medlore.plan_ranks(twin, ranks=path)
    assert [x.rank for x in taken.layers] == [x.rank for x in RankPlan.load(path).layers]
    assert {x.alpha / x.rank for x in taken.layers} == {2.0}
    assert (taken.rule, taken.layout) == ("given", "timm")
    assert {x.alpha for x in medlore.plan_ranks(twin, ranks=path, alpha=7).layers} == {7.0}
    with pytest.raises(TargetError, match="9 of 9 layers of Timm hold other weights"):
        medlore.plan_ranks(Timm(), ranks=path)
    assert medlore.plan_ranks(Timm(), ranks=path, check=False).layers[0].rank == taken.layers[0].rank


def test_peft_builds_exactly_the_planned_factors() -> None:
    model = vit()
    plan = medlore.plan_ranks(model, targets="attention+mlp")
    tuned = peft.get_peft_model(model, plan.to_lora_config())
    layers = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n: (m.r["default"], m.lora_alpha["default"], m.scaling["default"]) for n, m in layers.items()} == {
        x.name: (x.rank, x.alpha, 1.0) for x in plan.layers
    }
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == plan.parameters


def test_patterns_match_one_module_each() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.ModuleDict({"a": nn.Linear(8, 8)}), "aXa": nn.Linear(8, 8)})
    plan = medlore.plan_ranks(model, targets="a", rule="uniform:2")
    tuned = peft.get_peft_model(model, plan.to_lora_config())
    assert [n for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)] == ["base_model.model.a"]
    for key in plan.to_lora_config().rank_pattern:
        assert [n for n, _ in model.named_modules() if re.match(rf"(.*\.)?({key})$", n)] == ["a"]


def test_every_planned_layer_must_be_a_module() -> None:
    plan = medlore.plan_ranks(nn.Sequential(nn.Linear(8, 8)), targets=".*", rule="uniform:2")
    stray = RankPlan(**{**vars(plan), "layers": (*plan.layers, PlannedLayer("typo", "linear", (8, 8), 2, 2.0))})
    with pytest.raises(TargetError, match=r"(?s)1 layers do not fit.*typo: no such module"):
        stray.to_lora_config(model=nn.Sequential(nn.Linear(8, 8)), check=False)


def test_rslora_and_constant_alpha_in_peft() -> None:
    for alpha in ("rslora*3", 5):
        model = vit()
        plan = medlore.plan_ranks(model, alpha=alpha)
        tuned = peft.get_peft_model(model, plan.to_lora_config())
        scalings = [m.scaling["default"] for m in tuned.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert sorted(scalings) == pytest.approx(sorted(plan.scaling(x) for x in plan.layers))


def test_options_that_the_plan_decides_are_refused() -> None:
    plan = medlore.plan_ranks(vit())
    with pytest.raises(InputError, match="LoRA options: r, use_rslora"):
        plan.to_lora_config(r=8, use_rslora=True)
    assert plan.to_lora_config(lora_dropout=0.1).lora_dropout == 0.1


def test_fused_plans_warn_where_plain_peft_would_mix_q_k_and_v() -> None:
    plan = medlore.plan_ranks(Timm(1), rule="uniform:3")
    with pytest.warns(UserWarning, match="one factor pair over q, k and v"):
        config = plan.to_lora_config()
    assert dict(config.rank_pattern) == {r"^blocks\.0\.attn\.qkv": 6, r"^blocks\.0\.attn\.proj": 3}


def test_a_peft_folder_is_readable(tmp_path: Path) -> None:
    plan = medlore.plan_ranks(vit())
    path = write_peft_config(plan.to_lora_config(), tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.PeftConfig.from_pretrained(str(path.parent))
    assert read.rank_pattern == plan.to_lora_config().rank_pattern


def test_a_jax_plan_needs_a_model(jax_file: Path) -> None:
    plan = medlore.plan_ranks(jax_file)
    with pytest.raises(TargetError, match="names of a JAX file"):
        plan.to_lora_config()
    assert plan.for_model(Timm(4, 64), check=False).layers[0].name == "blocks.0.attn.qkv"


def test_the_shipped_model_has_a_plan() -> None:
    from medlore.assets import shipped_names

    if "vit-mini" not in shipped_names():
        pytest.skip("vit-mini is not shipped yet")
    plan = medlore.plan_ranks("medlore:vit-mini")
    assert plan.source == "medlore:vit-mini"
    assert {x.part for x in plan.layers} == {"q", "v", "o"}
