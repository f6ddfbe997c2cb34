"""Adding something to a module of a network without changing its class, its weights or their names.

What is added is a child module named `tuning` of the module that it changes, and acts through forward hooks. So the names of
the network's own weights stay, those of the added ones say where they act (`vit.layers.0.mlp.tuning.down.weight`), and copies
of the network carry working copies of what was added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from medlore.errors import TargetError

CHILD = "tuning"


class Extra(nn.Module, ABC):
    """What one method adds to one module."""

    def ask(self, base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional inputs that `base` gets in place of its own."""
        return inputs

    @abstractmethod
    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """What `base` answers in place of `output`."""


class Foldable(Extra):
    """An addition that the weights of its own module can take up without a change of the output."""

    @abstractmethod
    def fold(self, base: nn.Module) -> None:
        """Change the weights of `base` so that it answers alone what it answers with this addition, in evaluation mode."""


def attach(base: nn.Module, extra: Extra, *, name: str = "") -> None:
    """Let `extra` act on `base`; it moves to the device and precision of the weights there.

    Raises:
        TargetError: something was added to `base` before.
    """
    if hasattr(base, CHILD):
        raise TargetError(name or type(base).__name__, "tuned already", "a network without additions", "load the backbone again")
    like = next((p for p in base.parameters() if p.is_floating_point()), None)
    if like is not None:
        extra.to(device=like.device, dtype=like.dtype)
    extra.train(base.training)
    base.add_module(CHILD, extra)
    if type(extra).ask is not Extra.ask:
        base.register_forward_pre_hook(_ask)
    base.register_forward_hook(_answer)


def detach(base: nn.Module) -> None:
    """Take away what was added to `base`."""
    for hooks, own in ((base._forward_pre_hooks, _ask), (base._forward_hooks, _answer)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
    delattr(base, CHILD)


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, Extra]]:
    """Name, changed module and addition, in the order of the network."""
    for name, module in list(model.named_modules()):
        extra = module._modules.get(CHILD)
        if isinstance(extra, Extra):
            yield name, module, extra


def added_parameters(model: nn.Module) -> int:
    """Parameters of all additions."""
    return sum(p.numel() for _, _, extra in attached(model) for p in extra.parameters())


def fold(model: nn.Module) -> nn.Module:
    """Take up every foldable addition into the weights; others stay and go on acting.

    Returns:
        The same network.
    """
    for _, module, extra in attached(model):
        if isinstance(extra, Foldable):
            extra.fold(module)
            detach(module)
    return model


def add_to_linear(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Add to the weight and the bias of a linear layer, in place; a layer without a bias gets one where it needs one."""
    import torch

    base: Any = layer
    with torch.no_grad():
        base.weight.add_(weight.to(base.weight.dtype))
        if bias is None:
            return
        if base.bias is None:
            base.bias = nn.Parameter(bias.to(base.weight.dtype).detach().clone(), requires_grad=base.weight.requires_grad)
        else:
            base.bias.add_(bias.to(base.bias.dtype))


# Hooks are plain functions that find their addition through the module: a deep copy of a network copies the addition with it.


def _ask(base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    asked: tuple[Any, ...] = base.get_submodule(CHILD).ask(base, inputs)  # type: ignore[operator]
    return asked


def _answer(base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return base.get_submodule(CHILD)(base, inputs, output)
