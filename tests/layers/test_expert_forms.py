"""The forms beside the contract suite: exact gradients, what is computed, what is kept, which form is chosen."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medlore.layers.experts import layer as expert_module
from medlore.layers.experts.call import Geometry, LayerCall, Pair, Share
from medlore.layers.experts.dispatch import PRICES, Load, choose_form, costs
from medlore.layers.experts.hidden import moves_points
from medlore.layers.experts.layer import ExpertConv2d, ExpertLinear, expert_layer
from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import merge

FORMS = ["merged", "factored", "gathered"]


@pytest.mark.parametrize("layout", ["channel", "interleaved"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_against_finite_differences(form: str, layout: str, groups: int) -> None:
    layer = ExpertConv2d(
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1, groups=groups), ranks={"a": 1, "b": 2}, alpha=3, layout=layout
    ).double()  # type: ignore[arg-type]
    for factor in layer.lora_B.values():
        nn.init.normal_(factor)
    parameters = list(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with route(layer, ["b", "a", "b", None]):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(4, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    with patch.object(expert_module, "choose_form", lambda _job: form):
        assert torch.autograd.gradcheck(run, (x, *[p.detach().requires_grad_() for p in parameters]))


@pytest.mark.parametrize(("dims", "dilation", "padding"), [(2, (1, 2), (0, 1)), (2, (1, 1), (3, 2)), (3, (1, 1, 1), (1, 0, 1))])
def test_moved_points_are_the_convolution(dims: int, dilation: tuple[int, ...], padding: tuple[int, ...]) -> None:
    """Few kernel points times rank against the channels: no convolution runs for ``lora_A``, and the numbers are those of one."""
    kernel = (3, 2) if dims == 2 else (3, 1, 2)
    base = (nn.Conv2d if dims == 2 else nn.Conv3d)(16, 4, kernel, padding=padding, dilation=dilation)
    layer = expert_layer(base, ranks={"a": 1, "b": 2}, scaling=2.0).double()
    for factor in layer.lora_B.values():
        nn.init.normal_(factor)
    assert moves_points(Geometry((1,) * dims, padding, dilation), base.weight, 2)
    assert not moves_points(Geometry((1,) * dims, padding, dilation), base.weight, 3)
    assert not moves_points(Geometry((2,) * dims, padding, dilation), base.weight, 2)
    x, names = torch.randn(3, 16, *(4,) * dims, dtype=torch.float64, requires_grad=True), ["b", None, "a"]
    with patch.object(expert_module, "choose_form", lambda _job: "factored"), route(layer, names):
        y = layer(x)
    wanted = torch.cat([merge(layer, name)(x[i : i + 1]) for i, name in enumerate(names)])
    assert torch.allclose(y, wanted)
    learned = [x, *layer.parameters()]
    with patch.object(expert_module, "choose_form", lambda _job: "merged"), route(layer, names):
        truth = torch.autograd.grad(layer(x).square().sum(), learned)
    for found, wanted_grad in zip(torch.autograd.grad(y.square().sum(), learned), truth, strict=True):
        assert torch.allclose(found, wanted_grad)


@pytest.mark.parametrize("form", FORMS)
def test_linear_gradients_against_finite_differences(form: str) -> None:
    layer = ExpertLinear(nn.Linear(3, 4), ranks={"a": 1, "b": 2}).double()
    for factor in layer.lora_B.values():
        nn.init.normal_(factor)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with route(layer, ["a", "b", "a"]):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    with patch.object(expert_module, "choose_form", lambda _job: form):
        assert torch.autograd.gradcheck(run, (x, *[p.detach().requires_grad_() for p in layer.parameters()]))


@pytest.mark.parametrize("form", FORMS)
def test_only_experts_present_are_computed(form: str) -> None:
    """The work does not grow with the number of experts that exist."""
    counted = []
    for total in (2, 40):
        layer = ExpertConv2d(nn.Conv2d(8, 8, 3), ranks={f"e{i}": 2 for i in range(total)})
        with (
            patch.object(expert_module, "choose_form", lambda _job: form),
            FlopCounterMode(display=False) as counter,
            route(layer, ["e1", "e0"]),
        ):
            layer(torch.randn(2, 8, 6, 6)).sum().backward()
        counted.append(counter.get_total_flops())
        assert layer.lora_A["e0"].grad is not None
        assert all(p.grad is None for name, p in layer.lora_A.items() if name not in ("e0", "e1"))
    assert counted[0] == counted[1] > 0


def test_a_merged_layer_keeps_no_kernel_and_no_copy() -> None:
    """What autograd keeps is the input and the parameters themselves."""
    layer = ExpertConv2d(nn.Conv2d(8, 8, 3), ranks={"a": 2, "b": 2})
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    known = {t.data_ptr() for t in (x, *layer.parameters())}
    kept: list[int] = []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t)
    with patch.object(expert_module, "choose_form", lambda _job: "merged"), route(layer, ["a", "b", "a", "b"]), keeping:
        layer(x)
    assert kept
    assert set(kept) <= known


def job(
    layer: nn.Conv2d | nn.Conv3d, space: tuple[int, ...], batch: int, experts: int, rank: int = 8, layout: str = "channel"
) -> LayerCall:
    """A call on tensors without memory."""
    from medlore.linalg.factors import factor_shapes

    weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"))
    pair = Pair(*(torch.empty(s, device="meta") for s in factor_shapes(weight.shape, rank, layout)), 1.0, layout)  # type: ignore[arg-type]
    geometry = Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
    x = (
        torch.empty(batch, layer.in_channels, *space, device="cpu")
        if batch * layer.in_channels < 100
        else torch.zeros(1).expand(batch, layer.in_channels, *space)
    )
    return LayerCall(x, weight, None, geometry, [Share(pair, batch // experts, 0, None)] * experts)


# what `python -m benchmarks.experts` measures as best, or within a few per cent of it
MEASURED = [
    (nn.Conv2d(58, 58, 1), (28, 28), 32, 11, {"gathered"}),
    (nn.Conv2d(64, 64, 3, padding=1), (28, 28), 32, 10, {"gathered"}),
    (nn.Conv2d(256, 256, 3, padding=1), (14, 14), 32, 10, {"factored"}),
    (nn.Conv2d(464, 464, 1), (7, 7), 32, 10, {"factored"}),
    (nn.Conv2d(512, 512, 3, padding=1), (7, 7), 32, 10, {"factored"}),
    (nn.Conv2d(1024, 2048, 1), (7, 7), 32, 10, {"factored"}),
    (nn.Conv3d(64, 64, 3, padding=1), (32, 32, 32), 2, 2, {"merged", "gathered"}),
    (nn.Conv3d(128, 128, 3, padding=1), (24, 24, 12), 4, 4, {"merged", "gathered"}),
    (nn.Conv3d(256, 256, 3, padding=1), (12, 12, 6), 4, 4, {"factored"}),
    (nn.Conv3d(512, 512, 3, padding=1), (9, 9, 3), 2, 2, {"factored"}),
]


@pytest.mark.parametrize("number", range(len(MEASURED)))
def test_the_form_that_measures_best_is_chosen(number: int) -> None:
    layer, space, batch, experts, best = MEASURED[number]
    assert choose_form(job(layer, space, batch, experts)) in best


def test_costs_move_as_they_should() -> None:
    load = Load(8, 8 * 49, 256, 256 * 9, 8 * 49 * 512, 4, 8, pointwise=False, plain_groups=True, frozen=False)
    found = costs(load, PRICES["cpu"])
    from dataclasses import replace

    more = costs(replace(load, experts=8), PRICES["cpu"])
    frozen = costs(replace(load, frozen=True), PRICES["cpu"])
    assert more["merged"] > found["merged"]
    assert frozen["merged"] == pytest.approx(found["merged"] + load.dense / 3)
    assert frozen["factored"] == found["factored"]
    assert found["gathered"] == float("inf")  # 8 kernels are larger than the layer's values
