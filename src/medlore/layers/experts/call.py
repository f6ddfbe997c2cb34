"""What one call of a layer with experts consists of: the geometry of the base, the factors, and who computes which samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medlore.linalg.factors import channel_factors, delta_weight, factor_matrices, widened
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

    def pointwise(self, weight: Tensor) -> bool:
        """Whether the layer is one matrix at every position."""
        if not self.stride:
            return True
        ones = self.groups == 1 and all(k == 1 for k in weight.shape[2:])
        return ones and all(s == 1 for s in self.stride) and not any(self.padding)

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

    def gradients(self, grad_weight: Tensor | None, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        """Gradients of ``lora_A`` and ``lora_B`` from that of the merged weight; None where not wanted."""
        if grad_weight is None or not any(wanted):
            return [None, None]
        left, right = factor_matrices(self.lora_A, self.lora_B, layout=self.layout)
        flat = widened(grad_weight).reshape(left.shape[0], right.shape[1])
        flat = flat if self.scaling == 1.0 else flat * self.scaling
        grad_A = (widened(left).mT @ flat).view(self.lora_A.shape).to(self.lora_A.dtype) if wanted[0] else None
        grad_B = (flat @ widened(right).mT).view(self.lora_B.shape).to(self.lora_B.dtype) if wanted[1] else None
        return [grad_A, grad_B]

    def channel(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The pair in the channel layout."""
        return channel_factors(self.lora_A, self.lora_B, weight_shape=weight.shape, layout=self.layout)


@dataclass(frozen=True)
class Share:
    """The part of a batch that one expert computes; `pair` None means the shared base alone.

    Attributes:
        pair: the factors.
        count: number of samples.
        start: place of the first sample where all lie side by side, else None.
        positions: (n,) places in the batch; None for the whole batch.
    """

    pair: Pair | None
    count: int
    start: int | None
    positions: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """This expert's samples; a view where they lie side by side."""
        if self.positions is None:
            return x
        return x.index_select(0, self.positions) if self.start is None else x.narrow(0, self.start, self.count)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write this expert's results into their places; `whole` carries no gradient."""
        if self.start is None and self.positions is not None:
            whole.index_copy_(0, self.positions, part)
        else:
            whole.narrow(0, self.start or 0, part.shape[0]).copy_(part)


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer: input, base weights, and who computes which samples.

    Attributes:
        x: (b, in, *space), or (b, ..., in) of a linear layer.
        weight: of the base.
        bias: of the base.
        geometry: of the base.
        shares: one for each expert present.
        slots: (b,) the share of each sample.
        inverse: (b,) where each sample's result lies when the shares' results follow one another; None when in order.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    shares: Sequence[Share]
    slots: Tensor | None = None
    inverse: Tensor | None = None

    def by_sample(self, stacked: Tensor) -> Tensor:
        """(share, ...) -> (b, ...): each sample's own entry."""
        if len(self.shares) == 1 or self.slots is None:
            return stacked.expand(self.x.shape[0], *stacked.shape[1:])
        return stacked.index_select(0, self.slots)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """The shares' results, back in the order of the batch."""
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(list(parts))
        return joined if self.inverse is None else joined.index_select(0, self.inverse)
