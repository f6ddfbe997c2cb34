"""Read the weights, measure stable ranks, decide ranks: `plan_ranks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from medlore.errors import InputError, MedloreError, TargetError
from medlore.linalg.spectra import Rounding
from medlore.ranks.measure import Granularity, Measured, Options, Progress, measure
from medlore.ranks.model_folders import meta_model
from medlore.ranks.places import Target, Tower
from medlore.ranks.plan import RankPlan, found_in, is_plan_file, plan_digest
from medlore.ranks.planned import PlannedLayer, digest, matrix_of
from medlore.ranks.rule_table import GivenRanks, LayerDemand, layer_rule
from medlore.ranks.rules import alpha_rule
from medlore.ranks.sources import ModuleSource, WeightSource, open_source


def plan_ranks(  # noqa: PLR0913 - every option is one decision that the plan records
    source: nn.Module | str | Path,
    *,
    targets: str = "attention",
    granularity: Granularity = "projection",
    rule: str = "stable-rank",
    ranks: GivenRanks | None = None,
    scale: float = 1.0,
    budget: str | float | None = None,
    alpha: str | float | None = None,
    include_k: bool = False,
    min_rank: int = 1,
    max_rank: int | None = None,
    rounding: Rounding = "half-even",
    proof: bool = False,
    seed: int = 0,
    check: bool = True,
    tower: Tower = "auto",
    ema: bool = False,
    progress: Progress | None = None,
) -> RankPlan:
    """Ranks for the low-rank updates of a model, from its weights alone: no data, no search.

    Args:
        source: a module; a `.safetensors`, `.bin`, `.pth`, `.pt` or JAX `.npz` file; a transformers folder or hub name;
            `medlore:vit-mini`.
        targets: `attention` (q, v and the output projection), `attention+mlp`, `all-linear`, `conv`, or a regular expression that
            matches whole module names.
        granularity: `projection` measures each of q, v and o; `fused` measures the stacked q, k, v matrix and gives its rank to
            q and to v, as the released code of the paper does.
        rule: `stable-rank`, `uniform:K`, or `given` (with `ranks`); the table is `medlore.ranks.rule_table.RULES`.
        ranks: ranks that are given: a nested list of pairs, a mapping of names, a file with either, `medlore:rank-lists/NAME`, or
            a plan file, whose targets and alphas are taken over too.
        scale: factor on the stable rank before rounding.
        budget: parameters that all factor pairs may have together: `250000`, `0.5M`, `2%` of the model, `uniform:8`; stable ranks
            are scaled by one factor to meet it and rounded by largest remainder.
        alpha: `rank` or `rank*C` (alpha = C · rank, so the scaling is C at every rank), `rslora*C` (scaling C / √rank), or a number
            C (scaling C / rank; the released code uses 1). None: `rank`, or what a given plan holds.
        include_k: adapt the key projection too.
        min_rank: smallest rank of a layer.
        max_rank: largest rank of a layer; never more than the smaller side of its matrix.
        rounding: how a stable rank becomes an integer; Python's half-to-even, as in the original.
        proof: certify by a proof in place of a failure probability below 1e-12.
        seed: of the random start vectors; the ranks do not depend on it.
        check: refuse a given plan that was computed for other weights.
        tower: which half of an image-text model counts: `vision`, `text`, `both`; `auto` takes the image half where there are two.
        ema: of a torch file that holds both, the moving average of the weights.
        progress: called as `progress(done, of, name)` after each matrix.

    Returns:
        A plan; every layer records how its integer was decided.

    Raises:
        InputError: wrong options, or a file that holds no weights.
        CheckpointError: a broken or unsafe file.
        TargetError: no target, or weights without a stable rank (zero, NaN); all of them are listed.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.diag(torch.tensor([4.0, 4.0, 1.0, 0.5])))
        >>> [(layer.name, layer.rank) for layer in plan_ranks(model, targets="all-linear").layers]
        [('0', 2)]

    Source: Zhang, Wang and Gu, "Beyond Low-Rank Tuning", ICCV 2025, for the rule; certificates, budgets and alpha rules are ours.
    """
    opened = open_source(source, averaged=ema)
    if isinstance(ranks, str | Path) and is_plan_file(ranks):
        given = RankPlan.load(ranks).for_source(opened, check=check)
        asked: dict[str, tuple[Any, Any, Any]] = {
            "targets": (targets, "attention", given.targets),
            "granularity": (granularity, "projection", given.granularity),
        }
        asked |= {"rule": (rule, "stable-rank", "given"), "scale": (scale, 1.0, given.scale), "budget": (budget, None, given.budget)}
        asked |= {"k": (include_k, False, given.include_k), "max_rank": (max_rank, None, given.max_rank), "min_rank": (min_rank, 1, 1)}
        _refuse_beside_a_plan(str(ranks), asked)
        return _with_module_names(_taken_over(given, opened, alpha), opened)
    alpha = "rank" if alpha is None else alpha
    text, chosen_rule, number = layer_rule(rule, given=ranks is not None, budget=budget is not None)
    options = Options(granularity, chosen_rule.measures, scale, alpha, min_rank, max_rank, rounding, proof, seed)
    try:
        found = found_in(opened, targets, include_k=include_k, tower=tower)
    except MedloreError as error:
        raise error.at(opened.label) from None
    measured = measure(opened, found, options, exact_values=budget is not None, progress=progress)
    results = [m.result for m in measured if m.result is not None]
    assert chosen_rule.layers is not None  # noqa: S101  # nosec B101 # layer_rule gives no other
    shared = chosen_rule.layers(LayerDemand(found.targets, results, number, ranks, budget, opened.parameters, min_rank, max_rank))
    plan = RankPlan(
        source=opened.label,
        layout=found.layout,
        targets=targets,
        granularity=granularity,
        rule=text,
        layers=tuple(_planned(*one, alpha) for one in zip(found.targets, measured, shared.ranks, shared.decided_by, strict=True)),
        sha256=plan_digest(m.sha256 for m in measured),
        include_k=include_k,
        rounding=rounding,
        scale=scale,
        budget=shared.budget,
        alpha_rule=str(alpha_rule(alpha)),
        min_rank=min_rank,
        max_rank=max_rank,
        proof=proof,
        seed=seed,
        model_parameters=opened.parameters,
        blocks=len(found.attentions),
        tower=tower,
        coverage=found.coverage,
    )
    return _with_module_names(plan, opened)


def uniform_plan(plan: RankPlan, rank: int | None = None) -> RankPlan:
    """The same targets at one rank: `rank`, or the whole number whose parameters come nearest to those of `plan`.

    The numbers of parameters are equal only as nearly as a whole rank allows; compare `parameters` of both plans and say so.
    A matrix whose smaller side is less than the rank keeps that side as its rank.
    """
    wanted = rank if rank is not None else max(1, round(plan.uniform_rank))
    if wanted < 1:
        raise InputError("rank", f"got {wanted}", "a whole number from 1", "give for example 8")
    return plan.with_ranks([min(wanted, *layer.shape) for layer in plan.layers], rule=f"uniform:{wanted}", decided_by="uniform")


def _taken_over(given: RankPlan, source: WeightSource, alpha: str | float | None) -> RankPlan:
    """A plan that was read from a file, for these weights."""
    digests = [digest(matrix_of(layer, source.read(layer.key))) for layer in given.layers]
    layers = tuple(replace(layer, sha256=d, decided_by="given") for layer, d in zip(given.layers, digests, strict=True))
    plan = replace(given, layers=layers, source=source.label, sha256=plan_digest(digests), model_parameters=source.parameters)
    if alpha is None:
        return replace(plan, rule="given")
    plan = replace(plan, alpha_rule=str(alpha_rule(alpha)))
    return plan.with_ranks([layer.rank for layer in layers], rule="given", decided_by="given")


def _planned(target: Target, measured: Measured, rank: int, decided_by: str, alpha: str | float) -> PlannedLayer:
    result = measured.result
    tensor: Any = target.tensor
    return PlannedLayer(
        name=target.name,
        part=target.part,
        shape=target.shape,
        rank=rank,
        alpha=alpha_rule(alpha).alpha(rank),
        rows=target.rows,
        tensor=tensor,
        group=target.group,
        block=target.block,
        period=target.period,
        experts=target.experts,
        measured_shape=measured.shape,
        stable_rank=None if result is None else result.value,
        lower=None if result is None else result.lower,
        upper=None if result is None else result.upper,
        decided_by=decided_by,
        sha256=measured.sha256,
    )


def _refuse_beside_a_plan(plan: str, asked: Mapping[str, tuple[Any, Any, Any]]) -> None:
    """What a plan has decided is not asked for again: name -> what came, the default, the plan's own."""
    clashing = {name: came for name, (came, default, own) in asked.items() if came not in (default, own)}
    if clashing:
        flags = ", ".join("--" + name.replace("_", "-") for name in clashing)
        came = f"{', '.join(map(str, clashing.values()))} beside the plan {plan}, which has decided it"
        raise InputError(flags, came, "alpha alone: targets and ranks are the plan's", "leave it out, or make a plan without --ranks")


def _with_module_names(plan: RankPlan, source: WeightSource) -> RankPlan:
    """Names of the modules of the installed transformers, for a transformers folder: files keep the names of older versions."""
    if isinstance(source, ModuleSource) or source.folder is None:
        return plan
    model = meta_model(source.folder)
    if model is None:
        return plan
    try:
        return plan.for_model(model, check=False)
    except TargetError:
        return plan
