"""The ways to compute a layer with experts for a mixed batch. All give the same numbers to rounding; they differ in cost.

merged      one kernel W0 + delta for each expert present, one dense call on that expert's samples
factored    one dense call of W0 for the whole batch, and beside it ``lora_A`` on each expert's samples and one batched ``lora_B``
gathered    one kernel a sample, in one grouped call (a batched matrix product where the kernel is a point)

Only experts with samples in the batch are touched: the gradient of every other factor is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medlore.layers.experts.call import Geometry, LayerCall, Pair, Share
from medlore.layers.experts.hidden import Factors, hidden_of
from medlore.linalg.factors import widened
from medlore.linalg.matricize import Layout


def factored_form(job: LayerCall) -> Tensor:
    """One dense call of the base for the whole batch, plus the low-rank branch of each expert on its samples.

    Source: LoRA eq. 3 (Hu et al. 2021), one branch an expert; ours in that unequal ranks share one batched product.
    """
    y = job.geometry.apply(job.x, job.weight, job.bias)
    pairs = [None if s.pair is None else s.pair.channel(job.weight) for s in job.shares]
    widest = max(pair[0].shape[0] for pair in pairs if pair is not None)
    up = torch.stack([_padded_up(pair, share, job.weight, widest) for pair, share in zip(pairs, job.shares, strict=True)])
    up = job.by_sample(up.to(y.dtype))  # b out R
    hidden = hidden_of(job, pairs, widest).to(y.dtype)
    if not job.geometry.stride:
        return _added(y.reshape(len(y), -1, y.shape[-1]), hidden, up.mT).view(y.shape)
    groups = job.geometry.groups
    if groups == 1:
        return _added(y.flatten(2), up, hidden).view(y.shape)
    shape = (len(y) * groups, -1)
    change = torch.bmm(up.reshape(*shape, widest), hidden.reshape(*shape, hidden.shape[-1]).view(shape[0], widest, -1))
    return y + change.view(y.shape)


def _added(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y + left @ right``; in the memory of `y`, which is ours, where no gradient is asked for."""
    if torch.is_grad_enabled() and (y.requires_grad or left.requires_grad or right.requires_grad):
        return torch.baddbmm(y, left, right)
    return y.baddbmm_(left, right)


def _padded_up(pair: Factors | None, share: Share, weight: Tensor, widest: int) -> Tensor:
    """(out, widest): ``lora_B`` times the scaling; zeros where the rank is smaller, and for the shared base."""
    if pair is None or share.pair is None:
        return weight.new_zeros(weight.shape[0], widest)
    up = pair[1].flatten(1)
    up = up if share.pair.scaling == 1.0 else up * share.pair.scaling
    return F.pad(up, (0, widest - up.shape[1])) if up.shape[1] < widest else up


def gathered_form(job: LayerCall) -> Tensor:
    """A kernel for each sample, in one grouped call.

    Source: LoRKD's grouped convolution, with the kernels of the experts present alone.
    """
    x, geometry, batch = job.x, job.geometry, job.x.shape[0]
    merged = torch.stack([job.weight if s.pair is None else s.pair.merged(job.weight) for s in job.shares])
    kernels = job.by_sample(merged)  # b out in *kernel
    if not geometry.stride:
        tokens = x.reshape(batch, -1, x.shape[-1])
        y = torch.bmm(tokens, kernels.mT).view(*x.shape[:-1], -1)
        return y if job.bias is None else y + job.bias.to(y.dtype)
    if geometry.pointwise(job.weight):
        return _batched_matrix(kernels.flatten(2), x, job.bias)
    bias = None if job.bias is None else job.bias.repeat(batch)
    y = geometry.apply(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), bias, groups=batch * geometry.groups)
    return y.view(batch, -1, *y.shape[2:])


def _batched_matrix(kernels: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """(b, out, in) at every position of (b, in, *space)."""
    y = torch.bmm(kernels, x.flatten(2)).view(len(x), -1, *x.shape[2:])
    return y if bias is None else y + bias.to(y.dtype).view(-1, *([1] * (x.ndim - 2)))


@dataclass(frozen=True)
class _Plan:
    """What the backward pass needs beside tensors: per share its samples and how its factors are read."""

    geometry: Geometry
    shares: tuple[Share, ...]  # without factors: autograd keeps those
    reading: tuple[tuple[float, Layout] | None, ...]

    def pair(self, number: int, factors: Iterator[Tensor]) -> Pair | None:
        """The next pair of `factors`, or None for the shared base."""
        reading = self.reading[number]
        return None if reading is None else Pair(next(factors), next(factors), *reading)


class MergedLayer(torch.autograd.Function):
    """The merged form as one step of autograd; its gradients are checked against finite differences in the tests.

    Kept for the backward pass: the input, the base weight and the factors of the experts present. One merged kernel lives at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *factors: Tensor) -> Tensor:
        """(b, in, *space) -> (b, out, *space')."""
        ctx.save_for_backward(x, weight, bias, *factors)
        ctx.plan = plan
        own_bias = None if bias is None else bias.to(x.dtype)
        given = iter(factors)
        y: Tensor | None = None
        for number, share in enumerate(plan.shares):
            pair = plan.pair(number, given)
            kernel = weight if pair is None else pair.merged(weight)
            part = plan.geometry.apply(share.of(x), kernel.to(x.dtype), own_bias)
            if len(plan.shares) == 1:
                return part
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            share.put(y, part)
        return cast("Tensor", y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, base weight, base bias and every factor."""
        x, weight, bias, *factors = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needs_x, needs_weight, needs_bias, _, *needs_factors = ctx.needs_input_grad
        sum_weight = torch.zeros_like(widened(weight)) if needs_weight else None
        grad_x = torch.empty_like(x) if needs_x else None
        out: list[Tensor | None] = []
        given, learns = iter(factors), iter(needs_factors)
        with torch.autocast(x.device.type, enabled=False):
            for number, share in enumerate(plan.shares):
                pair = plan.pair(number, given)
                wanted = (False, False) if pair is None else (next(learns), next(learns))
                kernel = (weight if pair is None else pair.merged(weight)).to(x.dtype)
                needs = (needs_x, needs_weight or any(wanted))
                part_x, part_weight = _layer_gradients(share.of(grad), share.of(x), kernel, plan.geometry, needs)
                if grad_x is not None and part_x is not None:
                    share.put(grad_x, part_x)
                if sum_weight is not None and part_weight is not None:
                    sum_weight += part_weight
                if pair is not None:
                    out += pair.gradients(part_weight, wanted)
        grad_weight = None if sum_weight is None else sum_weight.to(weight.dtype)
        grad_bias = _bias_gradient(grad, plan.geometry).to(bias.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, *out


def _layer_gradients(
    grad: Tensor, x: Tensor, kernel: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a plain layer's input and weight."""
    if geometry.stride:
        none = [0] * len(geometry.stride)
        part_x, part_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups, [*needs, False]
        )
        return part_x, part_weight
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return (grad @ kernel if needs[0] else None), (rows.mT @ inputs if needs[1] else None)


def _bias_gradient(grad: Tensor, geometry: Geometry) -> Tensor:
    channels = 1 if geometry.stride else grad.ndim - 1
    return widened(grad).sum([axis for axis in range(grad.ndim) if axis != channels])


def merged_form(job: LayerCall) -> Tensor:
    """One dense call for each expert present, with its merged kernel.

    Neither the kernels nor copies of the samples are kept for the backward pass: both are made again there.

    Source: ours (LoRKD's deployment form, W0 + s B A, used in training too).
    """
    x = job.x
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    shares = tuple(replace(share, pair=None) for share in job.shares)
    plan = _Plan(job.geometry, shares, tuple(None if s.pair is None else (s.pair.scaling, s.pair.layout) for s in job.shares))
    factors = [f for s in job.shares if s.pair is not None for f in (s.pair.lora_A, s.pair.lora_B)]
    with torch.autocast(x.device.type, enabled=False):
        return cast("Tensor", MergedLayer.apply(x, job.weight, job.bias, plan, *factors))


def low_rank_branch(x: Tensor, pair: Pair, weight: Tensor, geometry: Geometry) -> Tensor:
    """What the factors add, B (A x) times the scaling, never forming the kernel: (b, in, *space) -> (b, out, *space')."""
    lora_A, lora_B = pair.channel(weight)
    groups, rank = geometry.groups, lora_A.shape[0]
    if not geometry.stride:
        return F.linear(F.linear(x, lora_A), lora_B * pair.scaling)
    hidden = geometry.apply(x, lora_A if groups == 1 else lora_A.repeat(groups, *([1] * (lora_A.ndim - 1))))  # b g*r *space
    up = (lora_B.flatten(1) * pair.scaling).to(hidden.dtype).view(1, groups, -1, rank)  # 1 g o/g r
    change = up @ hidden.reshape(len(hidden), groups, rank, -1)
    return change.reshape(len(hidden), -1, *hidden.shape[2:])


def mixture_form(job: LayerCall, pairs: Sequence[tuple[int, Pair]], mixture: Tensor) -> Tensor:
    """Each sample under its own weighted sum of experts.

    Args:
        job: the call; its shares are not read.
        pairs: (index in the roster, factors) of the experts with rank in this layer.
        mixture: (b, e) weights; gradients reach them.

    Returns:
        (b, out, *space').

    Source: LoRKD's coefficient matrix with soft entries; ours in the factored form.
    """
    y = job.geometry.apply(job.x, job.weight, job.bias)
    ones = (1,) * (y.ndim - 1)
    for index, pair in pairs:
        weights = mixture[:, index].to(y.dtype)
        y = y + weights.view(-1, *ones) * low_rank_branch(job.x, pair, job.weight, job.geometry).to(y.dtype)
    return y
