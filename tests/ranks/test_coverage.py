"""What a plan says of what it saw: rows identified by probing, parts of other sizes, tied copies, towers, MLPs that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import medlore
from medlore.errors import CheckpointError, DataError, TargetError
from medlore.ranks import RankPlan
from medlore.ranks.planned import row_indices
from medlore.ranks.targets import find_targets

D, HEADS = 16, 2
TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


class Fused(nn.Module):
    """An attention whose fused matrix is cut by `order`: (b, n, heads, rows of one head) or parts first."""

    def __init__(self, order: str, extra: str = "") -> None:
        super().__init__()
        self.order, self.extra = order, extra
        self.qkv, self.proj = nn.Linear(D, len(order) * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        made = self.qkv(x)
        if self.extra == "heads":
            pieces = made.view(b, n, HEADS, len(self.order), D // HEADS).permute(3, 0, 2, 1, 4)
        else:
            pieces = made.view(b, n, len(self.order), HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        part = dict(zip(self.order, pieces, strict=True))
        out = F.scaled_dot_product_attention(part["q"], part["k"], part["v"])
        out = out * part["g"].sigmoid() if "g" in part else out
        return self.proj(out.transpose(1, 2).reshape(b, n, D))

    def rows(self, letter: str) -> Tensor:
        w = self.qkv.weight.detach()
        if self.extra == "heads":
            return w.view(HEADS, len(self.order), -1, D)[:, self.order.index(letter)].reshape(-1, D)
        return w.view(len(self.order), -1, D)[self.order.index(letter)]


class FewKeys(nn.Module):
    """Four heads of q, two of k and v, in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 32, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([16, 8, 8], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


class KeysAndValues(nn.Module):
    """q apart, k and v fused."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.to_q, self.to_kv, self.to_out = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        part = dict(zip(self.order, self.to_kv(x).chunk(2, dim=-1), strict=True)) | {"q": self.to_q(x)}
        q, k, v = (part[p].unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in "qkv")
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def stable_rank(w: Tensor) -> float:
    s = np.linalg.svd(w.detach().double().numpy(), compute_uv=False)
    return float((s**2).sum() / s[0] ** 2)


def spread(model: nn.Module) -> nn.Module:
    """Spectra that tell the parts apart."""
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * torch.exp(torch.randn(len(parameter)))[:, None]
    return model


@pytest.mark.parametrize("extra", ["", "heads"])
@pytest.mark.parametrize("order", ["qkv", "kvq", "vkq", "qvk", "kqv"])
def test_rows_of_a_module_are_found_by_trying(order: str, extra: str) -> None:
    net = nn.ModuleDict({"attn": spread(Fused(order, extra))})
    plan = medlore.plan_ranks(net, include_k=True)
    assert [(s.outcome, s.order, s.parts) for s in plan.coverage] == [("taken", "probed", "q k v o")]
    for layer in plan.layers[:3]:
        exact = stable_rank(net["attn"].rows(layer.part))  # type: ignore[operator]
        assert layer.lower * (1 - 1e-9) <= exact <= layer.upper * (1 + 1e-9)  # type: ignore[operator]


@pytest.mark.case("fused_qkv_interleaved")
def test_zeroing_the_rows_called_k_leaves_v_alive() -> None:
    """The case of a public report: two heads, (q_h, k_h, v_h) rows."""
    net = nn.ModuleDict({"attn": Fused("qkv", "heads")})
    key = next(layer for layer in medlore.plan_ranks(net, include_k=True).layers if layer.part == "k")
    assert (key.rows, key.period, key.shape) == ((8, 16), 24, (16, 16))
    weight = net["attn"].qkv.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight[row_indices(key, len(weight))] = 0  # type: ignore[index,arg-type]
    left = {part: float(net["attn"].rows(part).norm()) for part in "qkv"}  # type: ignore[operator]
    assert left["k"] == 0
    assert left["q"] > 1 < left["v"]


def test_a_gate_among_the_rows_is_not_taken_for_q() -> None:
    with pytest.raises(TargetError, match="no weight answers") as caught:
        medlore.plan_ranks(nn.ModuleDict({"attn": Fused("qkvg")}))
    assert "do not act as q, k and v in any order" in caught.value.faults[0]


def test_fewer_keys_than_queries_in_a_module_and_in_a_file(tmp_path: Path) -> None:
    net = nn.ModuleDict({"attn": spread(FewKeys())})
    plan = medlore.plan_ranks(net, include_k=True)
    assert [(x.part, x.rows, x.shape) for x in plan.layers] == [
        ("q", (0, 16), (16, 16)), ("k", (16, 24), (8, 16)), ("v", (24, 32), (8, 16)), ("o", None, (16, 16)),
    ]  # fmt: skip
    save_file(net.state_dict(), tmp_path / "few.safetensors")
    with pytest.raises(TargetError) as caught:
        medlore.plan_ranks(tmp_path / "few.safetensors")
    assert "which are not of one size; give the model itself" in caught.value.faults[0]


@pytest.mark.parametrize("order", ["kv", "vk"])
def test_two_fused_parts(order: str) -> None:
    net = nn.ModuleDict({"attn": spread(KeysAndValues(order))})
    value = next(layer for layer in medlore.plan_ranks(net).layers if layer.part == "v")
    start = order.index("v") * D
    assert value.rows == (start, start + D)
    exact = stable_rank(net["attn"].to_kv.weight[start : start + D])  # type: ignore[union-attr, index]
    assert value.lower <= exact <= value.upper  # type: ignore[operator]


def test_interleaved_rows_train_apart_in_our_door_and_load_in_plain_peft(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = nn.ModuleDict({"attn": Fused("qkv", "heads")})
    plain = nn.ModuleDict({"attn": Fused("qkv", "heads")})
    plain.load_state_dict(net.state_dict())
    before = net["attn"].qkv.weight.detach().clone()  # type: ignore[union-attr, operator]
    plan = medlore.plan_ranks(net, rule="uniform:3")
    tuned = medlore.get_peft_model(net, plan)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    attention = tuned.base_model.model["attn"]
    x = torch.randn(2, 5, D)
    wanted = attention(x)
    tuned.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(loaded.base_model.model["attn"](x), wanted, atol=1e-5, rtol=1e-5)
    attention.qkv.merge()
    change = (attention.qkv.get_base_layer().weight - before).view(HEADS, 3, -1, D)
    assert change[:, 1].abs().max() == 0  # k of every head
    assert torch.linalg.matrix_rank(change[:, 0].reshape(-1, D)) == 3
    assert torch.linalg.matrix_rank(change[:, 2].reshape(-1, D)) == 3


def test_interleaved_factors_survive_our_own_file(tmp_path: Path) -> None:
    from medlore.layers.lora.fused_qkv import load_adapter, save_adapter

    net = nn.ModuleDict({"attn": Fused("qkv", "heads")})
    state = {k: v.clone() for k, v in net.state_dict().items()}
    plan = medlore.plan_ranks(net, rule="uniform:2")
    tuned = medlore.get_peft_model(net, plan)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    save_adapter(tuned, plan, tmp_path / "adapter")
    other = nn.ModuleDict({"attn": Fused("qkv", "heads")})
    other.load_state_dict(state)
    again = load_adapter(other, tmp_path / "adapter")
    kept = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, kept[n]) for n, p in again.named_parameters() if "lora_" in n)


def test_a_name_with_several_orders_is_left_out_of_a_file_and_tried_in_a_folder(tmp_path: Path) -> None:
    model = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**TEXT))
    model.save_pretrained(tmp_path)
    with pytest.raises(TargetError) as caught:
        medlore.plan_ranks(tmp_path / "model.safetensors")
    assert "heads one after the other in GPT-NeoX and Bloom, parts in others" in caught.value.faults[0]
    from_folder, direct = medlore.plan_ranks(tmp_path), medlore.plan_ranks(model)
    assert from_folder.layers == direct.layers
    assert {s.order for s in from_folder.coverage} == {"probed"}
    assert direct.layers[0].period == 24


@pytest.mark.case("mlp_missing_silently")
@pytest.mark.parametrize("family", ["Mixtral", "ModernBert"])
def test_an_mlp_is_found_by_its_shapes_or_as_stacked_experts(family: str) -> None:
    more = {"Mixtral": {"num_key_value_heads": 2, "num_local_experts": 4}, "ModernBert": {"cls_token_id": 1, "sep_token_id": 2}}[family]
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**TEXT | more))
    plan = medlore.plan_ranks(model, targets="attention+mlp")
    mlp = [layer for layer in plan.layers if layer.part == "mlp"]
    names = {"Mixtral": ("mlp.experts.down_proj", "mlp.experts.gate_up_proj"), "ModernBert": ("mlp.Wi", "mlp.Wo")}[family]
    assert [x.name for x in mlp] == [f"layers.{i}.{n}" for i in range(2) for n in names]
    weights = dict(model.named_parameters())
    for layer in mlp:
        w = weights[layer.key].detach()
        exact = np.mean([stable_rank(m) for m in (w if w.ndim == 3 else w[None])])
        assert layer.rank == round(exact)
        assert layer.experts == (4 if family == "Mixtral" else 1)
    tuned = medlore.get_peft_model(model, plan)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == plan.parameters
    ranks = {n: m.r["default"] for n, m in tuned.named_modules() if hasattr(m, "r") and "experts" in n}
    assert sorted(ranks.values()) == sorted(x.rank for x in mlp if x.experts > 1)


def test_an_mlp_that_is_nowhere_is_refused_and_one_that_lacks_is_reported() -> None:
    attention = {f"blocks.{i}.attn.{n}.weight": s for i in range(2) for n, s in (("qkv", (24, 8)), ("proj", (8, 8)))}
    with pytest.raises(TargetError, match="no MLP was found in any block"):
        find_targets(attention, "attention+mlp")
    for has, lacks in ((0, 1), (1, 0)):
        for names in (("mlp.fc1", "mlp.fc2"), ("feed.up", "feed.down")):
            some = {f"blocks.{has}.{name}.weight": shape for name, shape in zip(names, ((16, 8), (8, 16)), strict=True)}
            found = find_targets(attention | some, "attention+mlp")
            outcomes = {s.path: s.outcome for s in found.coverage if s.kind == "mlp"}
            assert outcomes == {f"blocks.{has}.attn": "taken", f"blocks.{lacks}.attn": "left out"}
            assert [t.group for t in found.targets if t.part == "mlp"] == [f"blocks.{has}.attn"] * 2


def test_tied_attentions_are_counted_once_and_reported(tmp_path: Path) -> None:
    first, second = (nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in ("q", "k", "v", "o")}) for _ in range(2))
    for name in ("q", "k", "v", "o"):
        second[name].weight = first[name].weight
    net = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"attn": a}) for a in (first, second))})
    plan = medlore.plan_ranks(net)
    assert [x.name for x in plan.layers] == [f"blocks.0.attn.{p}" for p in "qvo"]
    assert [(s.path, s.outcome, s.why) for s in plan.coverage] == [
        ("blocks.0.attn", "taken", ""),
        ("blocks.1.attn", "left out", "its weights are those of blocks.0.attn, which has their factor pairs"),
    ]
    torch.save(net.state_dict(), tmp_path / "tied.pth")
    assert medlore.plan_ranks(tmp_path / "tied.pth").coverage == plan.coverage


def test_towers_are_chosen_and_reported() -> None:
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=TEXT,
            vision_config={k: v for k, v in TEXT.items() if not k.endswith("_id") and k != "vocab_size"}
            | {"image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    by_default = medlore.plan_ranks(model)
    assert by_default.layers == medlore.plan_ranks(model, tower="vision").layers
    assert {x.name.split(".")[0] for x in by_default.layers} == {"vision_model"}
    assert [s.outcome for s in by_default.coverage] == ["left out"] * 2 + ["taken"] * 2
    assert {x.name.split(".")[0] for x in medlore.plan_ranks(model, tower="text").layers} == {"text_model"}
    both = medlore.plan_ranks(model, tower="both")
    assert len(both.layers) == 2 * len(by_default.layers)
    assert both.for_model(model).layers == both.layers


def test_an_index_that_promises_more_than_its_shards_hold(tmp_path: Path) -> None:
    state = {f"blocks.0.attn.{n}.weight": torch.randn(s, 8) for n, s in (("qkv", 24), ("proj", 8))}
    save_file(state, tmp_path / "a.safetensors")
    promised = {**dict.fromkeys(state, "a.safetensors"), "blocks.1.attn.qkv.weight": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": promised}))
    with pytest.raises(CheckpointError, match=r"(?s)1 of 3 tensors that it lists are in no shard.*blocks\.1\.attn\.qkv\.weight"):
        medlore.plan_ranks(tmp_path)


@pytest.mark.case("timm_hub_folder")
def test_a_timm_folder_is_read_by_its_names(tmp_path: Path) -> None:
    state = {f"blocks.{i}.attn.{n}.weight": torch.randn(s, 48) for i in range(2) for n, s in (("qkv", 144), ("proj", 48))}
    save_file(state, tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert medlore.plan_ranks(tmp_path).layers == medlore.plan_ranks(tmp_path / "model.safetensors").layers


def test_the_report_is_in_the_file_and_older_files_still_load(tmp_path: Path) -> None:
    plan = medlore.plan_ranks(nn.ModuleDict({"attn": Fused("qkv", "heads")}))
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    assert content["coverage"][0]["order"] == "probed"
    assert RankPlan.load(path) == plan
    old: dict[str, Any] = {k: v for k, v in content.items() if k not in ("coverage", "tower")} | {"schema": "medlore/rank-plan/1"}
    old["layers"] = [{k: v for k, v in x.items() if k not in ("period", "experts")} | {"rows": None} for x in content["layers"][-1:]]
    path.write_text(json.dumps(old))
    assert RankPlan.load(path).layers == plan.layers[-1:]
    content["layers"][0]["period"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="rows: as many as the shape has"):
        RankPlan.load(path)
