"""A LoRA training step on a CPU that costs less than PEFT's own and gives the same numbers.

The modules stay PEFT's and the network's own: `quicken` only exchanges their classes for subclasses with another `forward`, and only
for the steps that train. Names, state dict, merging, saving and everything in evaluation are untouched; whatever these forms do not
cover (several adapters, dropout on the factors, DoRA, hooks, other devices) takes the original way. What is saved:

* float32: W + s·B·A is multiplied once instead of two thin products beside W, where the batch has more rows than that costs;
* bfloat16 autocast: frozen weights are cast once instead of in every step, and the thin product is added in place;
* float32 again: frozen weights lie packed for MKL, both ways round, as far as `PACKED_BYTES` allow;
* one hand-written gradient for each layer: nothing of the width of the layer is kept or copied for the factors;
* see `medlore.layers.lora.vit_step` for what the head of a ViT does not look at.

Source: ours; the arithmetic is LoRA's (Hu et al., ICLR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medlore.layers.lora.partial_update import PartialLinear
from medlore.layers.lora.vit_step import shorten

PACKED_BYTES = 1 << 30  # of memory for packed weights, in one model
PACKED_ROWS = 256  # fewer rows do not repay it


@dataclass
class Quickened:
    """What `quicken` exchanged.

    Attributes:
        exchanged: modules with the classes that they had.
    """

    exchanged: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)

    def exchange(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """Give `module` the class `kind`, a subclass of its own."""
        self.exchanged.append((module, type(module)))
        module.__class__ = kind

    def restore(self) -> None:
        """Give every module its own class back."""
        for module, kind in reversed(self.exchanged):
            module.__class__ = kind
            _forget(module)
        self.exchanged = []


def quicken(model: nn.Module, *, logits_only: bool = False, packed_bytes: int = PACKED_BYTES) -> Quickened:
    """Let the training steps of a PEFT model with LoRA layers on a CPU cost less; outputs and gradients stay PEFT's.

    Args:
        model: a PEFT model; changed in place.
        packed_bytes: memory for packed copies of frozen weights in float32; the first layers have them.
        logits_only: nobody reads anything but `.logits` from it, so that what the head of a ViT does not look at may be left out.

    Returns:
        The handle; `restore()` undoes it.

    Example:
        >>> import peft
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> tuned = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0"]))
        >>> handle = quicken(tuned)
        >>> isinstance(tuned.base_model.model[0], peft.tuners.lora.Linear)
        True
        >>> handle.restore()
    """
    handle = Quickened()
    left = packed_bytes if _can_pack() else 0
    inside = {id(part) for m in model.modules() if isinstance(m, peft_layer.LoraLayer) for part in m.modules()}
    for module in list(model.modules()):
        if type(module) is peft_layer.Linear and type(module.base_layer) is nn.Linear:
            handle.exchange(module, QuickLora)
        elif type(module) is nn.Linear and id(module) not in inside and not module.weight.requires_grad:
            handle.exchange(module, FrozenLinear)
            size = 2 * module.weight.numel() * module.weight.element_size()
            module.__dict__[_PACKABLE] = size <= left
            left -= size if size <= left else 0
    if logits_only:
        shorten(model, handle.exchange)
    return handle


class QuickLora(peft_layer.Linear):
    """PEFT's LoRA layer; while it trains plainly, product and gradient are computed in one piece."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        pair = None if args or kwargs else _plain_pair(self, x)
        if pair is None:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        A, B, scaling = pair
        base: Any = self.base_layer
        dtype = _autocast_dtype(x)
        if dtype is not None:
            weight, bias = _copies(self, base, dtype)
            return _Factored.apply(x, weight, bias, A, B, scaling)  # type: ignore[no-any-return]
        rows, (outputs, inputs) = x.numel() // x.shape[-1], base.weight.shape
        form = _Merged if rows * (inputs + outputs) > inputs * outputs else _Factored
        return form.apply(x, base.weight, base.bias, A, B, scaling)  # type: ignore[no-any-return]

    def step_weight(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """W + s·B·A (out, in), with its gradient, and the bias, where `forward` would multiply `x` with them; else None."""
        pair = None if _hooked(self) else _plain_pair(self, x)
        if pair is None:
            return None
        A, B, scaling = pair
        base: Any = self.base_layer
        return torch.addmm(base.weight, B, A, alpha=scaling), base.bias

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; the copies of the frozen weight go."""
        _forget(self)
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """As PEFT's; the copies of the frozen weight go."""
        _forget(self)
        super().unmerge()

    def train(self, mode: bool = True) -> QuickLora:  # noqa: FBT001, FBT002 - torch's signature
        """Copies live from one call to the next: weights may be exchanged between them."""
        _forget(self)
        super().train(mode)
        return self


class FrozenLinear(nn.Linear):
    """A linear layer that does not train: its weight is cast or packed once, not in every step."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """(..., in) -> (..., out)."""
        dtype = _autocast_dtype(input)
        if not self._is_plain():
            return super().forward(input)
        if dtype is None:
            packs = _packs(self, input)
            if packs is None:
                return super().forward(input)
            return _Packed.apply(input, self.weight, self.bias, *packs)  # type: ignore[no-any-return]
        weight, bias = _copies(self, self, dtype)
        return F.linear(input, weight, bias)

    def step_weight(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, where `forward` would multiply `x` with them; else None."""
        return (self.weight, self.bias) if self._is_plain() and x.device.type == "cpu" else None

    def _is_plain(self) -> bool:
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return self.training and not trains and not _hooked(self)

    def train(self, mode: bool = True) -> FrozenLinear:  # noqa: FBT001, FBT002 - torch's signature
        """Copies live from one call to the next."""
        _forget(self)
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the module make copies of their own: packed weights cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in _KEPT}


def _plain_pair(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Factors and scaling of this step where it is an ordinary one, else None."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not layer.training or layer.disable_adapters or layer.merged or len(active) != 1 or x.device.type != "cpu" or x.numel() == 0:
        return None
    name, base = active[0], layer.base_layer
    A, B = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    if any(type(m) not in (nn.Linear, PartialLinear) or m.bias is not None for m in (A, B)) or _hooked(A, B, base):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    if x.dtype != A.weight.dtype and _autocast_dtype(x) is None:
        return None
    if base.weight.dtype != A.weight.dtype:
        return None
    return _active_weight(A), _active_weight(B), float(layer.scaling[name])


def _hooked(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _active_weight(factor: Any) -> Tensor:
    weight: Tensor = factor.active_weight() if isinstance(factor, PartialLinear) else factor.weight
    return weight


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast on a CPU casts `x` to; None where it does not."""
    return torch.get_autocast_dtype("cpu") if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else None


# in `__dict__`, so that they are no buffers: neither saved nor moved
_COPIES, _PACKS, _PACKABLE = "_medlore_copies", "_medlore_packs", "_medlore_packable"
_KEPT = (_COPIES, _PACKS)


def _forget(module: nn.Module) -> None:
    for name in _KEPT:
        module.__dict__.pop(name, None)


def _can_pack() -> bool:
    """Whether this build of torch has MKL's packed product."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def _packs(linear: Any, x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """The weight packed for x Wᵀ and for its gradient, and for how many rows; None where that is not worth while."""
    rows = x.numel() // x.shape[-1]
    plain = x.dtype == linear.weight.dtype == torch.float32 and x.device.type == "cpu"
    if not plain or rows < PACKED_ROWS or not linear.__dict__.get(_PACKABLE, False):
        return None
    stamp = (linear.weight.data_ptr(), linear.weight._version)
    kept = linear.__dict__.get(_PACKS)
    if kept is None or kept[0] != stamp:
        weight, pack = linear.weight.detach(), torch.ops.mkl._mkl_reorder_linear_weight
        kept = linear.__dict__[_PACKS] = (stamp, (pack(weight.contiguous(), rows), pack(weight.t().contiguous(), rows), rows))
    return kept[1]  # type: ignore[no-any-return]


def _copies(holder: nn.Module, linear: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in another type, kept as long as the tensors they were made from are the same."""
    sources = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    stamp = (dtype, [(s.data_ptr(), s._version) for s in sources])
    kept = holder.__dict__.get(_COPIES)
    if kept is None or kept[0] != stamp:
        made = [s.detach().to(dtype) for s in sources]
        kept = holder.__dict__[_COPIES] = (stamp, made[0], made[1] if len(made) > 1 else None)
    return kept[1], kept[2]


class _Merged(torch.autograd.Function):
    """x (W + s·B·A)ᵀ + b for a frozen W, in one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """(..., in) -> (..., out)."""
        total = torch.addmm(weight, B, A, alpha=scaling)  # out in
        ctx.save_for_backward(x, total if ctx.needs_input_grad[0] else None, A, B)
        ctx.scaling = scaling
        return F.linear(x, total, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, total, A, B = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # n in, n out
        reduced = (rows @ A.t()).mul_(ctx.scaling)  # n r
        back = (g @ B).mul_(ctx.scaling)  # n r
        grad_x = (g @ total).view_as(x) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, back.t() @ rows, g.t() @ reduced, None


class _Factored(torch.autograd.Function):
    """x Wᵀ + b + s·(x Aᵀ) Bᵀ for a frozen W, the second part added in place; factors take the type of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.input_dtype, ctx.factor_dtype, ctx.scaling = x.dtype, A.dtype, scaling
        x, A, B = x.to(weight.dtype), A.to(weight.dtype), B.to(weight.dtype)
        made = F.linear(x, weight, bias)
        reduced = x.reshape(-1, x.shape[-1]) @ A.t()  # n r
        made.view(-1, made.shape[-1]).addmm_(reduced, B.t(), alpha=scaling)
        ctx.save_for_backward(x, reduced, weight, A, B)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x, reduced, weight, A, B = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # n in, n out
        back = (g @ B).mul_(ctx.scaling)  # n r
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g @ weight).addmm_(back, A).view_as(x).to(ctx.input_dtype)
        grad_A, grad_B = (back.t() @ rows).to(ctx.factor_dtype), (g.t() @ reduced).to(ctx.factor_dtype).mul_(ctx.scaling)
        return grad_x, None, None, grad_A, grad_B, None


class _Packed(torch.autograd.Function):
    """x Wᵀ + b for a frozen W that is packed for so many rows; batches of other sizes take W itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pack: Tensor, back: Tensor, packed_rows: int) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.weight, ctx.back, ctx.packed_rows, ctx.shape = weight, back, packed_rows, x.shape
        made = _packed_product(x.reshape(-1, x.shape[-1]), pack, weight, bias, packed_rows)
        return made.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        g = grad.reshape(-1, grad.shape[-1])  # n out
        return _packed_product(g, ctx.back, ctx.weight.t(), None, ctx.packed_rows).view(ctx.shape), None, None, None, None, None


def _packed_product(rows: Tensor, pack: Tensor, weight: Tensor, bias: Tensor | None, packed_rows: int) -> Tensor:
    if len(rows) != packed_rows:
        return F.linear(rows, weight, bias)
    made: Tensor = torch.ops.mkl._mkl_linear(rows.contiguous(), pack, weight, bias, packed_rows)
    return made
