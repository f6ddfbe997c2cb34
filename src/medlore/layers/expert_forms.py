"""The ways to compute a layer with experts for a mixed batch. All give the same numbers to rounding; they differ in cost.

merged      one kernel W0 + delta for each expert present, one dense call on that expert's samples
factored    one dense call of W0 for the whole batch, and beside it ``lora_A`` then ``lora_B`` on each expert's samples
gathered    one kernel a sample, one grouped call

Only experts with samples in the batch are touched: the gradient of every other factor is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medlore.linalg.factors import channel_factors, delta_weight, widened
from medlore.linalg.matricize import Layout


@dataclass(frozen=True)
class Geometry:
    """How a weight is slid over its input; an empty stride means a linear layer.

    Attributes:
        stride: one number a space axis.
        padding: zeros on both sides of each space axis.
        dilation: one number a space axis.
        groups: channel groups.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int | None = None) -> Tensor:
        """The plain layer: (b, in, *space) -> (b, out, *space'), or (b, ..., in) -> (b, ..., out) of a linear one."""
        groups = self.groups if groups is None else groups
        if not self.stride:
            return F.linear(x, weight, bias)
        convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.stride)]
        return convolution(x, weight, bias, self.stride, self.padding, self.dilation, groups)


@dataclass(frozen=True)
class Pair:
    """One expert's factors in one layer."""

    lora_A: Tensor  # noqa: N815 - the field's word
    lora_B: Tensor  # noqa: N815
    scaling: float
    layout: Layout

    def delta(self, weight: Tensor) -> Tensor:
        """The change of `weight`, in at least 32 bits."""
        return delta_weight(self.lora_A, self.lora_B, weight_shape=weight.shape, layout=self.layout, scaling=self.scaling)

    def merged(self, weight: Tensor) -> Tensor:
        """`weight` with the change, in its own dtype: added in at least 32 bits, rounded once."""
        return (widened(weight) + self.delta(weight)).to(weight.dtype)

    def channel(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The pair in the channel layout."""
        return channel_factors(self.lora_A, self.lora_B, weight_shape=weight.shape, layout=self.layout)


@dataclass(frozen=True)
class Share:
    """The part of a batch that one expert computes; `pair` None means the shared base alone.

    Attributes:
        pair: the factors.
        positions: (n,) places in the batch; None for the whole batch.
    """

    pair: Pair | None
    positions: Tensor | None


@dataclass(frozen=True)
class Job:
    """One call of one layer: input, base weights, and who computes which samples."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    shares: Sequence[Share]


def merged_form(job: Job) -> Tensor:
    """One dense call for each expert present, with its merged kernel.

    Source: ours (LoRKD's deployment form, W0 + s B A, used in training too).
    """
    parts = []
    for share in job.shares:
        weight = job.weight if share.pair is None else share.pair.merged(job.weight)
        x = job.x if share.positions is None else job.x.index_select(0, share.positions)
        parts.append(job.geometry.apply(x, weight, job.bias))
    return _in_batch_order(parts, job.shares)


def _in_batch_order(parts: Sequence[Tensor], shares: Sequence[Share]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([s.positions for s in shares if s.positions is not None])
    return torch.cat(list(parts)).index_select(0, torch.argsort(order))


def factored_form(job: Job) -> Tensor:
    """One dense call of the base for the whole batch, plus the low-rank branch of each expert on its samples.

    Source: LoRA eq. 3 (Hu et al. 2021), one branch an expert.
    """
    y = job.geometry.apply(job.x, job.weight, job.bias)
    for share in job.shares:
        if share.pair is None:
            continue
        x = job.x if share.positions is None else job.x.index_select(0, share.positions)
        change = low_rank_branch(x, share.pair, job.weight, job.geometry).to(y.dtype)
        y = y + change if share.positions is None else y.index_add(0, share.positions, change)
    return y


def low_rank_branch(x: Tensor, pair: Pair, weight: Tensor, geometry: Geometry) -> Tensor:
    """What the factors add, B (A x) times the scaling, never forming the kernel: (b, in, *space) -> (b, out, *space')."""
    lora_A, lora_B = pair.channel(weight)
    return apply_factors(x, lora_A, lora_B * pair.scaling, geometry)


def apply_factors(x: Tensor, lora_A: Tensor, lora_B: Tensor, geometry: Geometry) -> Tensor:
    """``lora_B`` of ``lora_A`` of x; channel layout; the channel groups share ``lora_A``."""
    if not geometry.stride:
        return F.linear(F.linear(x, lora_A), lora_B)
    groups, rank = geometry.groups, lora_A.shape[0]
    if groups == 1:
        hidden = geometry.apply(x, lora_A)
        return Geometry((1,) * len(geometry.stride), (0,) * len(geometry.stride), (1,) * len(geometry.stride)).apply(hidden, lora_B)
    hidden = geometry.apply(x, lora_A.repeat(groups, *([1] * (lora_A.ndim - 1))))  # b g*r *space
    space = hidden.shape[2:]
    split = hidden.reshape(x.shape[0], groups, rank, -1)  # b g r n
    up = lora_B.reshape(groups, -1, rank)  # g o/g r
    return torch.einsum("gor,bgrn->bgon", up, split).reshape(x.shape[0], -1, *space)


def gathered_form(job: Job) -> Tensor:
    """A kernel for each sample, in one grouped call.

    Source: LoRKD's grouped convolution, with the kernels of the experts present alone.
    """
    kernels = torch.stack([job.weight if s.pair is None else s.pair.merged(job.weight) for s in job.shares])
    slots = job.x.new_zeros(job.x.shape[0], dtype=torch.long)
    for number, share in enumerate(job.shares):
        if share.positions is not None:
            slots = slots.index_fill(0, share.positions, number)
    return _one_kernel_a_sample(job, kernels.index_select(0, slots))


def _one_kernel_a_sample(job: Job, kernels: Tensor) -> Tensor:
    x, geometry, batch = job.x, job.geometry, job.x.shape[0]
    if not geometry.stride:
        y = torch.einsum("bni,boi->bno", x.reshape(batch, -1, x.shape[-1]), kernels).reshape(*x.shape[:-1], -1)
        return y if job.bias is None else y + job.bias
    bias = None if job.bias is None else job.bias.repeat(batch)
    y = geometry.apply(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), bias, groups=batch * geometry.groups)
    return y.reshape(batch, -1, *y.shape[2:])


def mixture_form(job: Job, pairs: Sequence[tuple[int, Pair]], mixture: Tensor) -> Tensor:
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
