"""Component masks: their odds follow Shapley values, they open by the end of training, and evaluation knows nothing of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from medlore.errors import InputError, TargetError
from medlore.layers.tuning.component_masks import ComponentMasks, Gate, install_component_masks


def tuned(rank: int = 4, **options: Any) -> Any:
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "2"], **options)
    made = peft.get_peft_model(model, config)
    for name, p in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return made


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def run(gate: Gate, generator: torch.Generator, worth: Any, steps: int, *, posterior: bool = True) -> list[torch.Tensor]:
    drawn = []
    for step in range(1, steps + 1):
        if not posterior:
            gate.odds = lambda share: torch.full((gate.rank,), share, dtype=torch.float64)  # type: ignore[method-assign]
        gate.draw(min(1.0, step / steps), generator)
        drawn.append(gate.mask.detach().clone())
        (-worth(gate.mask)).backward()
        gate.observe()
    return drawn


def exact_shapley(worth: Any, count: int) -> torch.Tensor:
    values = torch.zeros(count)
    for order in itertools.permutations(range(count)):
        mask = torch.zeros(count)
        for i in order:
            before = worth(mask)
            mask[i] = 1
            values[i] += worth(mask) - before
    return values / math.factorial(count)


def test_values_are_shapley_values() -> None:
    """A game with interactions; its contributions are large and small by turns, so the estimate must weigh kept and left out."""
    weights = torch.tensor([1.0, 3.0, -1.0, 2.0])

    def worth(mask: torch.Tensor) -> torch.Tensor:
        return (mask * weights).sum() + mask[0] * mask[1] - 2 * mask[2] * mask[3]

    gate = Gate(4, torch.device("cpu"))
    run(gate, torch.Generator().manual_seed(0), worth, 1500, posterior=False)
    exact = exact_shapley(worth, 4)
    estimate = gate.values() / gate.values().abs().sum() * exact.abs().sum()
    assert torch.allclose(estimate.float(), exact, atol=0.35)
    assert torch.equal(estimate.argsort(), exact.argsort())


def test_what_harms_is_kept_less_often() -> None:
    gate = Gate(4, torch.device("cpu"))
    weights = torch.tensor([1.0, 1.0, -1.0, 1.0])
    drawn = torch.stack(run(gate, torch.Generator().manual_seed(0), lambda m: (m * weights).sum(), 600))
    often = drawn.mean(dim=0)
    assert often[2] < often[[0, 1, 3]].min() - 0.15
    assert drawn.sum(dim=1).min() >= 1


def test_masks_open_towards_the_end() -> None:
    model = tuned()
    handle = install_component_masks(model, steps=40, seed=1)
    kept = []
    for _ in range(40):
        handle.draw()
        kept.append(sum(float(g.mask.detach().sum()) for g in handle.gates.values()))
    assert kept[-1] == 8
    assert sum(kept[:10]) < sum(kept[10:20]) < sum(kept[30:])


def test_a_step_works_with_the_kept_components_and_trains_them_alone() -> None:
    model = tuned()
    handle = install_component_masks(model, steps=10, seed=1)
    model.train()
    handle.draw()
    gate = handle.gates["base_model.model.0"]
    gate.mask = torch.tensor([1.0, 0.0, 0.0, 1.0]).requires_grad_(True)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(X) + X @ (2 * B[:, [0, 3]] @ A[[0, 3]]).T
    assert torch.allclose(layer(X), expected, atol=1e-5)
    model(X).square().sum().backward()
    assert [bool(row.any()) for row in A.grad] == [True, False, False, True]
    assert [bool(column.any()) for column in B.grad.T] == [True, False, False, True]
    assert gate.mask.grad is not None
    assert bool(gate.mask.grad.all())  # left-out components are judged too
    handle.observe()
    assert gate.steps == 1
    assert gate.values().abs().sum().item() == pytest.approx(1)


def test_evaluation_is_the_plain_adapter() -> None:
    plain = tuned().eval()(X)
    model = tuned()
    handle = install_component_masks(model, steps=10, seed=1)
    handle.draw()
    model.train()
    assert not torch.allclose(model(X), plain)
    model.eval()
    assert torch.equal(model(X), plain)
    assert torch.allclose(model.merge_and_unload()(X), plain, atol=1e-5)


def test_state_goes_on_with_the_same_draws() -> None:
    def steps(handle: ComponentMasks, model: Any, count: int) -> list[list[float]]:
        drawn = []
        for _ in range(count):
            handle.draw()
            drawn.append([x for g in handle.gates.values() for x in g.mask.tolist()])
            model(X).square().sum().backward()
            handle.observe()
        return drawn

    whole_model, model, again = tuned().train(), tuned().train(), tuned().train()
    whole = steps(install_component_masks(whole_model, steps=8, seed=3), whole_model, 8)
    first = install_component_masks(model, steps=8, seed=3)
    began = steps(first, model, 4)
    second = install_component_masks(again, steps=8, seed=99)
    second.load_state_dict(first.state_dict())
    assert second.values() == first.values()
    assert began + steps(second, again, 4) == whole
    with pytest.raises(InputError, match="of the same ranks"):
        install_component_masks(tuned(rank=3), steps=8).load_state_dict(first.state_dict())


def test_other_layers_are_refused() -> None:
    with pytest.raises(TargetError, match="2 layers cannot take them"):
        install_component_masks(tuned(use_dora=True), steps=4)
    with pytest.raises(TargetError, match="no LoRA layer"):
        install_component_masks(nn.Linear(2, 2), steps=4)
