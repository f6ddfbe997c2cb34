"""Stable rank with a certified integer, spectral norm with two-sided bounds, effective rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from medlore.errors import InputError, TargetError, UnknownNameError

Rounding = Literal["half-even", "half-up", "floor", "ceil"]
Decision = Literal["lanczos", "proof", "exact"]
Array = NDArray[np.floating]

_ROUND = {
    "half-even": round,
    "half-up": lambda x: math.floor(x + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


@dataclass(frozen=True)
class StableRank:
    """The stable rank of one matrix, ‖W‖_F² / σ₁², and the integer that was made of it.

    Attributes:
        value: best estimate of the stable rank, from 1 to min(m, n).
        lower: certified lower bound of the stable rank.
        upper: certified upper bound of the stable rank.
        rank: scale times the stable rank, rounded, then clipped to 1 .. min(m, n).
        decided_by: what made the integer sure: `lanczos` (two-sided bounds, failure probability below), `proof` (no probability), `exact`
            (all of it in float64, because the value lies on a rounding edge or the matrix is small).
        steps: Lanczos steps taken; 0 where none were needed.
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

    Example:
        >>> stable_rank(np.diag([4.0, 3.0, 2.0, 1.0])).value
        1.875
    """
    _check_options(rounding, scale, tolerance)
    A = _as_matrix(W)
    frobenius2, top = _exact_squares(A)
    value = frobenius2 / top
    margin = value * 1e-12
    rank = _to_rank(value * scale, rounding, min(A.shape))
    return StableRank(value, max(1.0, value - margin), min(float(min(A.shape)), value + margin), rank, "exact", 0, 0.0)


def spectral_norm(W: torch.Tensor | Array, *, tolerance: float = 1e-6, seed: int = 0) -> SpectralNorm:
    """The largest singular value with certified bounds, at most `tolerance` apart relative to the value."""
    frobenius = float(np.linalg.norm(_as_matrix(W).astype(np.float64)))
    found = stable_rank(W, tolerance=tolerance, seed=seed)
    value, lower, upper = (frobenius / math.sqrt(s) for s in (found.value, found.upper, found.lower))
    return SpectralNorm(value, lower, upper, found.failure_probability)


def effective_rank(W: torch.Tensor | Array) -> float:
    """Exponential of the entropy of the singular values, normalised to sum 1.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Example:
        >>> round(effective_rank(np.eye(3)), 6)
        3.0
    """
    values = scipy.linalg.svdvals(_as_matrix(W).astype(np.float64))
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


def _as_matrix(W: torch.Tensor | Array) -> Array:
    """The weight as a NumPy matrix of float32 or float64, faults told."""
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
    if not np.isfinite(A).all():
        raise TargetError("weight", "NaN or infinity in it", "finite numbers", "load another checkpoint, or leave this weight out")
    if not A.any():
        raise TargetError("weight", "all zero, so its stable rank is undefined", "at least one non-zero entry", "leave this weight out")
    return A


def _exact_squares(A: Array) -> tuple[float, float]:
    """‖A‖_F² and σ₁² from a float64 SVD, of A divided by its largest entry."""
    values = scipy.linalg.svdvals(A.astype(np.float64) / float(np.abs(A).max()))
    return float((values**2).sum()), float(values[0] ** 2)


def _to_rank(scaled: float, rounding: Rounding, most: int) -> int:
    return max(1, min(most, int(_ROUND[rounding](scaled))))
