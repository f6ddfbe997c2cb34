"""``lora_A`` of a mixed batch: (b, in, *space) -> (b, R, *space'), in the way that costs least for the layer.

every sample's own matrix in one batched product    linear and pointwise layers
the same over all kernel points, then moved and summed    unit stride, few kernel points times rank against the input channels
a convolution for each expert on its samples    everything else
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from medlore.layers.experts.call import Geometry, LayerCall

Factors = tuple[Tensor, Tensor]
Shifts = tuple[tuple[int, ...], ...]


def hidden_of(job: LayerCall, pairs: Sequence[Factors | None], widest: int) -> Tensor:
    """The output of ``lora_A``, padded to the widest rank: (b, n, R) of a linear layer, else (b, groups * R, n).

    Args:
        job: the call.
        pairs: channel factors of each share; None for the shared base.
        widest: R.
    """
    if not job.geometry.stride:
        tokens = job.x.reshape(len(job.x), -1, job.x.shape[-1])  # b n in
        return torch.bmm(tokens, _by_sample(job, pairs, widest).mT)
    if job.geometry.pointwise(job.weight):
        return torch.bmm(_by_sample(job, pairs, widest), job.x.flatten(2))
    if moves_points(job.geometry, job.weight, widest):
        return _moved(job, pairs, widest)
    return _by_expert(job, pairs, widest)


def moves_points(geometry: Geometry, weight: Tensor, rank: int) -> bool:
    """Whether a kernel's points are computed side by side and summed after: what they fill must stay small against the input."""
    plain = geometry.groups == 1 and all(s == 1 for s in geometry.stride)
    return plain and rank * prod(weight.shape[2:]) <= weight.shape[1]


def _by_sample(job: LayerCall, pairs: Sequence[Factors | None], widest: int) -> Tensor:
    """(b, widest, in): ``lora_A`` of each sample; zeros where the rank is smaller."""
    columns = job.weight[0].numel()
    rows = [job.weight.new_zeros(widest, columns) if pair is None else pair[0].flatten(1) for pair in pairs]
    rows = [row if len(row) == widest else F.pad(row, (0, 0, 0, widest - len(row))) for row in rows]
    return job.by_sample(torch.stack(rows))


def _moved(job: LayerCall, pairs: Sequence[Factors | None], widest: int) -> Tensor:
    """One batched product gives every kernel point's share at every input position; moved by the point, they add up to the convolution."""
    kernel, channels = job.weight.shape[2:], job.weight.shape[1]
    points = prod(kernel)
    rows = []
    for pair in pairs:
        if pair is None:
            rows.append(job.weight.new_zeros(points * widest, channels))
            continue
        down = pair[0].flatten(2).permute(2, 0, 1)  # points r in
        rows.append(F.pad(down, (0, 0, 0, widest - down.shape[1])).flatten(0, 1))
    shares = torch.bmm(job.by_sample(torch.stack(rows)), job.x.flatten(2))  # b points*R n
    shares = shares.view(len(job.x), points, widest, *job.x.shape[2:])
    return cast("Tensor", MovedSum.apply(shares, _shifts(kernel, job.geometry), _side_growth(kernel, job.geometry))).flatten(2)


def _shifts(kernel: Sequence[int], geometry: Geometry) -> Shifts:
    """Per kernel point, from where an output position reads: point * dilation - padding, on each axis."""
    axes = [[k * d - p for k in range(side)] for side, d, p in zip(kernel, geometry.dilation, geometry.padding, strict=True)]
    grid = torch.cartesian_prod(*[torch.tensor(axis) for axis in axes]).reshape(-1, len(axes))
    return tuple(tuple(row) for row in grid.tolist())


def _side_growth(kernel: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """By how much each output side is longer than the input's."""
    return tuple(2 * p - d * (k - 1) for k, d, p in zip(kernel, geometry.dilation, geometry.padding, strict=True))


class MovedSum(torch.autograd.Function):
    """Sum over the kernel points of a stack (b, points, r, *space), each moved by its shift: (b, r, *space').

    Output position o takes input position o + shift of every point, where there is one.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, shifts: Shifts, growth: tuple[int, ...]) -> Tensor:
        """The sum, in at least 32 bits, rounded once."""
        ctx.shifts, ctx.shape = shifts, stack.shape
        sides = [side + more for side, more in zip(stack.shape[3:], growth, strict=True)]
        wide = stack.dtype if stack.dtype == torch.float64 else torch.float32
        total = torch.zeros(stack.shape[0], stack.shape[2], *sides, dtype=wide, device=stack.device)
        for point, here, there in _windows(shifts, sides, stack.shape[3:]):
            total[here] += stack[:, point][there]
        return total.to(stack.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Each point takes back what it gave."""
        out = grad.new_zeros(ctx.shape)
        for point, here, there in _windows(ctx.shifts, grad.shape[2:], ctx.shape[3:]):
            out[:, point][there] = grad[here]
        return out, None, None


def _windows(
    shifts: Shifts, out: Sequence[int], inputs: Sequence[int]
) -> Iterator[tuple[int, tuple[slice | Any, ...], tuple[slice | Any, ...]]]:
    """(point, window in the output, window in the input) of every point that meets both."""
    for point, shift in enumerate(shifts):
        low = [max(0, -s) for s in shift]
        high = [min(o, i - s) for o, i, s in zip(out, inputs, shift, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            here = (..., *(slice(a, b) for a, b in zip(low, high, strict=True)))
            there = (..., *(slice(a + s, b + s) for a, b, s in zip(low, high, shift, strict=True)))
            yield point, here, there


def _by_expert(job: LayerCall, pairs: Sequence[Factors | None], widest: int) -> Tensor:
    """A convolution for each expert: b g*R n; the channel groups share ``lora_A``."""
    groups = job.geometry.groups
    parts: list[Tensor | None] = []
    for pair, share in zip(pairs, job.shares, strict=True):
        if pair is None:
            parts.append(None)
            continue
        down = pair[0] if groups == 1 else pair[0].repeat(groups, *([1] * (pair[0].ndim - 1)))
        hidden = job.geometry.apply(share.of(job.x), down).flatten(2)  # n_e g*r n
        rank = pair[0].shape[0]
        if rank < widest:
            hidden = F.pad(hidden.view(len(hidden), groups, rank, -1), (0, 0, 0, widest - rank)).flatten(1, 2)
        parts.append(hidden)
    sample = next(part for part in parts if part is not None)
    filled = [sample.new_zeros(s.count, *sample.shape[1:]) if part is None else part for part, s in zip(parts, job.shares, strict=True)]
    return job.in_order(filled)
