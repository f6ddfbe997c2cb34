"""What every expert layer promises, in every form, over kinds, kernels, strides, ... : pairwise, and the whole product with `-m full`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from medlore.layers.experts import layer as expert_module
from medlore.layers.experts.layer import ExpertLayer, expert_layer
from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import merge

AXES: dict[str, tuple[Any, ...]] = {
    "kind": ("linear", "conv2d", "conv3d"),
    "kernel": ("point", "cube", "flat"),
    "stride": (1, 2),
    "dilation": (1, 2),
    "groups": ("one", "two", "depthwise"),
    "padding": ("none", "one", "same", "valid", "reflect", "circular"),
    "bias": (True, False),
    "batch": ("single", "mixed", "sorted"),
    "dtype": (torch.float32, torch.bfloat16),
    "layout": ("channel", "interleaved"),
    "form": ("merged", "factored", "gathered", "chosen"),
    "base": ("trainable", "frozen"),
}
RANKS = {"abdomen": 2, "brain": 3, "spine": 0, "pelvis": 1}
BATCHES = {
    "single": ["brain"],
    "mixed": ["brain", "abdomen", None, "brain", "spine"],
    "sorted": ["abdomen", "abdomen", "brain", None],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SLACK_OF_GRADIENTS = {torch.float32: 1.0, torch.bfloat16: 1.5}  # the gradient between lora_A and lora_B is rounded to 16 bits too
Case = tuple[Any, ...]


def possible(case: Case) -> bool:
    """Whether torch has such a layer."""
    named = dict(zip(AXES, case, strict=False))
    if named["kind"] == "linear":
        return case[1:6] == ("point", 1, 1, "one", "none")
    return not (named["padding"] == "same" and named["stride"] == 2)


def pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def fillings(fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Possible cases with some values fixed; only the axes that rule each other out vary, the others are left open."""
    linked = ("kind", "kernel", "stride", "dilation", "groups", "padding")
    values = [(fixed[axis],) if axis in fixed else AXES[axis] for axis in linked]
    for combination in itertools.product(*values):
        named = dict(zip(linked, combination, strict=True)) | fixed
        if possible(tuple(named.get(axis) for axis in AXES)):
            yield named


def pairwise() -> list[Case]:
    """Few cases that hold every possible pair of values: each begins with an open pair and is filled where it closes most others."""
    names = list(AXES)
    open_pairs = {
        (i, x, j, y)
        for i, j in itertools.combinations(range(len(names)), 2)
        for x, y in itertools.product(AXES[names[i]], AXES[names[j]])
        if any(fillings({names[i]: x, names[j]: y}))
    }
    chosen: list[Case] = []
    while open_pairs:
        i, x, j, y = min(open_pairs, key=str)
        named = {names[i]: x, names[j]: y}
        for axis in names:
            if axis not in named:
                options = [value for value in AXES[axis] if any(fillings(named | {axis: value}))]
                named[axis] = max(options, key=lambda value: closed_by(named | {axis: value}, open_pairs))
        case = tuple(named[axis] for axis in names)
        chosen.append(case)
        open_pairs -= pairs_of(case)
    return chosen


def closed_by(named: dict[str, Any], open_pairs: set[tuple[int, Any, int, Any]]) -> int:
    """How many open pairs lie within the values named so far."""
    known = [(i, named[axis]) for i, axis in enumerate(AXES) if axis in named]
    return sum((*first, *second) in open_pairs for first, second in itertools.combinations(known, 2))


def base_of(named: dict[str, Any]) -> nn.Module:
    if named["kind"] == "linear":
        return nn.Linear(6, 8, bias=named["bias"])
    dims = int(named["kind"][4])
    kernel = {"point": (1,) * dims, "cube": (3,) * dims, "flat": (1, *(3,) * (dims - 1))}[named["kernel"]]
    padding = {"none": 0, "one": 1, "same": "same", "valid": "valid", "reflect": 1, "circular": 1}[named["padding"]]
    mode = named["padding"] if named["padding"] in ("reflect", "circular") else "zeros"
    channels, out = (6, 6) if named["groups"] == "depthwise" else (6, 8)
    groups = {"one": 1, "two": 2, "depthwise": 6}[named["groups"]]
    options = {
        "stride": named["stride"],
        "dilation": named["dilation"],
        "padding": padding,
        "padding_mode": mode,
        "groups": groups,
        "bias": named["bias"],
    }
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, out, kernel, **options)


def layer_of(named: dict[str, Any]) -> ExpertLayer:
    base = base_of(named)
    layer = expert_layer(base, ranks=RANKS, alpha={"abdomen": 4, "brain": 3, "spine": 1, "pelvis": 1}, layout=named["layout"])
    for factor in layer.lora_B.values():
        nn.init.normal_(factor, std=0.3)
    base.requires_grad_(named["base"] == "trainable")
    return layer.to(named["dtype"])


def published(layer: ExpertLayer, x: Tensor, names: Sequence[str | None]) -> Tensor:
    """The oracle, in float64: all kernels formed, a one-hot sum of them, each sample alone under its kernel."""
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias
    kernels = []
    for name, rank in layer.ranks.items():
        if not rank:
            kernels.append(torch.zeros_like(weight))
            continue
        lora_A, lora_B = layer.lora_A[name].double(), layer.lora_B[name].double()
        if layer.layout == "channel":
            product = torch.einsum("or,ri->oi", lora_B.flatten(1), lora_A.flatten(1))
        else:
            product = torch.einsum("or,ri->oi", lora_B, lora_A)
        kernels.append(product.reshape(weight.shape) * layer.scaling[name])
    one_hot = torch.tensor([[float(name == known) for known in layer.ranks] for name in names], dtype=torch.float64)
    own = weight + torch.einsum("be,e...->b...", one_hot, torch.stack(kernels))
    parameters = [{"weight": kernel, **({} if bias is None else {"bias": bias.double()})} for kernel in own]
    return torch.cat([functional_call(layer.base_layer, p, (x[i : i + 1].double(),)) for i, p in enumerate(parameters)])


def close(found: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, *, slack: float = 1.0) -> None:
    """Equal within the tolerance of the dtype, against the scale of the wanted tensor."""
    assert found is not None
    assert wanted is not None
    found, wanted = found.detach().double(), wanted.detach().double()
    scale = max(float(wanted.abs().max()), 1e-3)
    assert float((found - wanted).abs().max()) <= slack * TOLERANCE[dtype] * scale


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    named = dict(zip(AXES, case, strict=True))
    torch.manual_seed(5)
    layer, names, dtype = layer_of(named), BATCHES[named["batch"]], named["dtype"]
    shape = (
        (6,) if named["kind"] == "linear" and named["bias"] else (4, 6) if named["kind"] == "linear" else (6, *(7,) * int(named["kind"][4]))
    )
    x = torch.randn(len(names), *shape).to(dtype).requires_grad_()
    if named["form"] != "chosen":
        monkeypatch.setattr(expert_module, "choose_form", lambda _job: named["form"])
    learned = [p for p in (x, *layer.parameters()) if p.requires_grad]
    with route(layer, names):
        y = layer(x)
    wanted = published(layer, x, names)
    close(y, wanted, dtype)
    slope = torch.randn_like(wanted)
    grads = torch.autograd.grad(y, learned, slope.to(dtype), allow_unused=True)
    truths = torch.autograd.grad(wanted, learned, slope.to(dtype).double(), allow_unused=True)
    absent = {id(p) for name, rank in layer.ranks.items() if rank and name not in names for p in (layer.lora_A[name], layer.lora_B[name])}
    for parameter, grad, truth in zip(learned, grads, truths, strict=True):
        if id(parameter) in absent:
            assert grad is None or not grad.any()
        else:
            close(grad, truth, dtype, slack=SLACK_OF_GRADIENTS[dtype])
    check_merge(layer, x.detach(), y.detach(), names)


def check_merge(layer: ExpertLayer, x: Tensor, y: Tensor, names: Sequence[str | None]) -> None:
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for name in set(names):
        plain = merge(layer, name)
        assert type(plain) is type(layer.base_layer)
        rows = [i for i, found in enumerate(names) if found == name]
        close(y[rows], plain(x[rows]).detach(), x.dtype)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


PAIRWISE = pairwise()


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: "-".join(str(v).removeprefix("torch.") for v in case))
def test_contract_pairwise(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def test_pairwise_holds_every_pair() -> None:
    held = set().union(*(pairs_of(case) for case in PAIRWISE))
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES), 2):
        for a, b in itertools.product(AXES[first], AXES[second]):
            fits = any(possible(case) for case in itertools.product(*borders({first: a, second: b})))
            assert ((i, a, j, b) in held) == fits, (first, a, second, b)


def borders(fixed: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Values of every axis with two fixed, and one for each axis that no rule names."""
    free = {"bias", "batch", "dtype", "layout", "form", "base"}
    return [(fixed[axis],) if axis in fixed else AXES[axis][:1] if axis in free else AXES[axis] for axis in AXES]


PRODUCT = ("kind", "kernel", "stride", "dilation", "groups", "padding", "bias", "batch", "dtype", "layout")


@pytest.mark.full
@pytest.mark.parametrize("kind", AXES["kind"])
@pytest.mark.parametrize("layout", AXES["layout"])
@pytest.mark.parametrize("kernel", AXES["kernel"])
@pytest.mark.parametrize("dtype", AXES["dtype"], ids=str)
def test_contract_in_full(kind: str, layout: str, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole product of layers, batches, dtypes and layouts; forms and frozen bases take turns."""
    turns = itertools.cycle(itertools.product(AXES["form"], AXES["base"]))
    fixed = {"kind": kind, "layout": layout, "kernel": kernel, "dtype": dtype}
    for values in itertools.product(*[(fixed[axis],) if axis in fixed else AXES[axis] for axis in PRODUCT]):
        if possible(values):
            check((*values, *next(turns)), monkeypatch)
