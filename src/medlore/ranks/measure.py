"""Stable ranks and hashes of the targets of a source, one matrix in memory at a time; all unusable weights are reported at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medlore.errors import CheckpointError, InputError, TargetError
from medlore.linalg.spectra import Decision, Rounding, StableRank, rounded_rank, stable_rank
from medlore.ranks.places import Attention, Found, Target
from medlore.ranks.planned import digest, matrix_of
from medlore.ranks.rules import alpha_rule
from medlore.ranks.sources import WeightSource

Progress = Callable[[int, int, str], None]
Granularity = Literal["projection", "fused"]

_BUDGET_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Options:
    """What was asked of a plan, checked."""

    granularity: Granularity
    measures: bool
    scale: float
    alpha: str | float
    min_rank: int
    max_rank: int | None
    rounding: Rounding
    proof: bool
    seed: int

    def __post_init__(self) -> None:
        if self.granularity not in ("projection", "fused"):
            raise InputError("--granularity", f"{self.granularity!r}", "projection or fused", "use projection, as in the paper")
        if self.min_rank < 1 or (self.max_rank is not None and self.max_rank < self.min_rank):
            raise InputError(
                "--min-rank and --max-rank", f"{self.min_rank} and {self.max_rank}", "1 <= minimum <= maximum", "correct the bounds"
            )
        alpha_rule(self.alpha)


@dataclass(frozen=True)
class Measured:
    """Hash of one matrix, and its stable rank where the rule needs one."""

    sha256: str | None
    shape: tuple[int, int] | None = None
    result: StableRank | None = None


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
        parts = [self.matrix(attention.parts[part]) for part in ("q", "k", "v") if part in attention.parts]
        if len({part.shape[1] for part in parts}) > 1:
            raise TargetError(attention.path, "q, k and v read tokens of other widths and cannot be stacked", "", "")
        return torch.cat(parts)


def measure(source: WeightSource, found: Found, options: Options, *, exact_values: bool, progress: Progress | None) -> list[Measured]:
    """Hash and, where the rule needs it, stable rank of every target; all unusable weights are reported at once."""
    reader = _Reader(source)
    attentions = {a.path: a for a in found.attentions}
    fused: dict[str, Measured] = {}
    measured: list[Measured] = []
    faults: list[str] = []
    for number, target in enumerate(found.targets, start=1):
        try:
            matrix = reader.matrix(target)
            if matrix.is_meta and options.measures:
                raise CheckpointError(source.label, "weights without values (meta device)", "loaded weights", "load the model first")
            if not options.measures:
                measured.append(Measured(_checked_digest(matrix, target)))
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


def _stable(matrix: Tensor, target: Target, options: Options, *, exact_values: bool) -> Measured:
    tolerance = _BUDGET_TOLERANCE if exact_values else None
    if target.experts > 1:
        return Measured(digest(matrix), target.shape, _of_experts(matrix, options))
    result = stable_rank(
        matrix, proof=options.proof, rounding=options.rounding, scale=options.scale, seed=options.seed, tolerance=tolerance
    )
    return Measured(digest(matrix), (matrix.shape[0], matrix.shape[1]), result)


def _of_experts(stack: Tensor, options: Options) -> StableRank:
    """The mean over stacked experts, since PEFT gives all of them one rank: the parameters are those of a rank each.

    Where the bounds of the mean leave two integers open, every stable rank is taken from a float64 SVD.
    """
    results = [
        stable_rank(m, proof=options.proof, rounding=options.rounding, scale=options.scale, seed=options.seed, tolerance=_BUDGET_TOLERANCE)
        for m in stack
    ]
    value, lower, upper = (float(np.mean([getattr(r, name) for r in results])) for name in ("value", "lower", "upper"))
    decided: Decision = next((r.decided_by for r in results if r.decided_by != "exact"), "exact")
    if _rounded(lower, options, stack) != _rounded(upper, options, stack):
        squares = [np.linalg.svd(m.double().numpy(), compute_uv=False) ** 2 for m in stack]
        value = lower = upper = float(np.mean([s.sum() / s[0] for s in squares]))
        decided = "exact"
    chance = sum(r.failure_probability for r in results) if decided != "exact" else 0.0
    return StableRank(value, lower, upper, _rounded(value, options, stack), decided, max(r.steps for r in results), chance)


def _rounded(value: float, options: Options, stack: Tensor) -> int:
    return rounded_rank(value, most=min(stack.shape[1:]), rounding=options.rounding, scale=options.scale)


def _checked_digest(matrix: Tensor, target: Target) -> str | None:
    if not matrix.is_meta and not bool(torch.isfinite(matrix).all()):
        raise TargetError(target.key, "NaN or infinity in it", "finite numbers", "load another checkpoint")
    return digest(matrix)
