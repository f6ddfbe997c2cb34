"""Install experts into a network, freeze, merge one into a plain copy, remove them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from medlore.errors import InputError, TargetError, UnknownNameError, nearest_names
from medlore.layers.experts.layer import WRAPPERS, ExpertLayer, Scalings, checked_ranks, expert_layer
from medlore.layers.experts.norms import ExpertBatchNorm, FrozenBatchNorm, coupling_layers, replaceable
from medlore.layers.experts.routing import Roster, roster_of
from medlore.linalg.matricize import Layout, checked_layout

Ranks = int | Mapping[str, int] | Mapping[tuple[str, str], int] | Callable[[str, str], int]
Targets = str | Callable[[str, nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...] | None
BatchNormWay = Literal["refuse", "freeze", "per-expert"]


@dataclass(frozen=True)
class InstalledLayer:
    """One layer that got experts.

    Attributes:
        name: in the network.
        kind: class of the base layer.
        weight_shape: of the base weight.
        ranks: expert -> rank.
        parameters: expert -> number of values in its factors.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    ranks: dict[str, int]
    parameters: dict[str, int]


@dataclass(frozen=True)
class InstallReport:
    """What an installation did.

    Attributes:
        experts: names in the order of their indices.
        layout: of all factors.
        layers: those with experts.
        norms: replaced batch norms, name -> way.
        base_parameters: values of the shared network.
    """

    experts: Roster
    layout: Layout
    layers: tuple[InstalledLayer, ...]
    norms: dict[str, str]
    base_parameters: int

    @property
    def expert_parameters(self) -> dict[str, int]:
        """Number of values of each expert in all its factors."""
        return {name: sum(layer.parameters[name] for layer in self.layers) for name in self.experts}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a report or manifest."""
        return {**asdict(self), "expert_parameters": self.expert_parameters}


def install_experts(  # noqa: PLR0913 - one door for what is one decision
    model: nn.Module,
    *,
    experts: Sequence[str],
    ranks: Ranks,
    targets: Targets = None,
    layout: Layout = "channel",
    alpha: Scalings = None,
    scaling: Scalings = None,
    base: Literal["trainable", "frozen"] = "trainable",
    batchnorm: BatchNormWay = "refuse",
) -> InstallReport:
    """Give layers of a network low-rank experts, in place. Do it before DistributedDataParallel wraps the network.

    Nothing is changed unless everything fits.

    Args:
        model: any network of linear, 2D and 3D convolution layers.
        experts: names in the order of their indices.
        ranks: one rank for all; or expert -> rank; or (layer, expert) -> rank, 0 where a pair is absent; or a function of (layer, expert).
        targets: which layers: a regular expression that the whole name matches, a function of (name, module), or classes; None: every
            linear, 2D and 3D convolution layer. A layer where all ranks are 0 is left plain.
        layout: "channel", or "interleaved" for LoRKD's published files.
        alpha: scaling is alpha / rank; a number or expert -> number; None: scaling 1.
        scaling: the scaling itself, whatever the rank; excludes `alpha`.
        base: "frozen" stops the gradient of everything but the factors.
        batchnorm: what to do about layers that couple samples (BatchNorm; InstanceNorm with running statistics): "refuse", "freeze" their
            statistics, or keep them "per-expert".

    Returns:
        What was installed.

    Raises:
        TargetError: no layer is met, or one that cannot have experts; all of them are listed.
        InputError: BatchNorm with batchnorm="refuse" and every other wrong argument.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> install_experts(net, experts=["liver", "brain"], ranks={"liver": 4, "brain": 2}).expert_parameters
        {'liver': 188, 'brain': 94}

    Source: LoRKD (CVPR 2024, arXiv 2409.19540); ours for the choice of norms.
    """
    checked_layout(layout)
    if base not in ("trainable", "frozen"):
        raise UnknownNameError("base", base, ["trainable", "frozen"])
    roster = _checked_roster(model, experts)
    chosen = _chosen_layers(model, targets)
    table = {name: {expert: _rank_of(ranks, name, expert) for expert in roster} for name in chosen}
    _check_rank_names(ranks, roster, chosen)
    wrapped = {name: checked_ranks(row) for name, row in table.items() if any(row.values())}
    if not wrapped:
        raise TargetError("ranks", "rank 0 for every layer and expert", "one rank from 1", "raise a rank")
    norms = _replaced_norms(model, roster, batchnorm)
    base_parameters = sum(p.numel() for p in model.parameters())
    layers = {name: expert_layer(chosen[name], ranks=row, alpha=alpha, scaling=scaling, layout=layout) for name, row in wrapped.items()}
    if base == "frozen":  # the factors do not hang in the model yet
        model.requires_grad_(requires_grad=False)
    for name, layer in layers.items():
        layer.layer_name = name
        layer.train(chosen[name].training)
        _replace(model, chosen[name], layer)
    for name, norm in norms.items():
        _replace(model, model.get_submodule(name), norm)
    rows = tuple(_installed(name, layer) for name, layer in layers.items())
    return InstallReport(roster, layout, rows, dict.fromkeys(norms, batchnorm), base_parameters)


def _installed(name: str, layer: ExpertLayer) -> InstalledLayer:
    sizes = {e: layer.lora_A[e].numel() + layer.lora_B[e].numel() if rank else 0 for e, rank in layer.ranks.items()}
    return InstalledLayer(name, type(layer.base_layer).__name__, tuple(layer.base_layer.weight.shape), dict(layer.ranks), sizes)


def _checked_roster(model: nn.Module, experts: Sequence[str]) -> Roster:
    if isinstance(experts, str) or len(set(experts)) != len(experts):
        raise InputError("experts", f"{experts!r}", "a list of different names", "give each expert one name")
    if any(isinstance(module, ExpertLayer) for module in model.modules()):
        raise InputError("model", "a network that has experts", "a plain network", "call remove_experts(model) first")
    checked_ranks(dict.fromkeys(experts, 0))
    return tuple(experts)


def _rank_of(ranks: Ranks, layer: str, expert: str) -> int:
    if isinstance(ranks, int):
        return ranks
    if isinstance(ranks, Mapping):
        by_name = cast("Mapping[Any, int]", ranks)
        return by_name[expert] if expert in by_name else by_name.get((layer, expert), 0)
    return ranks(layer, expert)


def _check_rank_names(ranks: Ranks, roster: Roster, chosen: Mapping[str, nn.Module]) -> None:
    """Names in `ranks` that nothing answers to, and experts without a rank."""
    if not isinstance(ranks, Mapping):
        return
    faults = []
    for key in ranks:
        layer, expert = key if isinstance(key, tuple) else (None, key)
        if expert not in roster:
            faults.append(f"{key!r}: no expert {expert!r}; the nearest are {nearest_names(str(expert), roster)}")
        if layer is not None and layer not in chosen:
            faults.append(f"{key!r}: {layer!r} is no target; the nearest are {nearest_names(layer, chosen)}")
    if not any(isinstance(key, tuple) for key in ranks):
        faults += [f"{expert!r}: no rank" for expert in roster if expert not in ranks]
    if faults:
        raise TargetError("ranks", f"{len(faults)} faults", "the experts and targets of this network", "correct the names", faults=faults)


def _chosen_layers(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    matches = _matcher(targets)
    modules = dict(model.named_modules())
    chosen = {name: module for name, module in modules.items() if matches(name, module)}
    if not chosen:
        raise TargetError(
            "targets",
            f"{targets!r} meets no layer",
            f"some of {len(modules)} modules; the nearest are {nearest_names(str(targets), [n for n in modules if n])}",
            "try the expression on the names of model.named_modules()",
        )
    faults = [f"{name or 'the network itself'}: {why}" for name, module in chosen.items() if (why := _refusal(name, module, modules))]
    if faults:
        raise TargetError(
            "targets", f"{len(faults)} layers that cannot have experts", "nn.Linear, nn.Conv2d, nn.Conv3d", "leave them out", faults=faults
        )
    return chosen


def _matcher(targets: Targets) -> Callable[[str, nn.Module], bool]:
    if targets is None:
        return lambda _name, module: type(module) in WRAPPERS
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise InputError("targets", f"{targets!r} ({error})", "a regular expression", "correct it") from None
        return lambda name, _module: pattern.fullmatch(name) is not None
    if isinstance(targets, type | tuple):
        return lambda _name, module: isinstance(module, targets)
    return targets


def _refusal(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a layer cannot have experts; None when it can."""
    if type(module) not in WRAPPERS:
        return f"{type(module).__name__} has a forward of its own"
    if not name:
        return "wrap it in a network, or build the expert layer directly"
    parent = modules[name.rpartition(".")[0]]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads the weight past the layer's forward, the expert would be skipped silently"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        return "it carries hooks (or a replaced forward), which would no longer run; remove them first"
    return None


def _replaced_norms(model: nn.Module, roster: Roster, way: BatchNormWay) -> dict[str, nn.Module]:
    found = coupling_layers(model)
    if way not in ("refuse", "freeze", "per-expert"):
        raise UnknownNameError("batchnorm", way, ["refuse", "freeze", "per-expert"])
    if not found:
        return {}
    if way == "refuse":
        raise InputError(
            "batchnorm='refuse'",
            f"{len(found)} layers couple the samples of a batch in train mode: every expert would be moved by the samples of the others",
            "norms without coupling (GroupNorm, LayerNorm, InstanceNorm without running statistics), or a decision",
            "batchnorm='freeze' keeps the stored statistics; batchnorm='per-expert' keeps statistics for each expert",
            faults=[f"{name}: {type(norm).__name__}" for name, norm in found.items()],
        )
    faults = [why for name, norm in found.items() if (why := replaceable(name, norm, way))]
    if faults:
        raise InputError(
            f"batchnorm={way!r}", f"{len(faults)} norms cannot be replaced so", "see each", "choose another way", faults=faults
        )
    return {name: _separated(name, norm, roster, way) for name, norm in found.items()}


def _separated(name: str, norm: _NormBase, roster: Roster, way: BatchNormWay) -> nn.Module:
    if way == "freeze":
        return FrozenBatchNorm(norm)
    replaced = ExpertBatchNorm(norm, experts=roster)
    replaced.layer_name = name
    return replaced


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs: a shared layer hangs in several places."""
    for parent in list(model.modules()):
        if parent is new:
            continue
        for attribute, child in list(parent._modules.items()):
            if child is old:
                parent._modules[attribute] = new


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
    """(name, layer) of every layer with experts."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertLayer))


def set_trainable(model: nn.Module, *, base: bool, experts: Sequence[str] | None = None) -> None:
    """Say what learns: the shared base or not, and which experts (None: all).

    Raises:
        UnknownNameError: an expert has no such name.
    """
    roster = roster_of(model)
    for name in experts or ():
        _known(roster, name)
    model.requires_grad_(requires_grad=base)
    for _, layer in expert_layers(model):
        for name, rank in layer.ranks.items():
            if rank:
                learns = experts is None or name in experts
                layer.lora_A[name].requires_grad_(requires_grad=learns)
                layer.lora_B[name].requires_grad_(requires_grad=learns)


def _known(roster: Roster, name: str) -> None:
    if name not in roster:
        raise UnknownNameError("expert", name, roster)


def merge(model: nn.Module, expert: str | None, *, mixture: Mapping[str, float] | Tensor | None = None) -> nn.Module:
    """A plain copy of the network for one expert. The network itself is not touched: its weights stay bit-equal.

    Routed and merged outputs agree within 1e-5 of the output's scale in float32, 2e-2 in bfloat16 (where the merged kernel is rounded).

    Args:
        model: a network with experts; wrappers such as DistributedDataParallel are looked through.
        expert: its name; None for the shared base alone, or when `mixture` is given.
        mixture: weights of a sum of experts: expert -> weight, or a tensor (e,).

    Returns:
        A network of the classes that were there before the installation.

    Raises:
        UnknownNameError: no such expert.
        InputError: a mixture beside an expert, of a wrong length, or where norms hold statistics per expert.

    Examples:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> _ = install_experts(net, experts=["liver"], ranks=1)
        >>> merge(net, "liver")
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )

    Source: LoRKD (CVPR 2024), knowledge switch; ours in that the base is never edited.
    """
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else model
    weights = _merge_weights(roster_of(inner), expert, mixture)
    memo: dict[int, Any] = {}
    for name, module in inner.named_modules():
        if isinstance(module, ExpertLayer):
            memo[id(module)] = _plain_layer(module, weights, memo)
        elif isinstance(module, ExpertBatchNorm) and mixture is not None:
            raise InputError(name, "a mixture of experts", "one expert: statistics do not mix", "merge one expert")
        elif isinstance(module, FrozenBatchNorm | ExpertBatchNorm):
            memo[id(module)] = module.for_expert(expert)
    return copy.deepcopy(inner, memo)


def _merge_weights(roster: Roster, expert: str | None, mixture: Mapping[str, float] | Tensor | None) -> dict[str, float]:
    if expert is not None:
        _known(roster, expert)
        if mixture is not None:
            raise InputError("expert, mixture", "both", "one of them", "give expert=None with a mixture")
        return {expert: 1.0}
    if mixture is None:
        return {}
    if isinstance(mixture, Tensor):
        if tuple(mixture.shape) != (len(roster),):
            raise InputError("mixture", f"shape {tuple(mixture.shape)}", f"({len(roster)},)", "give one weight for each expert")
        return dict(zip(roster, mixture.tolist(), strict=True))
    for name in mixture:
        _known(roster, name)
    return dict(mixture)


def _plain_layer(layer: ExpertLayer, weights: Mapping[str, float], memo: dict[int, Any]) -> nn.Module:
    plain = copy.deepcopy(layer.base_layer, memo)
    weight = layer.merged_weight(weights)
    plain.weight = nn.Parameter(weight, requires_grad=layer.base_layer.weight.requires_grad)
    return plain.train(layer.training)


@torch.no_grad()
def remove_experts(model: nn.Module) -> None:
    """Put the base layers back in place: the network is the shared base again, and its weights were never another thing."""
    for _, layer in list(expert_layers(model)):
        _replace(model, layer, layer.base_layer)
    for module in list(model.modules()):
        if isinstance(module, FrozenBatchNorm | ExpertBatchNorm):
            _replace(model, module, module.for_expert(None))
