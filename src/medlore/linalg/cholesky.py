"""Upper bounds of σ₁² from a Cholesky factorisation of λI − AᵀA: one in float32 with probes, one in float64 with a proof.

The derivations are in docs/certificates.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy

from medlore.linalg.lanczos import FAILURE_OF_ALL, FAILURE_OF_PROBES, Enclosure, symmetric_eigen
from medlore.linalg.passes import (
    Array,
    ExactPass,
    Float64,
    chi_floor,
    exact_pass,
    gamma,
    gram_upper,
    gram_upper_64,
    lower_bound_of_top,
    upper_square,
)

_PROBES = 15  # with the Ritz vector sixteen columns, which BLAS kernels like
_FEW_PROBES = 7  # half the cost, an error bound some ten times larger
_MOST_LANCZOS_STEPS = 120
_FIRST_LOOK = 12


class GramMatrix:
    """The upper triangle of G = AᵀA, a Ritz pair for its largest eigenvalue, and tests of λI − G.

    Args:
        A: m x n with m >= n.
        start: first Lanczos vector, n.
        exact: hold G in float64, so that `proved_bound` can be asked.
        target: from a θ close below σ₁² to the bound that is wanted above it; without it Lanczos runs until θ stands still.
    """

    def __init__(self, A: Array, start: Array, *, exact: bool, target: Callable[[float], float] | None = None) -> None:
        self.A = A
        self.G: Array = gram_upper_64(A) if exact else gram_upper(A)
        self.steps, self.theta, self.vector = 0, 0.0, np.zeros(len(self.G))
        if target is None:
            self.refine(start)
        else:
            self._quick(start, target)

    def _quick(self, start: Array, target: Callable[[float], float]) -> None:
        """A float32 Ritz pair whose error is small beside the distance to the target.

        Nothing is reorthogonalised: that delays the second copy of a Ritz pair, not the first, and the bounds do not rest on it.
        """
        G = self.G.astype(np.float32, copy=False)
        n = len(G)
        most = min(n, _MOST_LANCZOS_STEPS)
        Q = np.zeros((most + 1, n), np.float32)
        Q[0] = start / np.linalg.norm(start)
        alphas, betas = np.zeros(most), np.zeros(most)
        symv = scipy.linalg.blas.ssymv
        look = _FIRST_LOOK
        for k in range(most):
            w = symv(1.0, G, Q[k])
            alphas[k] = w @ Q[k]
            w -= np.float32(alphas[k]) * Q[k]
            if k:
                w -= np.float32(betas[k - 1]) * Q[k - 1]
            betas[k] = math.sqrt(w @ w)
            closed = betas[k] <= 1e-6 * abs(alphas[0])
            if closed or k + 1 in (look, most):
                look += look // 3
                value, weights, error = _ritz(alphas[: k + 1], betas[: k + 1])
                room = target(value + error) - value - error
                if closed or error <= min(0.03 * room, 2e-7 * value):  # the second for the digits of the estimate alone
                    break
            np.divide(w, np.float32(betas[k]), out=Q[k + 1])
        self._keep(value, weights, Q)

    def refine(self, start: Array) -> None:
        """The Ritz pair with reorthogonalisation, until its error (residual² / gap) is far below what a rounding edge can ask for."""
        symv = scipy.linalg.blas.ssymv if self.G.dtype == np.float32 else scipy.linalg.blas.dsymv
        n = len(self.G)
        most = min(n, _MOST_LANCZOS_STEPS)
        Q = np.empty((most + 1, n), self.G.dtype)
        Q[0] = start / np.linalg.norm(start)
        alphas, betas = np.zeros(most), np.zeros(most)
        value, weights = 0.0, np.ones(1)
        for k in range(most):
            w = symv(1.0, self.G, Q[k])
            alphas[k] = float(w @ Q[k])
            basis = Q[: k + 1]
            w -= (basis @ w) @ basis
            w -= (basis @ w) @ basis  # once is unstable
            betas[k] = float(np.linalg.norm(w))
            closed = betas[k] <= 1e-7 * abs(alphas[0])
            if k % 4 == 3 or k == most - 1 or closed:
                value, weights, error = _ritz(alphas[: k + 1], betas[: k + 1])
                if closed or error <= 1e-7 * value:
                    break
            Q[k + 1] = w / betas[k]
        self._keep(value, weights, Q)

    def _keep(self, value: float, weights: Float64, Q: Array) -> None:
        self.steps += len(weights)
        self.theta, self.vector = value, np.asarray(weights.astype(Q.dtype) @ Q[: len(weights)], np.float64)

    def _factor(self, level: float) -> Array | None:
        """The upper Cholesky factor of level · I − G, or None where it breaks down."""
        potrf = scipy.linalg.lapack.spotrf if self.G.dtype == np.float32 else scipy.linalg.lapack.dpotrf
        M = np.negative(self.G)
        M[np.diag_indices(len(M))] += self.G.dtype.type(level)
        U, info = potrf(M, lower=0, clean=1, overwrite_a=1)
        return U if info == 0 else None

    def probed_bound(self, level: float, rng: np.random.Generator, *, room: float = 0.0) -> Enclosure | None:
        """σ₁² <= level + ‖E‖ where E = level · I − AᵀA − UᵀU is bounded from its action on Gaussian vectors.

        Args:
            level: just above σ₁².
            rng: draws the probes.
            room: how far above `level` the bound may come; where that is plenty, fewer probes are drawn.

        UᵀU is positive semidefinite whatever rounding did to U, so nothing is assumed about the factorisation or about G.
        """
        U = self._factor(level)
        if U is None:
            return None
        probes = _FEW_PROBES if room > 1e-3 * level else _PROBES
        m, n = self.A.shape
        X = np.column_stack([self.vector, rng.standard_normal((n, probes))])
        seen = exact_pass(self.A, X)
        seeds = X[:, 1:]
        misses = level * seeds - seen.images[:, 1:] - upper_square(U, seeds)
        size = float(np.linalg.norm(seeds))
        rounding = 4 * (gamma(m + n) * seen.frobenius2 + gamma(2 * n) * (n * level + level)) * size
        error = (float(np.linalg.norm(misses)) + rounding) / chi_floor(probes, FAILURE_OF_PROBES)
        return self._enclosure(seen, lower_bound_of_top(seen, 0, X[:, 0], m), level + error, FAILURE_OF_ALL)

    def proved_bound(self, level: float) -> Enclosure | None:
        """σ₁² <= level + shift, proved: the float64 Cholesky factorisation of level · I − G ran to its end.

        Source: Rump, "Verification of positive definiteness", BIT 46 (2006); Higham, "Accuracy and Stability of Numerical Algorithms",
        2nd ed., (3.13) for the product and Theorem 10.3 for the factorisation. All constants are doubled.
        """
        if self._factor(level) is None:
            return None
        m, n = self.A.shape
        X = self.vector[:, None]
        seen = exact_pass(self.A, X)
        product = gamma(m + 2) * seen.frobenius2
        factorisation = gamma(n + 2) / (1 - gamma(n + 2)) * n * level
        shift = 2 * (product + factorisation + 4 * gamma(1) * level)
        return self._enclosure(seen, lower_bound_of_top(seen, 0, X[:, 0], m), level + shift, 0.0)

    def _enclosure(self, seen: ExactPass, lower: float, upper: float, failure: float) -> Enclosure:
        value = float(seen.lengths2[0] / (self.vector @ self.vector))
        return Enclosure(seen.frobenius2, seen.frobenius_error, value, lower, upper, failure)


def _ritz(alphas: Float64, betas: Float64) -> tuple[float, Float64, float]:
    """Largest Ritz value of a tridiagonal matrix, its vector, and the usual estimate of its error."""
    k = len(alphas)
    if k == 1:
        return float(alphas[0]), np.ones(1), math.inf
    T = np.diag(alphas) + np.diag(betas[: k - 1], 1) + np.diag(betas[: k - 1], -1)
    values, vectors = symmetric_eigen(T)
    residual = abs(betas[k - 1] * vectors[-1, -1])
    gap = max(float(values[-1] - values[-2]), residual, 1e-300)
    return float(values[-1]), np.asarray(vectors[:, -1]), float(residual * residual / gap)


def exact_enclosure(A: Array) -> Enclosure:
    """‖A‖_F² and σ₁² from the float64 Gram matrix, with the bound of what its rounding can do.

    The trace is a sum of n sums of m squares: its relative error is below gamma(m + n).
    """
    m, n = A.shape
    G = gram_upper_64(A)
    frobenius2 = float(np.trace(G))
    top = float(scipy.linalg.eigh(G, lower=False, eigvals_only=True, subset_by_index=(n - 1, n - 1), check_finite=False)[0])
    error = 2 * gamma(m + n) * frobenius2
    return Enclosure(frobenius2, gamma(m + n), top, top - error, top + error, 0.0)


def svd_enclosure(A: Array) -> Enclosure:
    """‖A‖_F² and σ₁² as a float64 SVD gives them: the last word on a rounding edge."""
    values = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    top = float(values[0] ** 2)
    return Enclosure(float((values**2).sum()), 0.0, top, top, top, 0.0)
