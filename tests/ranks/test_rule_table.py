"""One table of rules: a new entry works from the command line and in a study; what experts get is what the recipes always gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import medlore
from medlore.cli import main
from medlore.decomposing.classifiers.settings import RankSettings
from medlore.decomposing.rank_rules import one_of_variants
from medlore.decomposing.segmenters.settings import ExpertSettings
from medlore.errors import InputError, TargetError
from medlore.layers.tuning.methods import METHODS
from medlore.models.backbones.reading import load_backbone
from medlore.ranks import RankPlan
from medlore.ranks.experts import ExpertDemand, expert_plan, fullness_by_depth, write_expert_plans
from medlore.ranks.rule_table import RULES, LayerDemand, LayerRanks, Rule, expert_ranks
from medlore.tuning.plans import choose_plan
from medlore.tuning.settings import FinetuneSettings

SHAPES = {"a.conv": (8, 1, 3, 3, 3), "b.conv": (16, 8, 3, 3, 3), "c.conv": (8, 16, 3, 3, 3)}
LABELS = {"head": 9.0, "legs": 1.0}


def by_depth(demand: LayerDemand) -> LayerRanks:
    """A toy: 1, 2, 3, ..."""
    return LayerRanks([1 + i for i in range(len(demand.targets))], ["by-depth"] * len(demand.targets))


def test_a_rule_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(RULES, "by-depth", Rule("a toy", by_depth, lambda d: {(t, e): 7 for t in d.shapes for e in d.sizes}))
    save_file(
        {f"blocks.{i}.attn.{n}.weight": torch.randn(s, 8) for i in range(2) for n, s in (("qkv", 24), ("proj", 8))},
        tmp_path / "w.safetensors",
    )
    assert main(["ranks", str(tmp_path / "w.safetensors"), "--rule", "by-depth", "--out", str(tmp_path / "plan.json"), "--json"]) == 0
    assert [x["rank"] for x in json.loads(capsys.readouterr().out)["layers"]] == [1, 2, 3, 4, 5, 6]
    assert {x.decided_by for x in RankPlan.load(tmp_path / "plan.json").layers} == {"by-depth"}
    assert set(expert_ranks("by-depth", ExpertDemand(SHAPES, LABELS, 4)).values()) == {7}
    with pytest.raises(InputError, match="stable-rank, uniform:K with K from 1, given or by-depth"):
        medlore.plan_ranks(tmp_path / "w.safetensors", rule="magic")
    for kind in (RankSettings, ExpertSettings):
        assert kind(rule="by-depth").rule == "by-depth"
        with pytest.raises(ValueError, match=r"accepted are stable-rank, .*by-depth"):
            kind(rule="magic")
    check = one_of_variants("shared")
    assert check("experts-by-depth") == "experts-by-depth"
    with pytest.raises(ValueError, match=r"accepted are shared, experts-stable-rank, .*experts-by-depth"):
        check("experts-magic")


def test_a_tuning_method_names_any_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a run are those of its method's rule."""
    monkeypatch.setitem(RULES, "by-depth", Rule("a toy", by_depth))
    monkeypatch.setitem(METHODS, "toy", replace(METHODS["lora"], rule="by-depth"))
    plan = choose_plan(FinetuneSettings(method="toy"), load_backbone("medlore:vit-mini", classes=2))
    assert plan is not None
    assert [layer.rank for layer in plan.layers][:5] == [1, 2, 3, 4, 5]


def test_rules_say_where_they_have_a_meaning(tmp_path: Path) -> None:
    save_file({"blocks.0.attn.qkv.weight": torch.randn(24, 8)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="--rule: 'task-size'"):
        medlore.plan_ranks(tmp_path / "w.safetensors", rule="task-size")
    with pytest.raises(InputError, match="--rule: 'stable-rank:4'"):
        medlore.plan_ranks(tmp_path / "w.safetensors", rule="stable-rank:4")
    with pytest.raises(InputError, match=r"'magic'.*stable-rank, uniform, given or task-size"):
        expert_ranks("magic", ExpertDemand(SHAPES, LABELS, 4))


def test_experts_at_equal_means() -> None:
    shapes = {"a": (32, 64), "b": (4, 8), "c": (32, 16, 3, 3)}
    assert set(expert_ranks("uniform", ExpertDemand(shapes, LABELS, 6)).items()) == {
        (("a", "head"), 6), (("a", "legs"), 6), (("b", "head"), 4), (("b", "legs"), 4), (("c", "head"), 6), (("c", "legs"), 6),
    }  # fmt: skip
    by_size = expert_ranks("task-size", ExpertDemand(shapes, LABELS, 8))
    assert (by_size["a", "head"], by_size["a", "legs"]) == (12, 4)  # roots 3 and 1, mean 2
    profile = fullness_by_depth([torch.eye(8), torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))], list(shapes))
    assert profile == pytest.approx({"a": 1.6, "b": 1.0, "c": 0.4})  # full, between, a quarter; mean 1
    spectral = expert_ranks("stable-rank", ExpertDemand(shapes, LABELS, 10, profile=profile))
    assert [spectral[layer, "head"] for layer in shapes] == [16, 4, 4]


def test_experts_at_equal_parameters() -> None:
    units = {"a.conv": 1, "b.conv": 1, "c.conv": 2}
    profile = {"a.conv": 2.0, "b.conv": 6.0, "c.conv": 3.0}
    demand = ExpertDemand(SHAPES, LABELS, 3, units=units, profile=profile, keep="parameters")
    uniform, spectral = expert_ranks("uniform", demand), expert_ranks("stable-rank", demand)
    assert uniform["c.conv", "legs"] == 6

    def parameters(ranks: dict[tuple[str, str], int]) -> int:
        return sum(r * (SHAPES[t][0] + int(np.prod(SHAPES[t][1:]))) for (t, _), r in ranks.items())

    assert 0 <= parameters(uniform) - parameters(spectral) < 0.1 * parameters(uniform)
    assert spectral["b.conv", "head"] / spectral["b.conv", "legs"] == pytest.approx(3, rel=0.2)  # root of 9
    with pytest.raises(InputError, match="stable-rank without a teacher"):
        expert_ranks("stable-rank", ExpertDemand(SHAPES, LABELS, 3, keep="parameters"))


def test_an_expert_is_a_plan_that_can_be_given_again(tmp_path: Path) -> None:
    profile = {"a.conv": 2.0, "b.conv": 6.0, "c.conv": 3.0}
    ranks = expert_ranks("stable-rank", ExpertDemand(SHAPES, LABELS, 3, profile=profile, keep="parameters"))
    files = write_expert_plans(tmp_path, ranks, SHAPES, rule="stable-rank", alpha="rank*2", source="student")
    assert [f.name for f in files] == ["head.json", "legs.json"]
    plan = RankPlan.load(files[0])
    assert {x.name: x.rank for x in plan.layers} == {t: ranks[t, "head"] for t in SHAPES}
    assert {plan.scaling(x) for x in plan.layers} == {2.0}
    given = ExpertDemand(SHAPES, LABELS, 1, given={"head": files[0], "legs": 2}, keep="parameters")
    again = expert_ranks("given", given)
    assert {t: again[t, "head"] for t in SHAPES} == {t: ranks[t, "head"] for t in SHAPES}
    assert {again[t, "legs"] for t in SHAPES} == {2}
    other = expert_plan("head", {("x", "head"): 2}, {"x": (4, 4)}, rule="given", alpha=1, source="s").save(tmp_path / "other.json")
    with pytest.raises(TargetError, match=r"(?s)4 layers do not fit.*a\.conv: no rank.*x: not a layer"):
        expert_ranks("given", ExpertDemand(SHAPES, {"head": 1}, 1, given={"head": other}))
    with pytest.raises(InputError, match=r"\['head'\].*for each of \['head', 'legs'\]"):
        expert_ranks("given", ExpertDemand(SHAPES, LABELS, 1, given={"head": 3}))
