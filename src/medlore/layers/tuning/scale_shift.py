"""Scaling and shifting features (SSF), and training the layer norms: the methods with vectors only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medlore.errors import TargetError
from medlore.layers.surgery import blocks_of
from medlore.layers.tuning.attach import Foldable, attach


class ScaleShift(Foldable):
    """Behind a layer: scale ⊙ y + shift, one number a channel each. It answers y until it is trained.

    Source: Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022, equation 3; folded by equation 4. It starts at 1
    and 0 here (there: normal around them with deviation 0.02), so that the first output is that of the backbone.
    """

    def __init__(self, width: int, *, channels_first: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.channels_first = channels_first

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., d) -> (..., d), or (b, d, h, w) behind a convolution."""
        if self.channels_first:
            return output * self.scale[:, None, None] + self.shift[:, None, None]
        return output * self.scale + self.shift

    def fold(self, base: nn.Module) -> None:
        """Scaled and shifted, W x + b is (scale ⊙ W) x + (scale ⊙ b + shift)."""
        layer: Any = base
        with torch.no_grad():
            layer.weight.mul_(self.scale.reshape(-1, *(1,) * (layer.weight.ndim - 1)))
            if layer.bias is None:
                layer.bias = nn.Parameter(self.shift.detach().clone(), requires_grad=layer.weight.requires_grad)
            else:
                layer.bias.mul_(self.scale).add_(self.shift)


def install_scale_shift(model: nn.Module, head: str) -> None:
    """One behind every linear layer, convolution and layer norm.

    None behind the norm after the last block, whose scale and shift the head that follows would only repeat; that gives the
    204,288 parameters of ViT-B/16.
    """
    blocks = blocks_of(model)
    modules = dict(model.named_modules())
    places = [n for n, m in modules.items() if _width(m) and n != head and not n.startswith(f"{head}.")]
    if not blocks or not places:
        raise TargetError("--method ssf", "a network without blocks", "a transformer", "use another method")
    last = max(i for i, name in enumerate(places) if name.startswith(f"{blocks[-1]}."))
    for name in places[: last + 1]:
        module = modules[name]
        attach(module, ScaleShift(_width(module), channels_first=isinstance(module, nn.Conv2d)), name=name)


def thaw_norms(model: nn.Module) -> None:
    """Every layer norm of the network trains.

    Source: Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", AAAI 2024 (LN-Tune).

    Raises:
        TargetError: the network has none.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if not norms:
        raise TargetError("--method layernorm", "a network without layer norms", "a transformer", "use another method")
    for norm in norms:
        norm.requires_grad_(True)


def _width(module: nn.Module) -> int:
    """Channels of what the layer answers; 0 where nothing is scaled."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1:
        return int(module.normalized_shape[0])
    return 0
