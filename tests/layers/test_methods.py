"""The contract of a tuning method: it trains the head, what it writes gives the same output elsewhere, merging changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.layers import surgery
from medlore.layers.surgery import load_trainable_state, trainable_state
from medlore.layers.tuning.methods import METHODS, Request, Tuning, install_method
from medlore.ranks.allocate import plan_ranks

STEPS = 6
FACTOR_METHODS = [name for name, method in METHODS.items() if method.rule is not None and name != "glora"]  # saved as LoRA
OWN_WEIGHTS = ("linear-probe", "bitfit", "partial", "full")


def network() -> Any:
    import transformers

    torch.manual_seed(5)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4, num_labels=3
        )
    )
    for parameter in model.parameters():  # the small default initialisation would hide differences
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def installed(name: str, model: nn.Module, **changes: Any) -> Tuning:
    plan = (
        None
        if METHODS[name].rule is None
        else plan_ranks(model, rule=f"uniform:{4 if name == 'melora' else 3}", alpha="rslora" if name == "rslora" else "rank")
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    fields = {"head": "classifier", "sample": x[:1], "plan": plan, "steps": STEPS, "last_blocks": 1, "batches": lambda: [x, x + 1]}
    return install_method(name, model, Request(**{**fields, **changes}))


def train(tuning: Tuning, *, steps: int = STEPS, start: int = 0, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.AdamW([p for p in tuning.model.parameters() if p.requires_grad], lr=0.02)
    tuning.model.train()
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 3, 8, 8, generator=draw), torch.randint(0, 3, (6,), generator=draw)
        torch.manual_seed(step)  # dropout
        tuning.before_step()
        nn.functional.cross_entropy(tuning.model(pixel_values=x).logits, y).backward()
        optimizer.step()
        tuning.after_backward(step)
        optimizer.zero_grad(set_to_none=True)
    tuning.model.eval()
    return optimizer


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(pixel_values=torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))).logits
    return out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_head_and_changes_the_output(name: str) -> None:
    before = logits(network())
    tuning = installed(name, network())
    trained = sum(p.numel() for p in tuning.model.parameters() if p.requires_grad)
    assert trained >= 3 * 33
    assert trained < sum(p.numel() for p in network().parameters()) or name == "full"
    train(tuning)
    assert (logits(tuning.model) - before).abs().max() > 0.05
    head = tuning.model.get_submodule("base_model.model.classifier" if hasattr(tuning.model, "peft_config") else "classifier")
    assert not any(torch.equal(p, network().classifier.weight) for p in head.parameters() if p.requires_grad and p.ndim == 2)


@pytest.mark.parametrize("name", FACTOR_METHODS)
def test_adapter_loads_in_plain_peft_and_merges_to_the_same(name: str, tmp_path: Path) -> None:
    import peft

    tuning = installed(name, network())
    train(tuning)
    expected = logits(tuning.model)
    tuning.save(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(network(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), expected, atol=1e-5)
    assert torch.allclose(logits(tuning.merged()), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["linear-probe", "bitfit", "partial"])
def test_trained_tensors_alone_bring_the_model_back(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tuning = installed(name, network())
    train(tuning)
    tuning.save(tmp_path / "weights")
    stored = load_file(tmp_path / "weights" / "trained.safetensors")
    other = network()
    before = logits(other)
    load_trainable_state(other, stored, expected=trainable_state(tuning.model))
    assert torch.equal(logits(other), logits(tuning.model))
    assert not torch.allclose(before, logits(other))
    assert set(stored) == set(trainable_state(tuning.model))


def test_what_trains_is_what_the_name_says() -> None:
    names = {m: {n for n, p in installed(m, network()).model.named_parameters() if p.requires_grad} for m in OWN_WEIGHTS}
    assert names["linear-probe"] == {"classifier.weight", "classifier.bias"}
    assert all(n.endswith(".bias") for n in names["bitfit"] - {"classifier.weight"})
    assert "vit.layernorm.bias" in names["bitfit"]
    assert {n.split(".layers.")[1][0] for n in names["partial"] if ".layers." in n} == {"1"}
    assert "vit.layernorm.weight" in names["partial"]
    assert names["full"] == {n for n, _ in network().named_parameters()}


def test_base_weights_stay_untouched_by_factor_methods() -> None:
    model = network()
    kept = copy.deepcopy(model.state_dict())
    tuning = installed("sr-lora", model)
    train(tuning)
    base = {n.replace(".base_layer", ""): p for n, p in tuning.model.base_model.model.named_parameters() if "lora_" not in n}  # type: ignore[union-attr]
    assert all(torch.equal(kept[n], p) for n, p in base.items() if n in kept and "classifier" not in n)


@pytest.mark.parametrize("mode", ["nested", "single"])
def test_partial_update_draws_anew_each_step_and_evaluates_at_full_rank(mode: Any, tmp_path: Path) -> None:
    import peft

    tuning = installed("sr-lora", network(), partial_update=mode)
    train(tuning)
    expected = logits(tuning.model)
    assert torch.equal(expected, logits(tuning.model))
    tuning.before_step()  # a draw in between must not matter
    assert torch.equal(expected, logits(tuning.model))
    tuning.save(tmp_path / "adapter")
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(network(), str(tmp_path / "adapter")).eval()), expected, atol=1e-5)
    plain = installed("sr-lora", network())
    train(plain)
    assert not torch.allclose(logits(plain.model), expected, atol=1e-3)


@pytest.mark.parametrize("name", [*METHODS, "nested"])
def test_state_goes_on_exactly_where_it_stopped(name: str) -> None:
    method, changes = ("sr-lora", {"partial_update": "nested"}) if name == "nested" else (name, {})
    whole = installed(method, network(), **changes)
    train(whole)
    first = installed(method, network(), **changes)
    optimizer = train(first, steps=3)
    weights, state, moments = copy.deepcopy((dict(trainable_state(first.model)), first.state(), optimizer.state_dict()))
    second = installed(method, network(), **changes)
    load_trainable_state(second.model, weights)
    second.restore(state)
    resumed = torch.optim.AdamW([p for p in second.model.parameters() if p.requires_grad], lr=0.02)
    resumed.load_state_dict(moments)
    train(second, steps=3, start=3, optimizer=resumed)
    assert torch.equal(logits(second.model), logits(whole.model))


def test_adalora_prunes_to_its_target_and_saves_unequal_ranks(tmp_path: Path) -> None:
    import json

    tuning = installed("adalora", network(), steps=30)
    train(tuning, steps=30)
    tuning.save(tmp_path / "adapter")
    ranks = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(ranks.values()) <= 3 * 6
    assert len(set(ranks.values())) > 1


def test_pissa_starts_from_the_unchanged_output() -> None:
    assert torch.allclose(logits(installed("pissa", network()).model), logits(network()), atol=1e-5)


def test_eva_looks_at_the_data_and_shares_ranks_out() -> None:
    seen: list[int] = []

    def look() -> list[Tensor]:
        seen.append(1)
        return [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))]

    tuning = installed("eva", network(), batches=look)
    assert seen
    ranks = {n: p.shape[0] for n, p in tuning.model.named_parameters() if "lora_A" in n}
    assert sum(ranks.values()) == 3 * 6
    assert len(set(ranks.values())) > 1


def test_wrong_use() -> None:
    with pytest.raises(UnknownNameError, match="'sr-lora'"):
        installed_unknown("sr-lor")
    with pytest.raises(InputError, match="partial-update: 'nested' with --method dora"):
        installed("dora", network(), partial_update="nested")
    for changes in ({"partial_update": "nested"}, {}):
        name = "sr-lora" if changes else "lora"
        with pytest.raises(InputError, match=f"component-masks: 'shapley' with --method {name}"):
            installed(name, network(), component_masks="shapley", **changes)
    with pytest.raises(InputError, match="1 to 2 for this model"):
        installed("partial", network(), last_blocks=3)
    with pytest.raises(InputError, match="no rank plan"):
        install_method("lora", network(), Request(head="classifier", sample=torch.zeros(1, 3, 8, 8)))


def installed_unknown(name: str) -> Tuning:
    return install_method(name, network(), Request(head="classifier", sample=torch.zeros(1, 3, 8, 8)))


# ---- surgery ---------------------------------------------------------------------------------------------------------------


def test_blocks_are_found_by_structure() -> None:
    import transformers as t

    swin = t.SwinForImageClassification(
        t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4)
    )
    assert surgery.blocks_of(swin) == [f"swin.encoder.layers.{s}.blocks.{b}" for s, b in ((0, 0), (0, 1), (1, 0))]
    assert surgery.blocks_of(network()) == ["vit.layers.0", "vit.layers.1"]


def test_unused_parameters_are_frozen() -> None:
    import transformers as t

    model = t.Dinov2ForImageClassification(
        t.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, num_labels=2)
    )
    assert surgery.freeze_unused(model, torch.randn(1, 3, 8, 8)) == ["dinov2.embeddings.mask_token"]


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    surgery.freeze(model)
    model[2].requires_grad_(True)
    surgery.set_training(model)
    model(torch.randn(2, 3, 4, 4))
    assert not model[1].training
    assert model[2].training
    assert set(surgery.trainable_state(model)) == {"2.weight", "2.bias", "2.running_mean", "2.running_var", "2.num_batches_tracked"}


def test_foreign_state_is_refused_with_a_list() -> None:
    with pytest.raises(TargetError, match="2 do not fit") as caught:
        load_trainable_state(network(), {"nose": torch.zeros(1), "classifier.bias": torch.zeros(7)}, expected=())
    assert "nose: not in the model" in str(caught.value)
    assert "classifier.bias: (7,) stored, (3,) in the model" in str(caught.value)


def test_a_state_that_lacks_trained_tensors_is_refused_by_name() -> None:
    model = network()
    surgery.freeze(model)
    surgery.thaw_head(model, "classifier")
    before = model.classifier.bias.detach().clone()
    with pytest.raises(TargetError, match="1 do not fit") as caught:
        load_trainable_state(model, {"classifier.bias": before + 1})
    assert "classifier.weight: missing" in str(caught.value)
    assert torch.equal(model.classifier.bias, before)
    load_trainable_state(model, {"classifier.bias": before + 1}, expected=["classifier.bias"])
    assert torch.equal(model.classifier.bias, before + 1)


def test_without_head_gives_its_input_and_puts_it_back() -> None:
    model = network()
    head = model.classifier
    with surgery.without_head(model, "classifier") as body:
        features = logits(body)
    assert model.classifier is head
    assert torch.allclose(head(features.clone()), logits(model), atol=1e-6)


def test_adalora_is_pulled_towards_orthogonal_factors() -> None:
    """PEFT adds its penalty only to a loss that the network computes itself; ours must not go without."""
    tuning = installed("adalora", network(), steps=30)
    assert tuning.penalty is not None
    factors = {n: p for n, p in tuning.model.named_parameters() if "lora_A" in n or "lora_B" in n}
    squares = [(p @ p.T if "lora_A" in n else p.T @ p) for n, p in factors.items()]
    by_hand = 0.5 * sum(torch.linalg.norm(s - torch.eye(len(s))) for s in squares) / len(squares)
    assert tuning.penalty().item() == pytest.approx(float(by_hand.detach()), rel=1e-5)
    for rows in factors.values():
        with torch.no_grad():
            torch.nn.init.orthogonal_(rows)
    assert tuning.penalty().item() == pytest.approx(0, abs=1e-5)
    tuning.penalty().backward()
    assert installed("lora", network(), steps=30).penalty is None
