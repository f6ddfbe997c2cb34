"""Normalisation that does not couple the samples of different experts.

In train mode BatchNorm subtracts a mean over all samples of the batch, so the loss of one expert's samples sends gradient into every
other expert. InstanceNorm with running statistics keeps gradients apart, but gathers one mean over all samples, which every expert is
then evaluated with. Two ways out: statistics that no longer move (:class:`FrozenBatchNorm`), or statistics of each expert's own samples
(:class:`ExpertBatchNorm`). Both keep the state-dict names of the layer they replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from medlore.errors import InputError
from medlore.layers.experts.routing import BASE_ALONE, Roster, RouteMemory


def coupling_layers(model: nn.Module) -> dict[str, _NormBase]:
    """Layers that mix the samples of a batch in train mode: every kind of BatchNorm, and InstanceNorm that tracks statistics, by name.

    Coupling in a network's own code (functional batch norm, a loss over the batch) has no module to be found by.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm) or _shares_statistics(module)}


def _shares_statistics(module: nn.Module) -> TypeGuard[_InstanceNorm]:
    return isinstance(module, _InstanceNorm) and module.track_running_stats


class _ReplacedNorm(nn.Module):
    """The parts of a BatchNorm under their own names: weight, bias, running_mean, running_var, num_batches_tracked."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _NormBase) -> None:
        super().__init__()
        self.kind, self.num_features, self.eps, self.momentum = type(norm), norm.num_features, norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.train(norm.training)

    def plain(self, mean: Tensor, variance: Tensor) -> nn.Module:
        """A BatchNorm of the first kind with these statistics and copies of the affine weights."""
        norm = self.kind(
            self.num_features,
            eps=self.eps,
            momentum=self.momentum,
            affine=self.weight is not None,
            track_running_stats=True,
            device=self.running_mean.device,
            dtype=self.running_mean.dtype,
        )
        with torch.no_grad():
            for name, value in (("running_mean", mean), ("running_var", variance), ("num_batches_tracked", self.num_batches_tracked)):
                getattr(norm, name).copy_(value)
        for name in ("weight", "bias"):
            own = getattr(self, name)
            if own is not None:
                setattr(norm, name, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))
        return norm.train(self.training)

    def extra_repr(self) -> str:
        """Size and kind."""
        return f"{self.num_features}, from={self.kind.__name__}"


class FrozenBatchNorm(_ReplacedNorm):
    """BatchNorm with its stored statistics in train mode too; (b, c, *space). Weight and bias stay trainable or not, as they were.

    Source: the frozen norm of detection networks; ours in this form.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the stored statistics."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)

    def for_expert(self, expert: str | None) -> nn.Module:
        """The plain norm; the same for every expert."""
        del expert
        return self.plain(self.running_mean, self.running_var)


class ExpertBatchNorm(_ReplacedNorm):
    """BatchNorm with statistics of its own for each expert and for the shared base; weight and bias are shared.

    In train mode each expert's samples are normalised by their own mean and variance and move that expert's running statistics alone.

    Source: domain-specific batch normalisation (Chang et al. 2019), for the statistics.
    """

    expert_running_mean: Tensor
    expert_running_var: Tensor
    expert_batches_tracked: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _NormBase, *, experts: Roster) -> None:
        super().__init__(norm)
        self.experts, self.layer_name = experts, type(norm).__name__
        count = len(experts)
        self.register_buffer("expert_running_mean", norm.running_mean.expand(count, -1).clone())  # type: ignore[union-attr]
        self.register_buffer("expert_running_var", norm.running_var.expand(count, -1).clone())  # type: ignore[union-attr]
        self.register_buffer("expert_batches_tracked", torch.zeros(count, dtype=torch.long, device=self.running_mean.device))
        self._memory = RouteMemory()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each expert's samples by its statistics; (b, c, *space)."""
        version = 0 if self.weight is None else self.weight._version
        route = self._memory.current(self.experts, version=version, remember=self.training, where=self.layer_name)
        if route is None:
            return self._normalised(x, BASE_ALONE)
        if route.mixture is not None:
            raise InputError(
                self.layer_name,
                "a mixture of experts",
                "one expert for each sample: statistics do not mix",
                "route by names, or install with batchnorm='freeze'",
            )
        route = route.checked(x.shape[0], self.layer_name)
        if len(route.groups) == 1:
            return self._normalised(x, route.groups[0].expert)
        y = torch.empty_like(x)
        for group in route.groups:
            positions = route.positions(group, x.device)
            y = y.index_copy(0, positions, self._normalised(x.index_select(0, positions), group.expert).to(y.dtype))
        return y

    def _normalised(self, x: Tensor, expert: int) -> Tensor:
        mean, variance = self._statistics(expert)
        if self.training and x.numel() // x.shape[1] < 2:
            raise InputError(
                self.layer_name,
                f"one value per channel for {'the shared base' if expert == BASE_ALONE else repr(self.experts[expert])}",
                "two or more in train mode",
                "put two samples of each expert into a batch, or install with batchnorm='freeze'",
            )
        momentum = self._momentum(expert) if self.training else 0.0
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=self.training, momentum=momentum, eps=self.eps)

    def _statistics(self, expert: int) -> tuple[Tensor, Tensor]:
        if expert == BASE_ALONE:
            return self.running_mean, self.running_var
        return self.expert_running_mean[expert], self.expert_running_var[expert]

    def _momentum(self, expert: int) -> float:
        counter = self.num_batches_tracked if expert == BASE_ALONE else self.expert_batches_tracked[expert]
        counter.add_(1)
        return 1.0 / float(counter) if self.momentum is None else self.momentum

    def for_expert(self, expert: str | None) -> nn.Module:
        """The plain norm with the statistics of one expert, or of the shared base."""
        index = BASE_ALONE if expert is None else self.experts.index(expert)
        return self.plain(*self._statistics(index))


def replaceable(name: str, norm: _NormBase, way: str) -> str | None:
    """Why a norm cannot be replaced in a way ("freeze" or "per-expert"); None when it can."""
    if norm.running_mean is None:
        return f"{name}: {type(norm).__name__} keeps no running statistics, so there is nothing to merge with"
    if way == "freeze" and _never_gathered(norm):
        return f"{name}: its statistics were never gathered; freezing them would switch the normalisation off"
    if way == "per-expert" and isinstance(norm, nn.SyncBatchNorm):
        return f"{name}: SyncBatchNorm gathers over processes; statistics of one expert cannot"
    if way == "per-expert" and isinstance(norm, _InstanceNorm):
        return f"{name}: {type(norm).__name__} normalises each sample alone; build it without track_running_stats, or freeze its statistics"
    return None


def _never_gathered(norm: _NormBase) -> bool:
    if isinstance(norm, _InstanceNorm):  # does not count its batches
        mean, variance = norm.running_mean, norm.running_var
        return mean is not None and variance is not None and not mean.any() and bool(torch.eq(variance, 1).all())
    return norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


NORM_WAYS: Mapping[str, type[FrozenBatchNorm] | type[ExpertBatchNorm]] = {"freeze": FrozenBatchNorm, "per-expert": ExpertBatchNorm}
