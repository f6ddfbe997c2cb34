"""Read the weights, measure stable ranks, decide ranks: `plan_ranks`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medlore.errors import CheckpointError, InputError, MedloreError, TargetError
from medlore.linalg.spectra import Rounding, StableRank, stable_rank
from medlore.ranks.plan import Granularity, RankPlan, is_plan_file, plan_digest
from medlore.ranks.planned import PlannedLayer, digest, matrix_of
from medlore.ranks.rules import alpha_rule, given_ranks, rank_bounds, read_budget, share_budget
from medlore.ranks.sources import ModuleSource, WeightSource, open_source
from medlore.ranks.targets import Attention, Found, Target, find_targets

Progress = Callable[[int, int, str], None]

_BUDGET_TOLERANCE = 1e-6


def plan_ranks(  # noqa: PLR0913 - every option is one decision that the plan records
    source: nn.Module | str | Path,
    *,
    targets: str = "attention",
    granularity: Granularity = "projection",
    rule: str = "stable-rank",
    ranks: str | Path | Sequence[Any] | Mapping[str, int] | None = None,
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
        rule: `stable-rank`, `uniform:K`, or `given` (with `ranks`).
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
        progress: called as `progress(done, of, name)` after each matrix.

    Returns:
        A plan; every layer tells how its integer was decided.

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
    opened = open_source(source)
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
    options = _Options(granularity, _checked_rule(rule, ranks, budget), scale, alpha, include_k, min_rank, max_rank, rounding, proof, seed)
    try:
        found = find_targets(opened.shapes, targets, include_k=include_k, kinds=opened.kinds)
    except MedloreError as error:
        raise error.at(opened.label) from None
    measured = _measure(opened, found, options, exact_values=budget is not None, progress=progress)
    chosen, decided, budget_text = _choose(found.targets, measured, options, ranks=ranks, budget=budget, parameters=opened.parameters)
    plan = RankPlan(
        source=opened.label,
        layout=found.layout,
        targets=targets,
        granularity=granularity,
        rule=options.rule,
        layers=tuple(_planned(t, m, r, d, options.alpha) for t, m, r, d in zip(found.targets, measured, chosen, decided, strict=True)),
        sha256=plan_digest(m.sha256 for m in measured),
        include_k=include_k,
        rounding=rounding,
        scale=scale,
        budget=budget_text,
        alpha_rule=str(alpha_rule(alpha)),
        min_rank=min_rank,
        max_rank=max_rank,
        proof=proof,
        seed=seed,
        model_parameters=opened.parameters,
        blocks=len(found.attentions),
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


@dataclass(frozen=True)
class _Options:
    granularity: Granularity
    rule: str
    scale: float
    alpha: str | float
    include_k: bool
    min_rank: int
    max_rank: int | None
    rounding: Rounding
    proof: bool
    seed: int

    def __post_init__(self) -> None:
        if self.granularity not in ("projection", "fused"):
            raise InputError("--granularity", f"{self.granularity!r}", "projection or fused", "take projection, as in the paper")
        if self.min_rank < 1 or (self.max_rank is not None and self.max_rank < self.min_rank):
            raise InputError(
                "--min-rank and --max-rank", f"{self.min_rank} and {self.max_rank}", "1 <= minimum <= maximum", "correct the bounds"
            )
        alpha_rule(self.alpha)

    @property
    def uniform(self) -> int | None:
        return int(self.rule.partition(":")[2]) if self.rule.startswith("uniform:") else None

    def measures(self) -> bool:
        return self.rule == "stable-rank"


@dataclass(frozen=True)
class _Measured:
    sha256: str | None
    shape: tuple[int, int] | None = None
    result: StableRank | None = None


def _checked_rule(rule: str, ranks: object, budget: object) -> str:
    if ranks is not None and rule == "stable-rank":
        rule = "given"
    accepted = "stable-rank, uniform:K with K from 1, or given"
    kind, _, number = rule.partition(":")
    if not (rule in ("stable-rank", "given") or (kind == "uniform" and number.isdigit() and int(number) >= 1)):
        raise InputError("--rule", f"{rule!r}", accepted, "take stable-rank, or for example uniform:8")
    if (rule == "given") != (ranks is not None):
        raise InputError("--rule", f"{rule!r} {'without' if ranks is None else 'with'} --ranks", accepted, "give --ranks with --rule given")
    if budget is not None and rule != "stable-rank":
        raise InputError("--budget", f"with --rule {rule}", "a budget for --rule stable-rank", "leave one of the two out")
    return rule


class _Reader:
    """Matrices of targets; the tensor read last is kept, so a fused matrix is read once for all of its parts."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source
        self._key = ""
        self._tensor: Tensor | None = None

    def matrix(self, target: Target) -> Tensor:
        if self._key != target.key or self._tensor is None:
            self._key, self._tensor = target.key, self.source.read(target.key)
        return matrix_of(target, self._tensor)

    def stacked(self, attention: Attention) -> Tensor:
        return torch.cat([self.matrix(attention.parts[part]) for part in ("q", "k", "v") if part in attention.parts])


def _taken_over(given: RankPlan, source: WeightSource, alpha: str | float | None) -> RankPlan:
    """A plan that was read from a file, for these weights."""
    digests = [digest(matrix_of(layer, source.read(layer.key))) for layer in given.layers]
    layers = tuple(replace(layer, sha256=d, decided_by="given") for layer, d in zip(given.layers, digests, strict=True))
    plan = replace(given, layers=layers, source=source.label, sha256=plan_digest(digests), model_parameters=source.parameters)
    if alpha is None:
        return replace(plan, rule="given")
    plan = replace(plan, alpha_rule=str(alpha_rule(alpha)))
    return plan.with_ranks([layer.rank for layer in layers], rule="given", decided_by="given")


def _measure(source: WeightSource, found: Found, options: _Options, *, exact_values: bool, progress: Progress | None) -> list[_Measured]:
    """Hash and, where the rule needs it, stable rank of every target; all unusable weights are reported at once."""
    reader = _Reader(source)
    attentions = {a.path: a for a in found.attentions}
    fused: dict[str, _Measured] = {}
    measured: list[_Measured] = []
    faults: list[str] = []
    for number, target in enumerate(found.targets, start=1):
        try:
            matrix = reader.matrix(target)
            if matrix.is_meta and options.measures():
                raise CheckpointError(source.label, "weights without values (meta device)", "loaded weights", "load the model first")
            if not options.measures():
                measured.append(_Measured(_checked_digest(matrix, target)))
            elif options.granularity == "fused" and target.part in ("q", "k", "v"):
                if target.group not in fused:
                    fused[target.group] = _stable(reader.stacked(attentions[target.group]), target, options, exact_values=exact_values)
                measured.append(replace(fused[target.group], sha256=digest(reader.matrix(target))))
            else:
                measured.append(_stable(matrix, target, options, exact_values=exact_values))
        except TargetError as error:
            faults.append(f"{target.key} ({target.part}): {error.came}")
        if progress is not None:
            progress(number, len(found.targets), target.name)
    if faults:
        raise TargetError(
            source.label,
            f"{len(faults)} weights cannot be used",
            "finite weights that are not all zero",
            "load another checkpoint",
            faults=faults,
        )
    return measured


def _stable(matrix: Tensor, target: Target, options: _Options, *, exact_values: bool) -> _Measured:
    result = stable_rank(
        matrix,
        proof=options.proof,
        rounding=options.rounding,
        scale=options.scale,
        seed=options.seed,
        tolerance=_BUDGET_TOLERANCE if exact_values else None,
    )
    return _Measured(digest(matrix), (matrix.shape[0], matrix.shape[1]), result)


def _checked_digest(matrix: Tensor, target: Target) -> str | None:
    if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
        raise TargetError(target.key, "NaN or infinity in it", "finite numbers", "load another checkpoint")
    return digest(matrix)


def _choose(
    targets: Sequence[Target],
    measured: Sequence[_Measured],
    options: _Options,
    *,
    ranks: str | Path | Sequence[Any] | Mapping[str, int] | None,
    budget: str | float | None,
    parameters: int,
) -> tuple[list[int], list[str], str | None]:
    """Ranks, how each was decided, and the budget as it was asked for."""
    if ranks is not None:
        return given_ranks(ranks, targets), ["given"] * len(targets), None
    if options.uniform is not None:
        return [min(options.uniform, *t.shape) for t in targets], ["uniform"] * len(targets), None
    results = [m.result for m in measured if m.result is not None]
    if budget is not None:
        wanted = read_budget(budget, targets, model_parameters=parameters)
        values = [r.value for r in results]
        shared = share_budget(values, targets, wanted, min_rank=options.min_rank, max_rank=options.max_rank)
        return shared, ["budget"] * len(targets), wanted.text
    chosen = []
    for target, result in zip(targets, results, strict=True):
        low, high = rank_bounds(target, options.min_rank, options.max_rank)
        chosen.append(min(max(result.rank, low), high))
    return chosen, [r.decided_by for r in results], None


def _planned(target: Target, measured: _Measured, rank: int, decided_by: str, alpha: str | float) -> PlannedLayer:
    result = measured.result
    tensor: Literal["weight", "in_proj_weight"] = "in_proj_weight" if target.tensor == "in_proj_weight" else "weight"
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
    model = _meta_model(source.folder)
    if model is None:
        return plan
    try:
        return plan.for_model(model, check=False)
    except TargetError:
        return plan


def _meta_model(folder: Path) -> nn.Module | None:
    """The model of a transformers folder without values, or None for a kind that transformers does not know."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
        return None
    return model if isinstance(model, nn.Module) else None
