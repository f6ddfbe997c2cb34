"""Stochastic partial update: the formula, the gradient pattern, the draws, and that nothing of it leaks into saving or evaluation."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import medlore
from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.layers.lora.partial_update import PartialUpdate, install_partial_update

X = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """One attention module with a fused qkv and one convolution; cheap enough to check by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(12, 36), "proj": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, dim=-1)
        return self.attn["proj"](q * k + v)


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def fill(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=g)


def linear(r: int = 5, alpha: float = 3.0, *, use_rslora: bool = False) -> Any:
    """One PEFT linear layer with filled factors."""
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules="0", use_rslora=use_rslora)
    torch.manual_seed(2)
    tuned = peft.get_peft_model(nn.Sequential(nn.Linear(12, 7)), config)
    fill(tuned)
    return tuned


MODELS = {"fused": Fused, "multihead": Multihead, "convolutions": Convolutions}


def tuned_model(kind: str, alpha: str | float = "rank") -> Any:
    base = MODELS[kind]()
    plan = medlore.plan_ranks(base, targets="conv" if kind == "convolutions" else "attention", rule="uniform:3", alpha=alpha)
    tuned = medlore.get_peft_model(base, plan)
    fill(tuned)
    return tuned


@pytest.mark.parametrize("mode", ["nested", "single"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("b", [1, 2, 5])
def test_update_is_alpha_over_b_times_the_first_b_components(mode: Any, use_rslora: bool, b: int) -> None:
    tuned = linear(use_rslora=use_rslora)
    layer = tuned.base_model.model[0]
    A, B = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    handle = install_partial_update(tuned, mode)
    next(iter(handle.truncations.values())).active = b
    scaling = 3.0 / (math.sqrt(b) if use_rslora else b)
    expected = layer.base_layer(X) + scaling * X @ (B[:, :b] @ A[:b]).T
    torch.testing.assert_close(tuned.train()(X), expected, atol=1e-5, rtol=1e-5)
    full = layer.base_layer(X) + 3.0 / (math.sqrt(5) if use_rslora else 5) * X @ (B @ A).T
    torch.testing.assert_close(tuned.eval()(X), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "touched"), [("nested", [0, 1, 2]), ("single", [2])])
def test_gradient_touches_exactly_the_trained_components(mode: Any, touched: list[int]) -> None:
    tuned = linear()
    handle = install_partial_update(tuned, mode)
    next(iter(handle.truncations.values())).active = 3
    x = X.clone().requires_grad_()
    tuned.train()(x).square().sum().backward()
    layer = tuned.base_model.model[0]
    rows = layer.lora_A["default"].weight.grad.abs().sum(1).nonzero().flatten().tolist()
    columns = layer.lora_B["default"].weight.grad.abs().sum(0).nonzero().flatten().tolist()
    assert rows == columns == touched
    assert x.grad is not None  # earlier layers learn from all active components
    other = linear()
    install_partial_update(other, "nested").truncations["base_model.model.0"].active = 3
    y = X.clone().requires_grad_()
    other.train()(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["nested", "single"])
def test_evaluation_merging_and_saving_know_nothing_of_it(kind: str, mode: Any) -> None:
    tuned = tuned_model(kind)
    x = X if kind != "convolutions" else X.reshape(4, 3, 12)
    expected, state = tuned.eval()(x), copy.deepcopy(tuned.state_dict())
    handle = install_partial_update(tuned, mode, seed=3)
    outputs = []
    for _ in range(6):
        handle.draw()
        outputs.append(tuned.train()(x).detach())
        assert torch.equal(tuned.eval()(x), expected)
        assert torch.equal(tuned.eval()(x), expected)
    assert any(not torch.allclose(outputs[0], o) for o in outputs[1:])
    assert tuned.state_dict().keys() == state.keys()
    assert all(torch.equal(tuned.state_dict()[k], state[k]) for k in state)
    tuned.train()
    torch.testing.assert_close(copy.deepcopy(tuned).merge_and_unload().eval()(x), expected, atol=1e-4, rtol=1e-4)
    before = [id(p) for p in tuned.parameters() if p.requires_grad]
    handle.remove()
    assert [id(p) for p in tuned.parameters() if p.requires_grad] == before
    torch.testing.assert_close(tuned.train()(x), expected)


@pytest.mark.parametrize("kind", ["fused", "multihead"])
def test_q_and_v_are_drawn_and_cut_apart(kind: str) -> None:
    tuned = tuned_model(kind, alpha=2)
    layer = tuned.base_model.model.attn if kind == "multihead" else tuned.base_model.model.attn["qkv"]
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    handle = install_partial_update(tuned, "nested")
    name = next(n for n in handle.truncations if n.endswith("[q]"))
    handle.truncations[name].active = 1
    handle.truncations[name.replace("[q]", "[v]")].active = 2
    tuned.train()
    delta = (B.active_weight() @ A.active_weight()).detach()
    q = 2.0 / 1 * B.part("q")[:, :1] @ A.part("q")[:1]
    v = 2.0 / 2 * B.part("v")[:, :2] @ A.part("v")[:2]
    torch.testing.assert_close(delta, torch.cat([q, torch.zeros(12, 12), v]).detach())
    draws = [handle.draw() for _ in range(40)]
    assert any(d[name] != d[name.replace("[q]", "[v]")] for d in draws)


def test_forward_of_the_fused_layer_uses_the_cut_factors() -> None:
    tuned = tuned_model("fused")
    handle = install_partial_update(tuned, "nested", seed=5)
    handle.draw()
    tuned.train()
    layer = tuned.base_model.model.attn["qkv"]
    delta = layer.lora_B["default"].active_weight() @ layer.lora_A["default"].active_weight()
    torch.testing.assert_close(layer(X), layer.base_layer(X) + X @ delta.T, atol=1e-5, rtol=1e-5)


def test_draws_are_uniform_seeded_and_resumable() -> None:
    tuned = linear(r=4)
    handle = install_partial_update(tuned, "nested", seed=7)
    drawn = [next(iter(handle.draw().values())) for _ in range(4000)]
    counts = Counter(drawn)
    assert set(counts) == {1, 2, 3, 4}
    assert all(abs(c - 1000) < 150 for c in counts.values())  # five standard deviations
    state = handle.state_dict()
    ahead = [handle.draw() for _ in range(10)]
    handle.load_state_dict(state)
    assert [t.active for t in handle.truncations.values()] == [drawn[-1]]
    assert [handle.draw() for _ in range(10)] == ahead
    again = install_partial_update(linear(r=4), "nested", seed=7)
    assert [next(iter(again.draw().values())) for _ in range(20)] == drawn[:20]
    other = install_partial_update(linear(r=4), "nested", seed=8)
    assert [next(iter(other.draw().values())) for _ in range(20)] != drawn[:20]


def test_global_randomness_is_left_alone() -> None:
    handle = install_partial_update(linear(), "nested")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    handle.draw()
    assert torch.equal(torch.rand(2), expected)


def test_off_installs_nothing() -> None:
    tuned = linear()
    kind = type(tuned.base_model.model[0].lora_A["default"])
    handle = install_partial_update(tuned, "off")
    assert isinstance(handle, PartialUpdate)
    assert handle.draw() == {}
    assert type(tuned.base_model.model[0].lora_A["default"]) is kind


def test_all_components_learn_over_many_steps() -> None:
    tuned = linear()
    layer = tuned.base_model.model[0]
    nn.init.zeros_(layer.lora_B["default"].weight)
    handle = install_partial_update(tuned, "single", seed=1)
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        handle.draw()
        optimiser.zero_grad()
        tuned.train()(X).sum().backward()
        optimiser.step()
    assert (layer.lora_B["default"].weight.abs().sum(0) > 0).all()


def test_wrong_use() -> None:
    with pytest.raises(UnknownNameError, match="--partial-update: unknown name 'neste'"):
        install_partial_update(linear(), "neste")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="no LoRA layer of adapter 'default'"):
        install_partial_update(nn.Linear(3, 3), "nested")
    tuned = linear()
    install_partial_update(tuned, "nested")
    with pytest.raises(TargetError, match=r"(?s)1 layers cannot.*installed already"):
        install_partial_update(tuned, "single")
    plain = peft.get_peft_model(Multihead(), peft.LoraConfig(r=2, target_modules="attn"))
    with pytest.raises(TargetError, match="PEFT's own attention layer"):
        install_partial_update(plain, "nested")
    dora = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules="0", use_dora=True))
    with pytest.raises(TargetError, match="a LoRA variant"):
        install_partial_update(dora, "nested")
    with pytest.raises(InputError, match="mode 'single' with 1"):
        install_partial_update(linear(), "nested").load_state_dict(install_partial_update(linear(), "single").state_dict())
