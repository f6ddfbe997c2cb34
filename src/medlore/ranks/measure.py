"""Stable ranks and hashes of the targets of a source, one matrix a core in memory at a time; all unusable weights are reported at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from medlore.errors import CheckpointError, InputError, TargetError
from medlore.linalg.spectra import Decision, Rounding, StableRank, rounded_rank, stable_rank
from medlore.linalg.threads import one_thread
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
    """Hash and, where the rule needs it, stable rank of every target, a matrix on each core; all unusable weights are reported at once."""
    cores = os.cpu_count() or 1
    waiting: deque[tuple[Target, Future[Measured]]] = deque()
    measured: list[Measured] = []
    faults: list[str] = []

    def collect() -> None:
        target, job = waiting.popleft()
        try:
            measured.append(job.result())
        except TargetError as error:
            faults.append(f"{target.key} ({target.part}): {error.came}")
        if progress is not None:
            progress(len(measured) + len(faults), len(found.targets), target.name)

    with one_thread(), ThreadPoolExecutor(cores) as pool:
        jobs = _Jobs(pool, source, found, options, exact_values=exact_values)
        for target in found.targets:
            waiting.append((target, jobs.begin(target)))
            while len(waiting) > cores:  # no more matrices are held than are worked on
                collect()
        while waiting:
            collect()
    if faults:
        raise TargetError(
            source.label,
            f"{len(faults)} weights cannot be used",
            "finite weights that are not all zero",
            "load another checkpoint",
            faults=faults,
        )
    return measured


class _Jobs:
    """Begins the measurement of one target after the other; files are read here, arithmetic is the pool's."""

    def __init__(self, pool: Executor, source: WeightSource, found: Found, options: Options, *, exact_values: bool) -> None:
        self._pool, self._options, self._exact = pool, options, exact_values
        self._reader = _Reader(source)
        self._attentions = {a.path: a for a in found.attentions}
        self._fused: dict[str, Future[Measured]] = {}

    def begin(self, target: Target) -> Future[Measured]:
        """The result to come; a weight that cannot be used is its exception."""
        try:
            return self._begun(target, self._reader.matrix(target))
        except TargetError as error:
            refused: Future[Measured] = Future()
            refused.set_exception(error)
            return refused

    def _begun(self, target: Target, matrix: Tensor) -> Future[Measured]:
        options = self._options
        if matrix.is_meta and options.measures:
            label = self._reader.source.label
            raise CheckpointError(label, "weights without values (meta device)", "loaded weights", "load the model first")
        if not options.measures:
            return self._pool.submit(lambda: Measured(_checked_digest(matrix, target)))
        if options.granularity != "fused" or target.part not in ("q", "k", "v"):
            return self._pool.submit(_stable, matrix, target, options, exact_values=self._exact)
        if target.group not in self._fused:
            stack = self._reader.stacked(self._attentions[target.group])
            self._fused[target.group] = self._pool.submit(_stable, stack, target, options, exact_values=self._exact)
        whole = self._fused[target.group]  # begun before: waiting for it cannot block the pool
        return self._pool.submit(lambda: replace(whole.result(), sha256=digest(matrix)))


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
