"""Layers with experts: one shared base layer and, for each expert, a pair of low-rank factors.

``y = W0 x + s_e B_e A_e x`` for a sample that is routed to expert e, ``y = W0 x`` without a route (:mod:`medlore.layers.experts.routing`).
Ranks may differ between experts; rank 0 means that an expert is the shared base in this layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlore.errors import InputError, StepError
from medlore.layers.experts.call import Geometry, LayerCall, Pair, Share
from medlore.layers.experts.dispatch import choose_form
from medlore.layers.experts.forms import factored_form, gathered_form, merged_form, mixture_form
from medlore.layers.experts.routing import BASE_ALONE, Roster, Route, RouteMemory
from medlore.linalg.factors import factor_shapes, widened
from medlore.linalg.matricize import Layout, checked_layout, interleave_side

FORMS: Final = {"merged": merged_form, "factored": factored_form, "gathered": gathered_form}
Scalings = float | Mapping[str, float] | None


class ExpertLayer(nn.Module):
    """What all expert layers share: factors, scalings, the route, merging. Use one of its three final classes.

    Attributes:
        base_layer: the shared layer, trainable or frozen as its parameters say.
        experts: names in the order of their indices.
        ranks: name -> rank in this layer, 0 allowed.
        scaling: name -> alpha / rank; kept in the state dict (`lora_scaling.NAME`) because it changes the output.
        lora_A: name -> factor, for experts of rank 1 and more.
        lora_B: name -> factor.
        layout: "channel" or "interleaved".
        layer_name: name in the network, for messages.
    """

    def __init__(
        self,
        base_layer: nn.Linear | nn.Conv2d | nn.Conv3d,
        *,
        ranks: Mapping[str, int],
        alpha: Scalings = None,
        scaling: Scalings = None,
        layout: Layout = "channel",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.experts: Roster = tuple(ranks)
        self.ranks = checked_ranks(ranks)
        self.layout = checked_layout(layout)
        self.scaling = checked_scaling(self.ranks, alpha, scaling)
        self.layer_name = type(self).__name__
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._memory = RouteMemory()
        weight = base_layer.weight
        for name, rank in self.ranks.items():
            if rank:
                shape_A, shape_B = factor_shapes(weight.shape, rank, self.layout)
                self.lora_A[name] = nn.Parameter(weight.new_empty(shape_A))
                self.lora_B[name] = nn.Parameter(weight.new_empty(shape_B))
        self.reset_factors()

    def reset_factors(self) -> None:
        """Random ``lora_A``, zero ``lora_B``: every expert starts as the shared base.

        Source: LoRA (Hu et al. 2021), the initialisation of loralib and PEFT.
        """
        for name, lora_A in self.lora_A.items():
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B[name])

    def check_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Whether a pair fits the layer.

        Raises:
            InputError: another shape than its rank asks for, or a pair in the other layout.
        """
        k = interleave_side(self.base_layer.weight.shape) if self.layout == "interleaved" else 1
        rank = lora_A.shape[0] // k if lora_A.ndim else 0
        wanted = factor_shapes(self.base_layer.weight.shape, rank, self.layout)
        if (tuple(lora_A.shape), tuple(lora_B.shape)) != wanted or rank < 1:
            raise InputError(
                f"{self.layer_name}: lora_A, lora_B",
                f"shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}",
                f"{wanted[0]} and {wanted[1]} for rank {rank} in the {self.layout} layout",
                "convert the pair first",
            )

    def set_factors(self, expert: str, lora_A: Tensor, lora_B: Tensor, *, scaling: float) -> None:
        """Give an expert another pair, of any rank; in the dtype and on the device of the base.

        Raises:
            InputError: the pair does not fit.
        """
        self.check_factors(lora_A, lora_B)
        weight = self.base_layer.weight
        self.lora_A[expert] = nn.Parameter(lora_A.detach().to(weight, copy=True))
        self.lora_B[expert] = nn.Parameter(lora_B.detach().to(weight, copy=True))
        k = interleave_side(weight.shape) if self.layout == "interleaved" else 1
        self.ranks[expert], self.scaling[expert] = lora_A.shape[0] // k, scaling

    def drop_factors(self, expert: str) -> None:
        """Make an expert the shared base in this layer: rank 0."""
        if self.ranks[expert]:
            del self.lora_A[expert], self.lora_B[expert]
        self.ranks[expert], self.scaling[expert] = 0, 0.0

    def pair(self, expert: str) -> Pair | None:
        """The factors of an expert; None where its rank is 0."""
        if not self.ranks[expert]:
            return None
        return Pair(self.lora_A[expert], self.lora_B[expert], self.scaling[expert], self.layout)

    def delta_weight(self, expert: str) -> Tensor:
        """What an expert adds to the base weight: a tensor of its shape, in at least 32 bits."""
        pair = self.pair(expert)
        return pair.delta(self.base_layer.weight) if pair else torch.zeros_like(widened(self.base_layer.weight))

    @torch.no_grad()
    def merged_weight(self, weights: Mapping[str, float]) -> Tensor:
        """The base weight plus a weighted sum of experts, in the dtype of the base; the base itself is not touched."""
        base = self.base_layer.weight
        total = widened(base).clone()
        for name, weight in weights.items():
            pair = self.pair(name)
            if pair is not None and weight:
                total += weight * pair.delta(base) if weight != 1.0 else pair.delta(base)
        return total.to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The layer under the route of the moment; (b, ...) as the base layer takes it."""
        route = self._memory.current(self.experts, version=self._weights_version(), remember=self._may_train(), where=self.layer_name)
        if route is None or x.numel() == 0:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if x.ndim < self._batched_ndim:
            return self._routed(x.unsqueeze(0), route).squeeze(0)
        return self._routed(x, route)

    def _routed(self, x: Tensor, route: Route) -> Tensor:
        route = route.checked(x.shape[0], self.layer_name)
        x, geometry = self._prepared(x)
        base = self.base_layer
        if route.mixture is not None:
            job = LayerCall(x, base.weight, base.bias, geometry, ())
            return mixture_form(job, self._mixed_pairs(route.mixture), route.mixture)
        shares = self._shares(route, x)
        if all(share.pair is None for share in shares):
            return geometry.apply(x, base.weight, base.bias)
        many = len(shares) > 1
        slots, inverse = (route.slots(x.device), route.inverse(x.device)) if many else (None, None)
        job = LayerCall(x, base.weight, base.bias, geometry, shares, slots, inverse)
        return FORMS[choose_form(job)](job)

    def _shares(self, route: Route, x: Tensor) -> list[Share]:
        pairs = [None if g.expert == BASE_ALONE else self.pair(self.experts[g.expert]) for g in route.groups]
        if len(pairs) == 1:
            return [Share(pairs[0], len(x), 0, None)]
        return [
            Share(pair, len(g.positions), g.positions[0] if g.contiguous else None, route.positions(g, x.device))
            for pair, g in zip(pairs, route.groups, strict=True)
        ]

    def _mixed_pairs(self, mixture: Tensor) -> list[tuple[int, Pair]]:
        used = torch.ones(len(self.experts), dtype=torch.bool) if mixture.requires_grad else (mixture != 0).any(0).cpu()
        pairs = [(index, self.pair(name)) for index, name in enumerate(self.experts) if used[index]]
        return [(index, pair) for index, pair in pairs if pair is not None]

    def _may_train(self) -> bool:
        return self.training or torch.is_grad_enabled()

    def _weights_version(self) -> int:
        factors = sum(p._version for pairs in (self.lora_A, self.lora_B) for p in pairs.values())
        return int(self.base_layer.weight._version + factors)

    @property
    def _batched_ndim(self) -> int:
        return self.base_layer.weight.ndim

    def _prepared(self, x: Tensor) -> tuple[Tensor, Geometry]:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.experts:
            destination[f"{prefix}lora_scaling.{name}"] = torch.tensor(self.scaling[name], dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 - torch's signature
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Take the scalings of the file by name; one without any (a published checkpoint) leaves ours, one that lacks some is not whole."""
        found = {name: state_dict.pop(f"{prefix}lora_scaling.{name}", None) for name in self.experts}
        self.scaling |= {name: float(value) for name, value in found.items() if value is not None}
        if any(value is not None for value in found.values()):
            missing_keys += [f"{prefix}lora_scaling.{name}" for name, value in found.items() if value is None]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)

    def extra_repr(self) -> str:
        """Ranks and layout."""
        return f"ranks={self.ranks}, layout={self.layout!r}"


class ExpertLinear(ExpertLayer):
    """A linear layer with experts: (b, ..., in) -> (b, ..., out).

    Examples:
        >>> import torch
        >>> layer = ExpertLinear(torch.nn.Linear(4, 2), ranks={"liver": 2, "brain": 1}, alpha=2)
        >>> layer.scaling
        {'liver': 1.0, 'brain': 2.0}

    Source: LoRA (Hu et al. 2021); LoRKD (CVPR 2024) for one pair a task.
    """

    def _prepared(self, x: Tensor) -> tuple[Tensor, Geometry]:
        return x, Geometry()


class _ExpertConv(ExpertLayer):
    def _prepared(self, x: Tensor) -> tuple[Tensor, Geometry]:
        base = cast("nn.Conv2d | nn.Conv3d", self.base_layer)
        stride, dilation = tuple(base.stride), tuple(base.dilation)
        sides = _padding_sides(base)
        even = all(low == high for low, high in sides)
        if base.padding_mode == "zeros" and even:
            return x, Geometry(stride, tuple(low for low, _ in sides), dilation, base.groups)
        flat = [side for pair in reversed(sides) for side in pair]
        padded = F.pad(x, flat, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
        return padded, Geometry(stride, (0,) * len(stride), dilation, base.groups)


def _padding_sides(base: nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """(before, after) for each space axis; "same" puts the odd one after, as torch does."""
    if base.padding == "valid":
        return [(0, 0)] * len(base.kernel_size)
    if base.padding == "same":
        totals = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in base.padding]


class ExpertConv2d(_ExpertConv):
    """A 2D convolution with experts: (b, c, h, w) -> (b, out, h', w'); any kernel, stride, dilation, padding and groups.

    Examples:
        >>> import torch
        >>> layer = ExpertConv2d(torch.nn.Conv2d(4, 8, 3), ranks={"liver": 2, "brain": 0})
        >>> tuple(layer.lora_A["liver"].shape), tuple(layer.lora_B["liver"].shape)
        ((2, 4, 3, 3), (8, 2, 1, 1))

    Source: LoRKD (CVPR 2024); PEFT's convolution LoRA for the channel layout.
    """


class ExpertConv3d(_ExpertConv):
    """A 3D convolution with experts: (b, c, x, y, z) -> (b, out, x', y', z').

    Examples:
        >>> import torch
        >>> layer = ExpertConv3d(torch.nn.Conv3d(4, 8, 3), ranks={"liver": 2}, layout="interleaved", scaling=2.0)
        >>> tuple(layer.lora_A["liver"].shape), tuple(layer.lora_B["liver"].shape)
        ((6, 36), (24, 6))

    Source: LoRKD (arXiv 2409.19540); PEFT's convolution LoRA for the channel layout.
    """


def checked_ranks(ranks: Mapping[str, int]) -> dict[str, int]:
    """The ranks, if every name can be part of a state-dict key and every rank is a whole number from 0.

    Raises:
        InputError: no expert, a name that cannot be used, a rank that is none.
    """
    reserved = set(dir(nn.ParameterDict))
    faults = [
        f"expert {name!r}: the name may not be empty, hold a dot, slash or backslash, or be one of torch's own words"
        for name in ranks
        if not isinstance(name, str) or not name or set("./\\\0") & set(name) or name in reserved
    ]
    faults += [
        f"expert {name!r}: rank {rank!r}" for name, rank in ranks.items() if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0
    ]
    if faults or not ranks:
        raise InputError(
            "ranks",
            f"{len(faults)} faults" if faults else "no expert",
            "expert name -> whole number from 0",
            "correct the entries",
            faults=faults,
        )
    return dict(ranks)


def checked_scaling(ranks: Mapping[str, int], alpha: Scalings, scaling: Scalings) -> dict[str, float]:
    """The scaling of each expert: what is given as `scaling`, else alpha / rank, else 1.

    Raises:
        InputError: both are given, or a mapping lacks an expert, or a number is not finite.
    """
    if alpha is not None and scaling is not None:
        raise InputError("alpha, scaling", "both", "one of them: scaling is alpha / rank", "leave one out")
    given = alpha if alpha is not None else scaling
    if isinstance(given, Mapping) and (lacking := sorted(set(ranks) - set(given))):
        raise InputError("alpha" if alpha is not None else "scaling", f"no value for {lacking}", "one for each expert", "add them")
    values = {name: float(given[name] if isinstance(given, Mapping) else 1.0 if given is None else given) for name in ranks}
    if alpha is not None:
        values = {name: value / ranks[name] if ranks[name] else 0.0 for name, value in values.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise InputError("alpha, scaling", f"{values}", "finite numbers", "correct them")
    return values


def expert_layer(base_layer: nn.Module, **options: Any) -> ExpertLayer:
    """The expert layer around a plain one.

    Raises:
        StepError: a layer that no class here wraps; `install_experts` refuses those before.
    """
    for plain, routed in WRAPPERS.items():
        if type(base_layer) is plain:
            return routed(cast("nn.Linear", base_layer), **options)
    raise StepError("expert_layer", type(base_layer).__name__, ", ".join(p.__name__ for p in WRAPPERS), "wrap another layer")


WRAPPERS: Final[dict[type[nn.Module], type[ExpertLayer]]] = {nn.Linear: ExpertLinear, nn.Conv2d: ExpertConv2d, nn.Conv3d: ExpertConv3d}
