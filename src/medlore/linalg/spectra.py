"""Stable rank with a certified integer, spectral norm with two-sided bounds, effective rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.linalg.cholesky import GramMatrix, exact_enclosure, svd_enclosure
from medlore.linalg.lanczos import BlockKrylov, Enclosure, leading_space_bound
from medlore.linalg.passes import frobenius_norm, gamma
from medlore.linalg.threads import one_thread

Rounding = Literal["half-even", "half-up", "floor", "ceil"]
Decision = Literal["lanczos", "cholesky", "trace", "proof", "exact"]
Array = NDArray[np.floating]

# rounding -> the function, and how far below and above an integer its inputs lie
_ROUND: dict[str, tuple[Callable[[float], int], float, float]] = {
    "half-even": (round, 0.5, 0.5),
    "half-up": (lambda x: math.floor(x + 0.5), 0.5, 0.5),
    "floor": (math.floor, 0.0, 1.0),
    "ceil": (math.ceil, 1.0, 0.0),
}
_SMALL = 160  # below this side a float64 Gram matrix costs less than the loop around Lanczos
_SMALL_GRAM = 400  # up to this side a Gram matrix stays in the cache, and all but fast decays are its own
_FEW_BESIDE_A_SMALL_GRAM = 4.5
_MOST_BLOCK_STEPS = 7
_WIDE = 1.005  # an edge farther above σ₁² than this leaves room for a residual that few probes bound
_ONE_VECTOR = 2.6  # up to this rough stable rank one singular value may hold enough of ‖W‖_F² for a proof
_FEW_VECTORS = 8.0  # and up to this one a few may


@dataclass(frozen=True)
class StableRank:
    """The stable rank of one matrix, ‖W‖_F² / σ₁², and the integer that was made of it.

    Attributes:
        value: best estimate of the stable rank, from 1 to min(m, n).
        lower: certified lower bound of the stable rank.
        upper: certified upper bound of the stable rank.
        rank: scale times the stable rank, rounded, then clipped to 1 .. min(m, n).
        decided_by: what made the integer sure: `lanczos` (block Lanczos, two-sided bounds), `cholesky` (flat spectra: a float32 Cholesky
            factorisation whose error was probed), `trace` (no probability: a leading space holds nearly all of ‖W‖_F²), `proof` (no
            probability: a float64 Cholesky factorisation, where a proof was asked for), `exact` (all in float64, because the value
            lies on a rounding edge or the matrix is small).
        steps: (block) Lanczos steps taken; 0 where none were needed.
        failure_probability: upper bound of the probability that `lower` (and so the integer) is wrong; 0.0 when proved or exact.
    """

    value: float
    lower: float
    upper: float
    rank: int
    decided_by: Decision
    steps: int
    failure_probability: float


@dataclass(frozen=True)
class SpectralNorm:
    """The largest singular value of one matrix: estimate, certified bounds, probability that the upper one fails."""

    value: float
    lower: float
    upper: float
    failure_probability: float


def stable_rank(
    W: torch.Tensor | Array,
    *,
    proof: bool = False,
    rounding: Rounding = "half-even",
    scale: float = 1.0,
    seed: int = 0,
    tolerance: float | None = None,
) -> StableRank:
    """Stable rank of a matrix with the certified integer `round(scale * stable rank)`.

    Args:
        W: m x n, any of float16, bfloat16, float32, float64, any memory layout.
        proof: replace the failure probability by a proof.
        rounding: how the integer is made; the original script rounds half to even.
        scale: positive factor on the stable rank before rounding.
        seed: of the random start.
        tolerance: when given, the bounds must also be this close together, relative to the value.

    Returns:
        Value, bounds, integer and how it was decided.

    Raises:
        TargetError: empty, not two-dimensional, all-zero, or holding NaN or infinity.
        InputError: `scale`, `rounding` or `tolerance` outside what is accepted.

    Examples:
        >>> stable_rank(np.diag([4.0, 3.0, 2.0, 1.0])).value
        1.875
    """
    _check_options(rounding, scale, tolerance)
    A, frobenius2 = _as_matrix(W)
    question = _Question(min(A.shape), rounding, scale, tolerance)
    with one_thread():
        return _answer(A, question, frobenius2, proof=proof, rng=np.random.default_rng(seed))


def rounded_rank(value: float, *, most: int, rounding: Rounding = "half-even", scale: float = 1.0) -> int:
    """The integer that a stable rank becomes, from 1 to `most`.

    Examples:
        >>> rounded_rank(2.5, most=8), rounded_rank(2.5, most=8, rounding="half-up")
        (2, 3)
    """
    _check_options(rounding, scale, None)
    return _Question(most, rounding, scale, None).rank(value)


def spectral_norm(W: torch.Tensor | Array, *, tolerance: float = 1e-4, proof: bool = False, seed: int = 0) -> SpectralNorm:
    """The largest singular value with certified bounds, at most `tolerance` apart relative to the value.

    Args:
        W: as for `stable_rank`.
        tolerance: relative width of the bounds.
        proof: replace the failure probability by a proof.
        seed: of the random start.

    Returns:
        Estimate, bounds and the probability that the upper one fails.

    Raises:
        TargetError, InputError: as `stable_rank`.

    Examples:
        >>> spectral_norm(np.diag([3.0, 1.0])).value
        3.0
    """
    found = stable_rank(W, tolerance=tolerance, proof=proof, seed=seed)
    values = W.detach().double().cpu().numpy() if isinstance(W, torch.Tensor) else np.asarray(W, np.float64)
    frobenius, error = frobenius_norm(values)
    value, lower, upper = (frobenius / math.sqrt(s) for s in (found.value, found.upper, found.lower))
    slip = (1 + gamma(8)) / (1 - error)
    return SpectralNorm(value, lower / slip, upper * slip, found.failure_probability)


def effective_rank(W: torch.Tensor | Array) -> float:
    """Exponential of the entropy of the singular values, normalised to sum 1.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Examples:
        >>> round(effective_rank(np.eye(3)), 6)
        3.0
    """
    values = scipy.linalg.svdvals(_as_matrix(W)[0].astype(np.float64))
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _check_options(rounding: str, scale: float, tolerance: float | None) -> None:
    if rounding not in _ROUND:
        raise UnknownNameError("rounding", str(rounding), _ROUND)
    if not (math.isfinite(scale) and scale > 0):
        raise InputError("scale", f"got {scale}", "a positive number", "give for example scale=1.0")
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError("tolerance", f"got {tolerance}", "a number between 0 and 1", "give for example tolerance=1e-4")


def _as_matrix(W: torch.Tensor | Array) -> tuple[Array, float]:
    """The weight as a tall float32 or float64 matrix of moderate size, and about ‖W‖_F²; faults reported, a copy only where needed."""
    if isinstance(W, torch.Tensor):
        W = W.detach()
        W = (W if W.dtype == torch.float64 else W.float()).cpu().numpy()
    A = np.asarray(W)
    if A.dtype not in (np.float32, np.float64):
        A = A.astype(np.float32 if A.dtype == np.float16 else np.float64)
    if A.ndim != 2:
        raise TargetError("weight", f"{A.ndim} axes, shape {A.shape}", "a matrix with two axes", "flatten the weight to out x in first")
    if A.size == 0:
        raise TargetError("weight", f"empty, shape {A.shape}", "at least one row and one column", "leave this weight out")
    if not (A.flags.c_contiguous or A.flags.f_contiguous):
        A = np.ascontiguousarray(A)
    if not A.flags.writeable:
        A = A.copy(order="K")  # torch shares memory only with arrays that may be written
    A = A if A.shape[0] >= A.shape[1] else A.T
    squares = _squares(A)
    if not 1e-12 < squares < 1e12:  # λ² and its float32 rounding have to fit as well
        A = _moderate(A)
        squares = _squares(A)
    return A, squares


def _squares(A: Array) -> float:
    """‖A‖_F² in A's own precision: to choose a way by, never to prove with."""
    flat = A.ravel(order="K")
    return float(np.vdot(flat, flat))


def _moderate(A: Array) -> Array:
    """A times a power of two that brings its largest entry to about 1: the stable rank stays, squares neither overflow nor vanish."""
    largest = float(np.abs(A).max())
    if not math.isfinite(largest):
        raise TargetError("weight", "NaN or infinity in it", "finite numbers", "load another checkpoint, or leave this weight out")
    if largest == 0:
        raise TargetError("weight", "all zero, so its stable rank is undefined", "at least one non-zero entry", "leave this weight out")
    moderate: Array = np.ldexp(A, -math.frexp(largest)[1])
    return moderate


@dataclass(frozen=True)
class _Question:
    """What has to be settled about one matrix: the integer, and the width of the bounds where that is asked for."""

    most: int
    rounding: str
    scale: float
    tolerance: float | None

    def rank(self, stable: float) -> int:
        rounded = _ROUND[self.rounding][0](self.scale * stable)
        return max(1, min(self.most, int(rounded)))

    def target(self, frobenius2: float, theta: float) -> float:
        """The σ₁² below which an upper bound must come, when `theta` is close below σ₁²."""
        rank = self.rank(frobenius2 / theta)
        lowest = rank - _ROUND[self.rounding][1] if rank > 1 else 0.0
        edge = self.scale * frobenius2 / lowest if lowest > 0 else math.inf
        wide = theta * (1 + 0.8 * self.tolerance) if self.tolerance else 2 * theta
        return min(edge, wide)

    def settle(self, seen: Enclosure, decided_by: Decision, steps: int) -> StableRank | None:
        """The answer, if both bounds round to the same integer and lie close enough together."""
        slip = (1 + gamma(8)) / (1 - seen.frobenius_error)  # rounding of ‖A‖_F² and of the few operations here
        value = min(float(self.most), max(1.0, seen.frobenius2 / seen.value))
        upper = min(float(self.most), max(value, seen.frobenius2 / seen.lower * slip if seen.lower > 0 else math.inf))
        lower = max(1.0, min(value, seen.frobenius2 / seen.upper / slip))
        if self.rank(lower) != self.rank(upper) or (self.tolerance is not None and upper - lower > self.tolerance * value):
            return None
        return StableRank(value, lower, upper, self.rank(value), decided_by, steps, seen.failure_probability)

    def stamp(self, seen: Enclosure) -> StableRank:
        """The answer that a float64 SVD gives, taken as it is."""
        value = min(float(self.most), max(1.0, seen.frobenius2 / seen.value))
        return StableRank(value, value, value, self.rank(value), "exact", 0, 0.0)


def _answer(A: Array, question: _Question, frobenius2: float, *, proof: bool, rng: np.random.Generator) -> StableRank:
    """The cheapest way that settles the question: a trace, block Lanczos, Cholesky, all of it in float64."""
    found = None
    if min(A.shape) >= _SMALL:
        vector = A.T @ _unit(A @ rng.standard_normal(A.shape[1], A.dtype.type))
        image = A @ _unit(vector)
        early = float(image @ image)  # a rough σ₁² from one power step, too low by a small factor
        about = frobenius2 / early  # a rough stable rank, too high
        if about <= _ONE_VECTOR:
            vector = A.T @ image
            found = _by_one_vector(A, question, frobenius2, vector, float(vector @ vector) / early)
        if found is None and about <= _most_for_lanczos(A.shape[1], proof=proof):
            found = _by_lanczos(A, question, frobenius2, about, proof=proof, rng=rng)
        found = found or _by_cholesky(A, question, frobenius2, vector, proof=proof, rng=rng)
    found = found or question.settle(exact_enclosure(A), "exact", 0)
    return found or question.stamp(svd_enclosure(A))


def _most_for_lanczos(n: int, *, proof: bool) -> float:
    """The rough stable rank up to which block Lanczos costs less than a Gram matrix of side n and its factorisation."""
    if n <= _SMALL_GRAM:
        return _FEW_BESIDE_A_SMALL_GRAM
    return _FEW_VECTORS if proof else n / 5


def _unit(x: Array) -> Array:
    unit: Array = x / np.linalg.norm(x)
    return unit


def _by_one_vector(A: Array, question: _Question, frobenius2: float, vector: Array, theta: float) -> StableRank | None:
    """Where one singular value holds most of ‖A‖_F², two power steps prove it."""
    target = question.target(frobenius2, theta)
    seen = leading_space_bound(A, np.asarray(vector[:, None], np.float64), target * (1 - 1e-6))
    return question.settle(seen, "trace", 2) if seen else None


def _by_trace(krylov: BlockKrylov, question: _Question, target: float, frobenius2: float) -> StableRank | None:
    """A proof without a factorisation, where a few Ritz vectors hold nearly all of ‖A‖_F²."""
    X = krylov.leading(target, frobenius2)
    seen = None if X is None else leading_space_bound(krylov.A, X, target * (1 - 1e-6))
    return question.settle(seen, "trace", krylov.steps) if seen else None


def _by_lanczos(
    A: Array, question: _Question, frobenius2: float, about: float, *, proof: bool, rng: np.random.Generator
) -> StableRank | None:
    """Block Lanczos: a few steps are enough where the spectrum decays."""
    few = about <= _FEW_VECTORS
    block = 8 if few or A.shape[1] < 256 else 16
    krylov = BlockKrylov(A, block, min(_MOST_BLOCK_STEPS, A.shape[1] // block - 1), rng)
    refused = 0
    while krylov.step():
        if krylov.steps < (2 if few else 3):
            continue
        theta = krylov.solve()
        target = question.target(frobenius2, theta)
        found = _by_trace(krylov, question, target, frobenius2) if few else None
        if found is not None:
            return found
        if proof and krylov.steps == 3:
            return None
        if proof or not krylov.promises(target):
            continue
        probes = 7 if target > _WIDE * theta and not refused else 15
        found = question.settle(krylov.enclose(target, probes=probes), "lanczos", krylov.steps)
        if found is not None:
            return found
        refused += 1
        if refused == 2:  # an edge too near for float32 steps
            return None
    return None


def _by_cholesky(
    A: Array, question: _Question, frobenius2: float, start: Array, *, proof: bool, rng: np.random.Generator
) -> StableRank | None:
    """Lanczos on the Gram matrix for the lower bound, a Cholesky factorisation just above it for the upper one."""
    gram = GramMatrix(A, start, exact=proof, target=lambda theta: question.target(frobenius2, theta))
    for careful in (False, True):
        if careful:
            gram.refine(start)
        target = question.target(frobenius2, gram.theta)
        room = target - gram.theta
        if room <= gram.theta * (1e-9 if proof and careful else 4e-5):
            continue
        level = gram.theta + (0.7 if careful else 0.5) * room
        seen = gram.proved_bound(level) if proof else gram.probed_bound(level, rng, room=target - level)
        found = question.settle(seen, "proof" if proof else "cholesky", gram.steps) if seen else None
        if found is not None:
            return found
    return None
