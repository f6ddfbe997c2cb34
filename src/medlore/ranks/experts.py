"""How much rank each expert gets in each layer, and an expert's ranks as a plan that one can read, edit and give again.

An expert's rank in a layer is a share of the expert times a share of the layer. The rules (`medlore.ranks.rules.RULES`) differ in
these shares; what stays equal between rules is the mean rank of a layer, or the number of parameters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic_core import PydanticCustomError
from torch import Tensor

from medlore.errors import InputError, TargetError
from medlore.files import existing_file, made_folder, sha256_of
from medlore.linalg.spectra import stable_rank
from medlore.ranks.plan import RankPlan, plan_digest
from medlore.ranks.planned import PlannedLayer

Ranks = dict[tuple[str, str], int]
Given = int | Path


def _rank_or_plan(value: Any) -> Given:
    if isinstance(value, str | Path) and Path(value).suffix == ".json":
        return Path(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("int_type", "Input should be a valid integer, or the file of a plan (.json)")
    if value < 1:
        raise PydanticCustomError("greater_than_equal", "Input should be greater than or equal to 1")
    return value


GivenRank = Annotated[Any, pydantic.BeforeValidator(_rank_or_plan)]
"""A rank from 1, or the file of a plan, as a field of settings."""


@dataclass(frozen=True)
class ExpertDemand:
    """What is to be shared out.

    Attributes:
        shapes: layer -> shape of its weight, in depth order.
        sizes: expert -> what counts of it (training images, labels).
        rank: the uniform rank, or the mean.
        units: layer -> its rank in units of `rank`; empty for 1 everywhere.
        given: expert -> rank, or the file of a plan with a rank for each layer.
        profile: layer -> what the rule `stable-rank` goes by; None where no teacher is there to be read.
        keep: what stays as under the uniform rule: the `mean` of a layer's ranks (no rank is then above that of its matrix), or the
            number of `parameters`.
    """

    shapes: Mapping[str, Sequence[int]]
    sizes: Mapping[str, float]
    rank: int
    units: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, Given] = field(default_factory=dict)
    profile: Mapping[str, float] | None = None
    keep: Literal["mean", "parameters"] = "mean"

    def unit(self, layer: str) -> int:
        """Units of a layer."""
        return self.units.get(layer, 1)

    def fitted(self, layer: str, wanted: float) -> int:
        """A whole rank from 1; never above that of the matrix where means are kept."""
        return int(np.clip(round(wanted), 1, _full_rank(self.shapes[layer]))) if self.keep == "mean" else max(1, round(wanted))


def uniform_experts(demand: ExpertDemand) -> Ranks:
    """One rank, times the units of a layer."""
    return {(t, e): demand.fitted(t, demand.rank * demand.unit(t)) for t in demand.shapes for e in demand.sizes}


def given_experts(demand: ExpertDemand) -> Ranks:
    """A rank for each expert, times the units of a layer; or each layer's own, out of a plan."""
    if set(demand.given) != set(demand.sizes):
        came, accepted = str(sorted(demand.given)), f"a rank, or a plan, for each of {sorted(demand.sizes)}"
        raise InputError("ranks that are given", came, accepted, "correct the study")
    by_layer = {e: _by_layer(value, demand) for e, value in demand.given.items()}
    return {(t, e): demand.fitted(t, by_layer[e][t]) for t in demand.shapes for e in demand.sizes}


def experts_by_size(demand: ExpertDemand) -> Ranks:
    """In proportion to the square root of an expert's size, the mean being `rank`.

    Source: ours.
    """
    roots = {name: size**0.5 for name, size in demand.sizes.items()}
    mean = sum(roots.values()) / len(roots)
    shares = {name: demand.rank * root / mean for name, root in roots.items()}
    return {(t, e): demand.fitted(t, shares[e] * demand.unit(t)) for t in demand.shapes for e in demand.sizes}


def experts_by_spectrum(demand: ExpertDemand) -> Ranks:
    """In proportion to the profile of the layers; at equal parameters also to the root of an expert's size.

    Source: ours.
    """
    if demand.profile is None:
        raise InputError("rule of ranks", "stable-rank without a teacher", "a teacher whose weights are read", "name one")
    if demand.keep == "mean":
        return {(t, e): demand.fitted(t, float(demand.rank) * demand.profile[t]) for t in demand.shapes for e in demand.sizes}
    wanted = {(t, e): demand.profile[t] * demand.sizes[e] ** 0.5 for t in demand.shapes for e in demand.sizes}
    return scaled_to_parameters(wanted, demand.shapes, _parameters(uniform_experts(demand), demand.shapes))


def scaled_to_parameters(wanted: Mapping[tuple[str, str], float], shapes: Mapping[str, Sequence[int]], parameters: int) -> Ranks:
    """Whole ranks in proportion to what is wanted, from 1 to the full rank; their parameters come near a number from below."""
    full = {target: _full_rank(shape) for target, shape in shapes.items()}

    def at(factor: float) -> Ranks:
        return {(t, e): min(max(round(factor * value), 1), full[t]) for (t, e), value in wanted.items()}

    low, high = 0.0, 1.0
    while _parameters(at(high), shapes) < parameters and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _parameters(at(middle), shapes) <= parameters else (low, middle)
    return at(low)


def stable_rank_of(weight: Tensor) -> float:
    """‖W‖_F² / ‖W‖₂² of a weight as a matrix out x (in · k^d)."""
    return float(stable_rank(weight.detach().float().flatten(1)).value)


def fullness_by_depth(weights: Sequence[Tensor], layers: Sequence[str]) -> dict[str, float]:
    """A factor for each layer with mean 1: how full the spectra of other weights are at the same relative depth."""
    fullness = [stable_rank(m).value / min(m.shape) for m in (w.detach().flatten(1) for w in weights)]
    values = np.interp(np.linspace(0, 1, len(layers)), np.linspace(0, 1, len(fullness)), fullness)
    values *= len(values) / values.sum()
    return dict(zip(layers, values.tolist(), strict=True))


def expert_plan(expert: str, ranks: Ranks, shapes: Mapping[str, Sequence[int]], *, rule: str, alpha: str | float, source: str) -> RankPlan:
    """One expert's ranks as a plan.

    Args:
        expert: its name.
        ranks: of all experts.
        shapes: layer -> shape of its weight.
        rule: that made them.
        alpha: `rank*C` for a scaling of C whatever the rank, or a number C for C / rank.
        source: the network that the expert is installed in.
    """
    from medlore.ranks.rules import alpha_rule

    own = {layer: rank for (layer, name), rank in ranks.items() if name == expert and rank > 0}
    layers = tuple(
        PlannedLayer(
            name=layer,
            part="linear" if len(shapes[layer]) == 2 else "conv",
            shape=(shapes[layer][0], math.prod(shapes[layer][1:])),
            rank=rank,
            alpha=alpha_rule(alpha).alpha(rank),
            decided_by=rule,
        )
        for layer, rank in own.items()
    )
    return RankPlan(
        source=f"{source}, expert {expert}",
        layout="plain",
        targets="conv",
        granularity="projection",
        rule=rule,
        layers=layers,
        sha256=plan_digest([None]),
        alpha_rule=str(alpha_rule(alpha)),
    )


def write_expert_plans(
    folder: str | Path, ranks: Ranks, shapes: Mapping[str, Sequence[int]], *, rule: str, alpha: str | float, source: str
) -> list[Path]:
    """One plan file for each expert, `NAME.json`; each can be given again as the ranks of that expert."""
    made_folder(folder)
    experts = list(dict.fromkeys(expert for _, expert in ranks))
    plans = {e: expert_plan(e, ranks, shapes, rule=rule, alpha=alpha, source=source) for e in experts}
    return [plan.save(Path(folder) / f"{expert}.json") for expert, plan in plans.items() if plan.layers]


def given_digest(given: Mapping[str, Given], folder: Path) -> str:
    """A hash of the plans among the ranks that are given; empty where there is none. It belongs to what decides a network."""
    files = {expert: sha256_of(existing_file(folder / value)) for expert, value in given.items() if isinstance(value, Path)}
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest() if files else ""


def _by_layer(given: Given, demand: ExpertDemand) -> dict[str, float]:
    if isinstance(given, int):
        return {layer: given * demand.unit(layer) for layer in demand.shapes}
    plan = RankPlan.load(given)
    ranks = {layer.name: float(layer.rank) for layer in plan.layers}
    faults = [f"{name}: no rank in the plan" for name in demand.shapes if name not in ranks]
    faults += [f"{name}: not a layer of this network" for name in ranks if name not in demand.shapes]
    if faults:
        came = f"{len(faults)} layers do not fit"
        raise TargetError(str(given), came, "the plan of an expert in this network", "give its own plan, or a rank", faults=faults)
    return ranks


def _full_rank(shape: Sequence[int]) -> int:
    return min(shape[0], math.prod(shape[1:]))


def _parameters(ranks: Ranks, shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(rank * (shapes[target][0] + math.prod(shapes[target][1:])) for (target, _), rank in ranks.items())
