"""Which form computes a layer: a written cost model over the shape of one call.

The unit is the time of one multiply-add in a well-filled dense convolution. With P output positions over the whole batch (b samples of
n), M output channels, C input channels a group, K kernel points, E experts present of channel rank R, D = P M C K, W = M C K, and
a = the values that go in and out:

==========  ==================================================================================================
merged      D + (conv + copy) a + (merge + R) E W + 4 E calls
factored    D + conv a + branch a + P C K ceil16(R) + 2 E calls        (pointwise: D + conv a + product a + b n R (C + M);
            where the kernel's points are moved: D + conv a + product a + P C K R)
gathered    D + conv a + gather b W + E calls                          (pointwise: D (1 + 50/n) + thin a + merge b W)
==========  ==================================================================================================

merged and gathered add D/3 where the base is frozen: the gradient of a merged kernel is dense, the base alone would need none. A gathered
kernel a sample is allowed only while these kernels are smaller than what the layer reads and writes anyway.

The constants of the CPU were fitted to `python -m benchmarks.experts`; those of a GPU follow from its ratio of bandwidth and launch time
to arithmetic, and were not measured.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from medlore.layers.experts.call import LayerCall
from medlore.layers.experts.hidden import moves_points
from medlore.linalg.matricize import interleave_side

Form = Literal["merged", "factored", "gathered"]


@dataclass(frozen=True)
class Prices:
    """Cost of one thing in multiply-adds of a dense convolution.

    Attributes:
        conv: a value that a convolution reads or writes.
        copy: a value that is gathered and put back.
        branch: a value of the layer while a convolution branch is added.
        product: a value while a pointwise branch is added.
        thin: a value that a batched product reads or writes.
        merge: a weight of a merged kernel, its gradient included.
        gather: a weight of a kernel that a grouped convolution reads.
        call: one call of an operation.
    """

    conv: float
    copy: float
    branch: float
    product: float
    thin: float
    merge: float
    gather: float
    call: float


PRICES: Final = {
    "cpu": Prices(conv=90, copy=70, branch=120, product=70, thin=25, merge=130, gather=290, call=2e5),
    "other": Prices(conv=200, copy=200, branch=300, product=200, thin=200, merge=300, gather=600, call=3e8),
}


@dataclass(frozen=True)
class Load:
    """The numbers of one call that the costs depend on."""

    batch: int
    positions: int  # P, over the batch
    outputs: int  # M
    columns: int  # C K
    traffic: int  # a
    experts: int  # E
    rank: int  # largest channel rank
    pointwise: bool
    plain_groups: bool  # whether a grouped convolution over samples fills the lanes
    frozen: bool
    moved: bool = False  # whether the factored form computes a kernel's points side by side

    @property
    def dense(self) -> float:
        """D: multiply-adds of the base."""
        return float(self.positions) * self.outputs * self.columns

    @property
    def weights(self) -> int:
        """W: values of one kernel."""
        return self.outputs * self.columns


def load_of(job: LayerCall) -> Load:
    """The numbers of a call; no tensor is read."""
    weight, geometry = job.weight, job.geometry
    outputs, columns = weight.shape[0], weight[0].numel()
    k = interleave_side(weight.shape)
    ranks = [s.pair.lora_A.shape[0] * (k if s.pair.layout == "interleaved" else 1) for s in job.shares if s.pair is not None]
    positions = _positions(job)
    channels = weight.shape[1]
    return Load(
        batch=job.x.shape[0],
        positions=positions,
        outputs=outputs,
        columns=columns,
        traffic=job.x.numel() + positions * outputs,
        experts=len(job.shares),
        rank=max(ranks),
        pointwise=geometry.pointwise(weight),
        plain_groups=channels % 16 == 0 and (outputs // geometry.groups) % 16 == 0,
        frozen=torch.is_grad_enabled() and not weight.requires_grad,
        moved=moves_points(geometry, weight, max(ranks)),
    )


def _positions(job: LayerCall) -> int:
    """Output positions over the batch."""
    x, geometry = job.x, job.geometry
    if not geometry.stride:
        return x.numel() // max(x.shape[-1], 1)
    total = x.shape[0]
    sides = zip(x.shape[2:], job.weight.shape[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True)
    for size, kernel, stride, padding, dilation in sides:
        total *= max((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1, 0)
    return total


def costs(load: Load, prices: Prices) -> dict[Form, float]:
    """The three costs of the table above; a form that may not be taken costs infinity."""
    a, dense = load.traffic, load.dense
    frozen = dense / 3 if load.frozen else 0.0
    merged = dense + (prices.conv + (prices.copy if load.experts > 1 else 0)) * a
    merged += (prices.merge + load.rank) * load.experts * load.weights + 4 * load.experts * prices.call + frozen
    lanes = -(-load.rank // 16) * 16
    if load.pointwise:
        factored = dense + (prices.conv + prices.product) * a + float(load.positions) * load.rank * (load.columns + load.outputs)
        samples = max(load.positions // max(load.batch, 1), 1)
        gathered = dense * (1 + 50 / samples) + prices.thin * a + prices.merge * load.batch * load.weights
    else:
        if load.moved:
            factored = dense + (prices.conv + prices.product) * a + float(load.positions) * load.rank * load.columns
        else:
            factored = dense + (prices.conv + prices.branch) * a + float(load.positions) * lanes * load.columns
        small = load.batch * load.weights < 2e6  # the kernels stay in the cache
        gathered = dense * (1 if load.plain_groups else 2) + prices.conv * a
        gathered += (prices.gather / (5 if small else 1)) * load.batch * load.weights
    factored += 2 * load.experts * prices.call
    gathered += load.experts * prices.call + frozen
    if load.batch * load.weights > a:
        gathered = float("inf")
    return {"merged": merged, "factored": factored, "gathered": gathered}


def choose_form(job: LayerCall) -> Form:
    """The form that costs least for a call."""
    found = costs(load_of(job), PRICES["cpu" if job.x.device.type == "cpu" else "other"])
    return min(found, key=lambda form: found[form])
