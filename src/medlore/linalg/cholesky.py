"""Upper bounds of σ₁² from a Cholesky factorisation of λI − AᵀA: one in float32 with probes, one in float64 with a proof.

The derivations are in docs/certificates.md.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.linalg.blas
import scipy.linalg.lapack

from medlore.linalg.lanczos import FAILURE_OF_ALL, FAILURE_OF_PROBES, Enclosure
from medlore.linalg.passes import Array, Float64, chi_floor, exact_pass, gamma, gram_upper, gram_upper_64, lower_bound_of_top

_PROBES = 15  # with the Ritz vector sixteen columns, which BLAS kernels like
_MOST_LANCZOS_STEPS = 120


class GramMatrix:
    """The upper triangle of G = AᵀA, its largest Ritz pair, and tests of λI − G.

    Args:
        A: m x n with m >= n.
        exact: hold G in float64, so that `prove` can be asked.
        start: first Lanczos vector, n.
    """

    def __init__(self, A: Array, start: Array, *, exact: bool) -> None:
        self.A = A
        self.G: Array = gram_upper_64(A) if exact else gram_upper(A)
        self.steps = 0
        self.theta, self.vector = self._lanczos(start)

    def _lanczos(self, start: Array) -> tuple[float, Float64]:
        """The largest Ritz pair of G, run until its error (residual² / gap) is far below what a rounding edge can ask for."""
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
        self.steps = len(weights)
        vector = np.asarray(weights.astype(Q.dtype) @ Q[: len(weights)], np.float64)
        return value, vector

    def _factor(self, level: float) -> Array | None:
        """The upper Cholesky factor of level · I − G, or None where it breaks down."""
        potrf = scipy.linalg.lapack.spotrf if self.G.dtype == np.float32 else scipy.linalg.lapack.dpotrf
        M = np.negative(self.G)
        M[np.diag_indices(len(M))] += self.G.dtype.type(level)
        U, info = potrf(M, lower=0, clean=1, overwrite_a=1)
        return U if info == 0 else None

    def probed_bound(self, level: float, rng: np.random.Generator) -> Enclosure | None:
        """σ₁² <= level + ‖E‖ where E = level · I − AᵀA − UᵀU is bounded from its action on Gaussian vectors.

        UᵀU is positive semidefinite whatever rounding did to U, so nothing is assumed about the factorisation or about G.
        """
        U = self._factor(level)
        if U is None:
            return None
        m, n = self.A.shape
        X = np.column_stack([self.vector, rng.standard_normal((n, _PROBES))])
        seen = exact_pass(self.A, X)
        probes = X[:, 1:]
        wide = U.astype(np.float64)
        misses = level * probes - seen.images[:, 1:] - wide.T @ (wide @ probes)
        size = float(np.linalg.norm(probes))
        rounding = 4 * (gamma(m + n) * seen.frobenius2 + gamma(2 * n) * (n * level + level)) * size
        error = (float(np.linalg.norm(misses)) + rounding) / chi_floor(_PROBES, FAILURE_OF_PROBES)
        return self._enclosure(seen.frobenius2, seen.lengths2[0], lower_bound_of_top(seen, 0, X[:, 0], m), level + error, FAILURE_OF_ALL)

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
        return self._enclosure(seen.frobenius2, seen.lengths2[0], lower_bound_of_top(seen, 0, X[:, 0], m), level + shift, 0.0)

    def _enclosure(self, frobenius2: float, length2: float, lower: float, upper: float, failure: float) -> Enclosure:
        value = float(length2 / (self.vector @ self.vector))
        return Enclosure(frobenius2, value, lower, upper, failure)


def _ritz(alphas: Float64, betas: Float64) -> tuple[float, Float64, float]:
    """Largest Ritz value of a tridiagonal matrix, its vector, and the usual estimate of its error."""
    k = len(alphas)
    if k == 1:
        return float(alphas[0]), np.ones(1), math.inf
    values, vectors = scipy.linalg.eigh_tridiagonal(alphas, betas[: k - 1], select="i", select_range=(k - 2, k - 1), check_finite=False)
    residual = abs(betas[k - 1] * vectors[-1, 1])
    gap = max(float(values[1] - values[0]), residual, 1e-300)
    return float(values[1]), np.asarray(vectors[:, 1]), float(residual * residual / gap)


def exact_enclosure(A: Array) -> Enclosure:
    """‖A‖_F² and σ₁² from the float64 Gram matrix, with the bound of what its rounding can do."""
    m, n = A.shape
    G = gram_upper_64(A)
    frobenius2 = float(np.trace(G))
    top = float(scipy.linalg.eigh(G, lower=False, eigvals_only=True, subset_by_index=(n - 1, n - 1), check_finite=False)[0])
    error = 2 * gamma(m + n) * frobenius2
    return Enclosure(frobenius2, top, top - error, top + error, 0.0)


def svd_enclosure(A: Array) -> Enclosure:
    """‖A‖_F² and σ₁² as a float64 SVD gives them: the last word on a rounding edge."""
    values = np.linalg.svd(A.astype(np.float64), compute_uv=False)
    top = float(values[0] ** 2)
    return Enclosure(float((values**2).sum()), top, top, top, 0.0)
