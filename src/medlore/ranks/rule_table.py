"""Every rule by which rank is shared out, in one table: over the layers of a network, over the experts of a decomposition, or both.

A new rule is one entry of `RULES`; `medlore ranks --rule NAME`, `rule: NAME` and the variants `experts-NAME` of a decomposition, and the
`rule` of a tuning method know it from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medlore.errors import InputError
from medlore.linalg.spectra import StableRank
from medlore.ranks.experts import (
    ExpertDemand,
    Ranks,
    experts_by_size,
    experts_by_spectrum,
    given_experts,
    uniform_experts,
)
from medlore.ranks.places import Target
from medlore.ranks.rules import given_ranks, rank_bounds, read_budget, share_budget

GivenRanks = str | Path | Sequence[Any] | Mapping[str, int]


@dataclass(frozen=True)
class LayerDemand:
    """What is to be shared out over layers.

    Attributes:
        targets: the matrices.
        results: their stable ranks, where the rule reads them; else empty.
        number: the K of `NAME:K`; None without.
        ranks: what was given with `--ranks`.
        budget: parameters for all factor pairs; None for none.
        parameters: of the model.
        min_rank, max_rank: bounds of every rank.
    """

    targets: Sequence[Target]
    results: Sequence[StableRank]
    number: int | None
    ranks: GivenRanks | None
    budget: str | float | None
    parameters: int
    min_rank: int
    max_rank: int | None


@dataclass(frozen=True)
class LayerRanks:
    """Ranks, how each was decided, and the budget as it was asked for."""

    ranks: list[int]
    decided_by: list[str]
    budget: str | None = None


@dataclass(frozen=True)
class Rule:
    """One way of sharing rank out.

    Attributes:
        caption: one line for help texts.
        layers: over the layers of a network (`medlore ranks`, `finetune`); None where it has no meaning there.
        experts: over the experts of a decomposition; None likewise.
        measures: whether it reads the stable rank of every layer; only then is there a budget.
        numbered: whether its name is followed by `:K`.
    """

    caption: str
    layers: Callable[[LayerDemand], LayerRanks] | None = None
    experts: Callable[[ExpertDemand], Ranks] | None = None
    measures: bool = False
    numbered: bool = False


def expert_ranks(rule: str, demand: ExpertDemand) -> Ranks:
    """(layer, expert) -> rank, from 1.

    Raises:
        InputError: no such rule for experts, or one that lacks what it goes by.
    """
    found = RULES.get(rule)
    if found is None or found.experts is None:
        raise InputError("rule of ranks", f"{rule!r}", _accepted("experts"), "use uniform")
    return found.experts(demand)


def layer_rule(text: str, *, given: bool, budget: bool) -> tuple[str, Rule, int | None]:
    """Read `stable-rank`, `uniform:8`, `given`: (the text, its rule, its number).

    Args:
        text: as asked for; ranks that are given make `given` of the default.
        given: whether ranks were given.
        budget: whether there is a budget.

    Raises:
        InputError: no such rule, or one that does not go with the rest.
    """
    text = "given" if given and text == "stable-rank" else text
    name, colon, number = text.partition(":")
    rule, accepted = RULES.get(name), _accepted("layers")
    wrong_number = rule is not None and (not (number.isdigit() and int(number) >= 1) if rule.numbered else bool(colon))
    if rule is None or rule.layers is None or wrong_number:
        raise InputError("--rule", f"{text!r}", accepted, "use stable-rank, or for example uniform:8")
    if (name == "given") != given:
        raise InputError("--rule", f"{text!r} {'with' if given else 'without'} --ranks", accepted, "give --ranks with --rule given")
    if budget and not rule.measures:
        raise InputError("--budget", f"with --rule {text}", "a budget for --rule stable-rank", "leave one of the two out")
    return text, rule, int(number) if rule.numbered else None


def _accepted(use: str) -> str:
    names = [f"{n}:K with K from 1" if r.numbered and use == "layers" else n for n, r in RULES.items() if getattr(r, use) is not None]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _uniform_layers(demand: LayerDemand) -> LayerRanks:
    number = demand.number or 1
    return LayerRanks([min(number, *t.shape) for t in demand.targets], ["uniform"] * len(demand.targets))


def _given_layers(demand: LayerDemand) -> LayerRanks:
    return LayerRanks(given_ranks(demand.ranks or [], demand.targets), ["given"] * len(demand.targets))


def _stable_layers(demand: LayerDemand) -> LayerRanks:
    """The stable rank of each matrix, rounded; with a budget, in proportion to it."""
    if demand.budget is not None:
        wanted = read_budget(demand.budget, demand.targets, model_parameters=demand.parameters)
        values = [r.value for r in demand.results]
        shared = share_budget(values, demand.targets, wanted, min_rank=demand.min_rank, max_rank=demand.max_rank)
        return LayerRanks(shared, ["budget"] * len(shared), wanted.text)
    bounds = [rank_bounds(t, demand.min_rank, demand.max_rank) for t in demand.targets]
    chosen = [min(max(r.rank, low), high) for r, (low, high) in zip(demand.results, bounds, strict=True)]
    return LayerRanks(chosen, [r.decided_by for r in demand.results])


RULES: dict[str, Rule] = {
    "stable-rank": Rule("the stable rank of each weight", _stable_layers, experts_by_spectrum, measures=True),
    "uniform": Rule("one rank for all", _uniform_layers, uniform_experts, numbered=True),
    "given": Rule("ranks from a list or a plan", _given_layers, given_experts),
    "task-size": Rule("in proportion to the root of an expert's size", None, experts_by_size),
}
