"""GLoRA: weight and bias of a linear layer changed through five supports, each in a chosen form, and folded away afterwards."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import TargetError
from medlore.layers.tuning.attach import Foldable, add_to_linear, attach
from medlore.layers.tuning.options import GeneralizedOptions, Support, supports_of


class GeneralizedLora(Foldable):
    """W + W ⊙ A + B in place of W, and b + W C + D ⊙ b + E in place of b.

    A and B have the shape of W, C one column for its inputs, D and E the shape of b. A low-rank support of shape (m, k) is the
    product of (m, r) and (r, k). All start at a product of zero. D needs a bias and is left out where there is none.

    The path (one form for each support) is chosen beforehand and is the same in training, evaluation and merging. In the
    released code a random path is drawn at every forward pass, in evaluation too, and an evolutionary search follows.

    Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, equation 10; products
    with W as released (entry by entry for A, matrix times column for C).
    """

    def __init__(self, layer: nn.Linear, rank: int, path: tuple[Support, Support, Support, Support, Support]) -> None:
        super().__init__()
        rows, columns = layer.out_features, layer.in_features
        shapes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows, 1), "E": (rows, 1)}
        forms = dict(zip(shapes, path, strict=True))
        if cast("Tensor | None", layer.bias) is None:
            forms["D"] = "none"
        self.supports = nn.ModuleDict({name: _Support(forms[name], shape, rank) for name, shape in shapes.items() if forms[name] != "none"})

    def delta(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """What is added to the weight (out, in) and to the bias (out,)."""
        weight = torch.zeros_like(layer.weight)
        bias = torch.zeros_like(layer.weight[:, 0])
        if "A" in self.supports:
            weight = weight + layer.weight * self.supports["A"]()
        if "B" in self.supports:
            weight = weight + self.supports["B"]()
        if "C" in self.supports:
            bias = bias + (layer.weight @ self.supports["C"]())[:, 0]
        if "D" in self.supports:
            bias = bias + layer.bias * self.supports["D"]()[:, 0]
        if "E" in self.supports:
            bias = bias + self.supports["E"]()[:, 0]
        return weight, bias

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., in) and (..., out) -> (..., out)."""
        layer: Any = base
        weight, bias = self.delta(layer)
        changed: Tensor = output + F.linear(inputs[0], weight, bias)
        return changed

    def fold(self, base: nn.Module) -> None:
        """Add to weight and bias what training has found."""
        layer: Any = base
        with torch.no_grad():
            weight, bias = self.delta(layer)
        add_to_linear(layer, weight, bias if self.supports.keys() & {"C", "D", "E"} else None)


class _Support(nn.Module):
    """One support; called, it gives its values with the shape of what it changes (a scalar and a vector broadcast)."""

    def __init__(self, form: Support, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList()
        if form == "lora":
            left = torch.empty(shape[0], rank)
            nn.init.kaiming_uniform_(left, a=math.sqrt(5))
            self.factors.extend([nn.Parameter(left), nn.Parameter(torch.zeros(rank, shape[1]))])
        else:
            self.factors.append(nn.Parameter(torch.zeros(shape[0] if form == "vector" else 1, 1)))

    def forward(self) -> Tensor:
        """The values of the support."""
        first, *second = self.factors
        values: Tensor = first @ second[0] if second else first
        return values


def install_generalized(model: nn.Module, options: GeneralizedOptions, ranks: dict[str, int]) -> None:
    """One on each linear layer of `ranks`.

    Raises:
        TargetError: a layer that is not linear.
        InputError: a path that is none.
    """
    path = supports_of(options.glora_path)
    modules = dict(model.named_modules())
    faults = [f"{name}: {type(modules.get(name)).__name__}" for name in ranks if not isinstance(modules.get(name), nn.Linear)]
    if faults:
        raise TargetError("--method glora", f"{len(faults)} targets", "linear layers", "choose other --targets", faults=faults)
    for name, rank in ranks.items():
        layer: Any = modules[name]
        attach(layer, GeneralizedLora(layer, rank, path), name=name)
