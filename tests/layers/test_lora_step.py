"""The quick LoRA step is PEFT's: the same outputs, gradients and files, with fewer multiplications."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.layers.test_methods import installed, network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medlore.layers.lora import step as lora_step
from medlore.layers.lora.partial_update import install_partial_update
from medlore.layers.lora.step import FrozenLinear, QuickLora, quicken
from medlore.layers.lora.vit_step import shorten

RANKS = {".*q_proj": 3, ".*v_proj": 5, ".*o_proj": 2, ".*fc1": 4}


def tuned(**options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            target_modules="|".join(RANKS), rank_pattern=RANKS, lora_alpha=6, modules_to_save=["classifier"], **options
        )
        model = peft.get_peft_model(network(), config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.train()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def step_of(model: Any, *, count: int = 6, precision: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step."""
    torch.manual_seed(0)  # dropout
    with torch.autocast("cpu", precision, enabled=True) if precision else contextlib.nullcontext():
        made = model(pixel_values=images(count)).logits.float()
    nn.functional.cross_entropy(made, torch.arange(count) % 3).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return made.detach(), found


def largest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest relative distance of two sets of gradients."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in right)


@contextlib.contextmanager
def quick(model: Any, **how: Any) -> Iterator[None]:
    handle = quicken(model, **how)
    try:
        yield
    finally:
        handle.restore()


@pytest.mark.parametrize("logits_only", [False, True])
@pytest.mark.parametrize("count", [1, 6])  # 5 and 30 rows: factored and merged
def test_outputs_and_gradients_are_those_of_peft(count: int, logits_only: bool) -> None:
    model = tuned()
    logits, gradients = step_of(model, count=count)
    with quick(model, logits_only=logits_only):
        ours, own = step_of(model, count=count)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert largest(own, gradients) < 1e-4


def test_packed_weights_give_the_same_and_follow_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_step, "PACKED_ROWS", 2)
    used = []
    real = lora_step._packed_product
    monkeypatch.setattr(lora_step, "_packed_product", lambda *given: (used.append(len(given[0]) == given[-1]), real(*given))[1])
    model = tuned()
    expected = [step_of(model, count=count) for count in (6, 2)]  # 2: a short last batch
    with quick(model, packed_bytes=10_000):
        found = [step_of(model, count=count) for count in (6, 2)]
        layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and lora_step._PACKS in m.__dict__]
        copy.deepcopy(model)
        layers[0].weight.data = layers[0].weight.data * 2
        doubled, _ = step_of(model)
    assert set(used) == {True, False}
    assert 0 < sum(8 * layer.weight.numel() for layer in layers) <= 10_000
    for (ours, own), (logits, gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
        assert largest(own, gradients) < 1e-4
    torch.testing.assert_close(doubled, step_of(model)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(doubled, expected[0][0])


@pytest.mark.parametrize("mode", ["nested", "single"])
def test_partial_updates_train_the_same_components(mode: Any) -> None:
    model = tuned()
    install_partial_update(model, mode, seed=4).draw()
    logits, gradients = step_of(model)
    with quick(model, logits_only=True):
        ours, own = step_of(model)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(own[name] == 0, gradients[name] == 0) for name in own if "q_proj.lora_A" in name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6)


def test_under_autocast_it_is_as_near_to_float32_as_peft() -> None:
    model = tuned()
    exact_logits, exact = step_of(model)
    logits, gradients = step_of(model, precision=torch.bfloat16)
    with quick(model, logits_only=True):
        ours, own = step_of(model, precision=torch.bfloat16)
    assert (ours - exact_logits).abs().max() < 2 * (logits - exact_logits).abs().max()
    assert largest(own, exact) < 2 * largest(gradients, exact)
    assert {g.dtype for g in own.values()} == {torch.float32}


def test_it_multiplies_less_than_peft() -> None:
    """Counted, so it holds on every machine: the last block's unread tokens and the thin products."""

    def counted(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            step_of(model)
        return counter.get_total_flops()

    model = tuned()
    theirs = counted(model)
    with quick(model):
        factors = counted(model)
    with quick(model, logits_only=True):
        everything = counted(model)
    assert factors < 0.99 * theirs
    assert everything < 0.6 * theirs  # one of two blocks is the last; keys and values of all its tokens would make it 0.72


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=lambda o: next(iter(o)))
def test_what_it_does_not_cover_goes_the_way_of_peft(options: dict[str, Any]) -> None:
    model = tuned(**options)
    logits, gradients = step_of(model)
    with quick(model):
        ours, own = step_of(model)
    assert torch.equal(ours, logits)
    assert all(torch.equal(own[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_a_projection_with_a_hook_is_called(part: str) -> None:
    """Else whoever looks at keys and values would see those of all blocks but the last."""
    model = tuned()
    last = model.get_submodule(f"base_model.model.vit.layers.1.attention.{part}")
    seen: list[int] = []
    expected, _ = step_of(model)
    with quick(model, logits_only=True):
        step_of(model)
        last.register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
        found, _ = step_of(model)
    assert seen == [5]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_biases_that_train_have_their_gradients(precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_step, "PACKED_ROWS", 2)
    model = tuned(bias="all")
    logits, gradients = step_of(model, precision=precision)
    with quick(model):
        ours, own = step_of(model, precision=precision)
    assert sum(name.endswith("k_proj.bias") for name in gradients) == 2
    assert torch.equal(ours, logits)
    assert all(torch.equal(own[name], gradients[name]) for name in gradients)


@torch.no_grad()
def outputs_of_states(model: Any) -> list[Tensor]:
    """Logits in training mode: plain, adapters disabled, factors hooked, another adapter active, two at once, merged."""
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="gaussian"))
    model.get_submodule("base_model.model.vit.layers.1.attention.q_proj").lora_B["second"].weight.fill_(0.3)
    model.set_adapter("default")

    def logits() -> Tensor:
        made: Tensor = model(pixel_values=images()).logits
        return made

    found = [logits()]
    with model.disable_adapter():
        found.append(logits())
    factor = model.get_submodule("base_model.model.vit.layers.1.attention.q_proj").lora_A["default"]
    hook = factor.register_forward_hook(lambda *given: given[2] * 0)
    found.append(logits())
    hook.remove()
    for active in ("second", ["default", "second"]):
        model.base_model.set_adapter(active)
        found.append(logits())
    model.base_model.merge_adapter()
    found.append(logits())
    model.base_model.unmerge_adapter()
    model.set_adapter("default")
    return [*found, logits()]


def test_every_state_of_the_adapters_gives_what_peft_gives() -> None:
    expected = outputs_of_states(tuned())
    model = tuned()
    with quick(model):
        found = outputs_of_states(model)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(expected[:5]) for b in expected[:i])  # or nothing would be compared


def test_evaluation_is_peft_to_the_bit() -> None:
    model = tuned().eval()
    with torch.inference_mode():
        before = model(pixel_values=images()).logits
        with quick(model, logits_only=True):
            assert torch.equal(model(pixel_values=images()).logits, before)


def test_the_folder_is_that_of_peft(tmp_path: Path) -> None:
    model = tuned()
    model.save_pretrained(str(tmp_path / "peft"))
    with quick(model, logits_only=True):
        step_of(model, precision=torch.bfloat16)
        model.save_pretrained(str(tmp_path / "quick"))
        model.eval()
        logits = model(pixel_values=images()).logits
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "quick" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
    again = peft.PeftModel.from_pretrained(network(), str(tmp_path / "quick")).eval()
    assert torch.equal(again(pixel_values=images()).logits, logits)


def test_cast_copies_follow_their_weight_and_are_not_saved() -> None:
    model = tuned()
    with quick(model):
        names = set(model.state_dict())
        first, _ = step_of(model, precision=torch.bfloat16)
        assert set(model.state_dict()) == names
        frozen = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.training]
        with torch.no_grad():
            for linear in [*frozen, *(m.base_layer for m in model.modules() if isinstance(m, QuickLora))]:
                linear.weight.mul_(1.5)
        second, _ = step_of(model, precision=torch.bfloat16)
    fresh, _ = step_of(model, precision=torch.bfloat16)
    assert not torch.allclose(first, second, atol=0.1)
    torch.testing.assert_close(second, fresh, rtol=0.1, atol=0.1)


def test_a_method_trains_quickly_and_leaves_a_plain_network() -> None:
    tuning = installed("sr-lora", network())
    assert any(isinstance(m, QuickLora) for m in tuning.model.modules())
    assert isinstance(tuning.model, peft.PeftModel)
    merged = tuning.merged()
    assert {type(m).__module__.split(".")[0] for m in merged.modules()} <= {"torch", "transformers"}


def test_only_a_classifier_that_reads_the_first_token_is_shortened() -> None:
    seen: list[nn.Module] = []
    model = network()
    model.config.output_hidden_states = True
    shorten(model, lambda module, _kind: seen.append(module))
    shorten(nn.Sequential(nn.Linear(2, 2)), lambda module, _kind: seen.append(module))
    assert not seen
    model.config.output_hidden_states = False
    shorten(model, lambda module, _kind: seen.append(module))
    assert len(seen) == 3  # two attentions and the last block
