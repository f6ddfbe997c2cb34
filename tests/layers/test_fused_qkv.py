"""The door: q and v apart, k untouched, PEFT's files and methods, in timm-like and nn.MultiheadAttention models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import medlore
from medlore.errors import CheckpointError, InputError, TargetError
from medlore.layers.lora.fused_attention import times_out_proj_is_added
from medlore.layers.lora.fused_qkv import load_adapter, save_adapter

D, HEADS = 24, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class Timm(nn.Module):
    """A fused `qkv`, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        return x + self.attn(y, y, y, need_weights=False)[0]


class OpenClip(nn.Module):
    """`in_proj_weight`, as in open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(ResidualBlock(), ResidualBlock())
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.resblocks(x).mean(1))


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, whose fast path reads weights past the attention layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask).mean(1)


MODELS = {"timm": Timm, "open_clip": OpenClip, "encoder": Encoder}
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


def fill(model: nn.Module, seed: int = 1) -> None:
    """Values as after some training: no factor stays zero."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn(p.shape, generator=g)


def trained(kind: str, **options: Any) -> tuple[nn.Module, medlore.RankPlan, Any]:
    """An untouched base model, its plan, and a tuned copy."""
    base = MODELS[kind]()
    plan = medlore.plan_ranks(base, **options)
    tuned = medlore.get_peft_model(copy.deepcopy(base), plan)
    fill(tuned)
    return base, plan, tuned.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_before_training_nothing_changes(kind: str) -> None:
    base = MODELS[kind]()
    plan = medlore.plan_ranks(base)
    tuned = medlore.get_peft_model(copy.deepcopy(base), plan)
    assert isinstance(tuned, peft.PeftModel)
    torch.testing.assert_close(tuned(X), base(X), atol=1e-6, rtol=0)
    trainable = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == plan.parameters
    assert {n.rsplit(".", 1)[1] for n in trainable if "qkv" in n or "attn.lora" in n} <= {"q", "v"}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("alpha", ["rank", "rank*0.5", 1, "rslora*4"])
@pytest.mark.parametrize("include_k", [False, True])
def test_output_is_that_of_the_formula(kind: str, alpha: str | float, include_k: bool) -> None:
    """Against base weights to which scaling · B A was added by hand, part by part."""
    base, plan, tuned = trained(kind, alpha=alpha, include_k=include_k)
    plain = copy.deepcopy(base).eval()
    for layer in plan.layers:
        wrapped = tuned.base_model.model.get_submodule(layer.name.replace(".out_proj", ".base_layer.out_proj"))
        A, B = wrapped.lora_A["default"], wrapped.lora_B["default"]
        part = "o" if layer.rows is None and kind != "timm" else layer.part
        a, b = (A.weight, B.weight) if part == "o" and kind == "timm" else (A.part(part), B.part(part))
        weight = plain.get_submodule(layer.name).get_parameter(layer.tensor)
        rows = slice(*layer.rows) if layer.rows else slice(None)
        weight.data[rows] += (plan.scaling(layer) * b @ a).detach()
    torch.testing.assert_close(tuned(X), plain(X), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_k_rows_of_the_update_are_zero_and_k_gets_no_gradient(kind: str) -> None:
    _, plan, tuned = trained(kind)
    layer = tuned.base_model.model.get_submodule(plan.layers[0].name)
    update = layer.get_delta_weight("default")
    assert update.shape == (3 * D, D)
    assert not update[D : 2 * D].any()
    assert update[:D].any()
    assert update[2 * D :].any()


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_q_and_v_are_apart_in_training(kind: str) -> None:
    """A loss on v alone moves nothing of q; PEFT's single pair would share rows."""
    _, plan, tuned = trained(kind)
    layer = tuned.base_model.model.get_submodule(plan.layers[0].name)
    delta = layer.lora_B["default"].active_weight() @ layer.lora_A["default"].active_weight()
    delta[2 * D :].square().sum().backward()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.part("v").grad.any()
    assert B.part("v").grad.any()
    assert A.part("q").grad is None or not A.part("q").grad.any()
    assert B.part("q").grad is None or not B.part("q").grad.any()


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
@pytest.mark.parametrize("alpha", ["rank", 3, "rslora*4"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_saved_folder_is_an_ordinary_lora(kind: str, alpha: str | float, mode: str, tmp_path: Path) -> None:
    base, plan, tuned = trained(kind, alpha=alpha)
    expected = tuned(X)
    tuned.train(mode == "train")
    save_adapter(tuned, plan, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "rank_plan.json"}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    fused = next(k for k in stored if k.endswith("lora_B.weight") and ("qkv" in k or "attn.lora" in k))
    rank = max(plan.layers[0].rank + plan.layers[1].rank, plan.layers[2].rank if kind == "open_clip" else 0)
    assert stored[fused].shape == (3 * D, rank)
    assert not stored[fused][D : 2 * D].any()
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(plain(X), expected, atol=1e-6, rtol=0)
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).merge_and_unload().eval()
    torch.testing.assert_close(merged(X), expected, atol=2e-6, rtol=0)
    again = load_adapter(copy.deepcopy(base), tmp_path / "adapter", trainable=True)
    torch.testing.assert_close(again.eval()(X), expected, atol=1e-6, rtol=0)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == plan.parameters
    assert {n.rsplit(".", 1)[1] for n, p in again.named_parameters() if p.requires_grad and fused[17:-14] in n} <= {"q", "v", "o"}


def test_state_dict_round_trip_is_exact_for_scaling_one() -> None:
    base, plan, tuned = trained("timm")
    other = medlore.get_peft_model(copy.deepcopy(base), plan)
    missing = other.load_state_dict(tuned.state_dict())
    assert not missing.missing_keys
    assert torch.equal(other.eval()(X), tuned(X))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), tuned.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:All adapters are already merged", "ignore:Already unmerged")  # PEFT asks out_proj twice
@pytest.mark.parametrize("kind", MODELS)
def test_merging_equals_the_forward_and_comes_back(kind: str) -> None:
    base, _, tuned = trained(kind)
    expected = tuned(X)
    tuned.merge_adapter()
    torch.testing.assert_close(tuned(X), expected, atol=2e-6, rtol=0)
    tuned.unmerge_adapter()
    torch.testing.assert_close(tuned(X), expected, atol=2e-6, rtol=0)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(X), base.eval()(X), atol=2e-6, rtol=0)
    merged = tuned.merge_and_unload()
    assert type(merged) is MODELS[kind]
    torch.testing.assert_close(merged(X), expected, atol=2e-6, rtol=0)


def test_attention_base_weights_do_not_drift() -> None:
    """PEFT's own layer adds and subtracts the update at each forward."""
    base, _, tuned = trained("open_clip")
    for _ in range(50):
        tuned(X)
    kept = dict(tuned.base_model.model.named_parameters())
    for name, weight in base.named_parameters():
        there = kept[name.replace("attn.", "attn.base_layer.").replace("out_proj.", "out_proj.base_layer.")]
        assert torch.equal(there, weight), name


def test_how_often_peft_adds_the_output_projection() -> None:
    """Measured, not believed: PEFT's own forward on a layer with known factors."""
    attention = nn.MultiheadAttention(4, 1, batch_first=True)
    tuned = peft.get_peft_model(
        nn.ModuleDict({"attn": copy.deepcopy(attention)}),
        peft.LoraConfig(r=2, lora_alpha=2, target_modules="attn", init_lora_weights=False),
    )
    layer = tuned.base_model.model.attn
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        attention.in_proj_weight += layer.get_delta_weight("default")
        attention.out_proj.weight += times_out_proj_is_added() * layer.base_layer.out_proj.get_delta_weight("default")
    torch.testing.assert_close(layer(x, x, x)[0], attention(x, x, x)[0])


def test_fast_path_of_the_encoder_layer_does_not_lose_the_update() -> None:
    base, _, tuned = trained("encoder")
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        quick, masked = tuned(X), tuned(X, mask)
    torch.testing.assert_close(quick, tuned(X).detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(masked[1:], quick[1:], atol=1e-6, rtol=0)
    assert (quick - base.eval()(X)).abs().max() > 0.01


def test_an_adapter_trained_further_in_plain_peft_is_refused(tmp_path: Path) -> None:
    base, plan, tuned = trained("timm")
    folder = save_adapter(tuned, plan, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    key = next(k for k in stored if "qkv.lora_B" in k)
    stored[key][D + 1, 0] = 0.5
    save_file(stored, file)
    with pytest.raises(CheckpointError, match=r"(?s)1 tensors do not fit.*outside the blocks of q, k and v"):
        load_adapter(copy.deepcopy(base), folder)


def test_an_adapter_of_another_plan_is_refused(tmp_path: Path) -> None:
    base, plan, tuned = trained("timm")
    folder = save_adapter(tuned, plan, tmp_path / "adapter")
    other = medlore.plan_ranks(base, rule="uniform:2")
    with pytest.raises(CheckpointError, match=r"(?s)tensors do not fit.*shape"):
        load_adapter(copy.deepcopy(base), folder, plan=other)
    with pytest.raises(TargetError, match="hold other weights"):
        load_adapter(Timm(), folder)
    with pytest.raises(InputError, match="no such file"):
        load_adapter(base, tmp_path)


def test_head_and_options_of_peft_are_kept(tmp_path: Path) -> None:
    base = Timm()
    plan = medlore.plan_ranks(base)
    tuned = medlore.get_peft_model(copy.deepcopy(base), plan, modules_to_save=["head"], lora_dropout=0.3)
    fill(tuned)
    expected = tuned.eval()(X)
    folder = save_adapter(tuned, plan, tmp_path / "adapter")
    again = load_adapter(copy.deepcopy(base), folder)
    torch.testing.assert_close(again.eval()(X), expected, atol=1e-6, rtol=0)
    assert again.peft_config["default"].lora_dropout == 0.3
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}, {"lora_bias": True}])
def test_options_that_fused_matrices_do_not_allow(option: dict[str, Any]) -> None:
    base = Timm()
    with pytest.raises(InputError, match="on a fused qkv matrix"):
        medlore.get_peft_model(base, medlore.plan_ranks(base), **option)


def test_a_lone_output_projection_of_an_attention_layer_is_refused() -> None:
    base = OpenClip()
    plan = medlore.plan_ranks(base, targets=r".*out_proj")
    with pytest.raises(TargetError, match=r"(?s)2 output projections.*resblocks\.0\.attn\.out_proj"):
        medlore.get_peft_model(base, plan)


def test_in_proj_without_output_projection() -> None:
    base = OpenClip()
    plan = medlore.plan_ranks(base, targets=r".*attn")
    tuned = medlore.get_peft_model(copy.deepcopy(base), plan)
    fill(tuned)
    expected = tuned.eval()(X)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == plan.parameters
    torch.testing.assert_close(tuned.merge_and_unload()(X), expected, atol=2e-6, rtol=0)


def test_separate_projections_go_through_peft_unchanged() -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    base = transformers.ViTModel(config)
    plan = medlore.plan_ranks(base, alpha="rslora*2")
    tuned = medlore.get_peft_model(base, plan)
    assert tuned.peft_config["default"].use_rslora
    assert {type(m) for m in tuned.modules() if isinstance(m, peft.tuners.lora.LoraLayer)} == {peft.tuners.lora.Linear}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_half_precision_base(kind: str, dtype: torch.dtype) -> None:
    base = MODELS[kind]().to(dtype)
    tuned = medlore.get_peft_model(base, medlore.plan_ranks(base))
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    out = tuned(X.to(dtype))
    out.float().sum().backward()
    assert out.isfinite().all()
