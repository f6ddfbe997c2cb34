"""Block Lanczos on AᵀA from a random start, with an upper bound of σ₁² that holds except with a stated probability.

The derivation of every line of `CertifiedKrylov` is in docs/certificates.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from medlore.linalg.passes import Array, Float64, apply_gram, chi_floor, exact_pass, gamma, lower_bound_of_top

# One answer may rest on one random start and, at most, on four sets of probes (two certificates of Lanczos, two of Cholesky). Whichever of
# them speaks, the reported probability is that any of them fails.
FAILURE_OF_START = 3e-13
FAILURE_OF_PROBES = 1.6e-13
FAILURE_OF_ALL = FAILURE_OF_START + 4 * FAILURE_OF_PROBES


@dataclass(frozen=True)
class Enclosure:
    """Bounds of ‖A‖_F² and σ₁²: `value` and `lower` are sure, `upper` fails with at most `failure_probability`.

    `frobenius_error` bounds the relative error of `frobenius2`.
    """

    frobenius2: float
    frobenius_error: float
    value: float
    lower: float
    upper: float
    failure_probability: float


class BlockKrylov:
    """A growing orthonormal basis of span{Ω, GΩ, G²Ω, ...} with G = AᵀA, and the projection T of G on it.

    Nothing that is proved from it assumes that the basis is exactly orthonormal or T exact: what they lack is measured.

    Args:
        A: m x n with m >= n, float32 or float64.
        block: columns b of the random start Ω.
        most_steps: upper limit of the number of steps.
        rng: draws Ω, and later the probes.
    """

    def __init__(self, A: Array, block: int, most_steps: int, rng: np.random.Generator) -> None:
        n = A.shape[1]
        self.A, self.block, self.steps, self.rng = A, block, 0, rng
        self._rows = np.empty(((most_steps + 1) * block, n), A.dtype)  # one basis vector a row
        self._T = np.zeros((most_steps * block, most_steps * block))
        start = rng.standard_normal((block, n), dtype=A.dtype.type)
        self._rows[:block], self.start_factor = _orthonormal_rows(start)  # Ωᵀ, b n; Ω = V₀ R₀ + rounding
        self.start = start
        self._closed = False  # the space is invariant: what is left of GV is rounding
        self.next_factor = np.zeros((block, block))
        self.ritz_values = np.zeros(0)
        self.ritz_vectors = np.zeros((0, 0))

    @property
    def size(self) -> int:
        """Number of basis vectors that T speaks of."""
        return self.steps * self.block

    def step(self) -> bool:
        """One block step; false when the space cannot grow (it is invariant, or as large as asked for)."""
        low, high = self.size, self.size + self.block
        if self._closed or high + self.block > len(self._rows):
            return False
        W = apply_gram(self.A, self._rows[low:high])  # b n
        Q = self._rows[:high]
        H = Q @ W.T
        W -= H.T @ Q
        again = Q @ W.T  # once leaves residuals a hundred times larger
        W -= again.T @ Q
        projected = (H + again).astype(np.float64)
        self._T[:high, low:high] = projected
        self._T[low:high, :high] = projected.T
        self._T[low:high, low:high] = (projected[low:] + projected[low:].T) / 2
        self._rows[high : high + self.block], self.next_factor = _orthonormal_rows(W)
        self._closed = float(np.linalg.norm(self.next_factor)) <= 32 * float(np.finfo(W.dtype).eps) * float(
            np.linalg.norm(self._T[:high, low:high])
        )
        self.steps += 1
        return True

    def solve(self) -> float:
        """Ritz values and vectors of T; returns the largest."""
        T = self._T[: self.size, : self.size]
        self.ritz_values, self.ritz_vectors = symmetric_eigen(T)
        return float(self.ritz_values[-1])

    def top_vector(self) -> Float64:
        """The Ritz vector of the largest Ritz value, n."""
        return np.asarray(self._rows[: self.size].T @ self.ritz_vectors[:, -1].astype(self._rows.dtype), np.float64)

    def promises(self, target: float) -> bool:
        """Whether the start would have to be unlucky for λ₁ = target, rounding left aside: the sign to ask for `enclose`."""
        left, right = self._ends()
        theta, floor = float(self.ritz_values[-1]), chi_floor(self.block, FAILURE_OF_START)
        if target <= theta:
            return False
        middle = max(target, 1.3 * theta)  # where a short recurrence grows least, measured against what the grid can resolve
        N = np.stack([(left / (point - self.ritz_values)) @ right.T for point in (target, middle)])
        return bool((schatten8(N) <= np.array([0.85, 0.45]) * floor).all())

    def leading(self, target: float, frobenius2: float) -> Float64 | None:
        """As many leading Ritz vectors as `leading_space_bound` seems to need for a bound below `target`, n j; None where none suffice."""
        couplings2 = ((self.next_factor @ self.ritz_vectors[-self.block :]) ** 2).sum(0)
        gains = _gains(target, self.ritz_values, couplings2)[::-1]
        enough = np.flatnonzero(target - frobenius2 + np.cumsum(gains) > 0.02 * target)
        if target <= self.ritz_values[-1] or enough.size == 0:
            return None
        count = int(enough[0]) + 1
        chosen = self.ritz_vectors[:, -count:][:, ::-1].astype(self.A.dtype)
        return np.asarray(self._rows[: self.size].T @ chosen, np.float64)

    def _ends(self) -> tuple[Float64, Float64]:
        """B E₊ᵀS and R₀ᵀE₁ᵀS: how the Ritz vectors meet the next block and the start, b p each."""
        return self.next_factor @ self.ritz_vectors[-self.block :], self.start_factor.T @ self.ritz_vectors[: self.block]

    def upper_bound(self, target: float, *, residual: float, slack: float) -> float:
        """The smallest number of a grid that λ₁ exceeds only if the start was unlucky; infinity if the grid holds none below `target`.

        Args:
            target: where the bound is wanted; the grid starts below it and ends where a decreasing bound takes over.
            residual: bound φ of ‖G V − V T − V₊ B Eᵀ‖.
            slack: how much of the length of qᵀΩ rounding may eat.
        """
        theta = float(self.ritz_values[-1])
        if target <= theta:
            return math.inf
        left, right = self._ends()
        nu, floor = self._spread(), chi_floor(self.block, FAILURE_OF_START) - slack
        points = _grid(theta, target)
        inverse = 1 / (points[:, None] - self.ritz_values)  # l p
        squares = inverse * inverse
        e = np.sqrt(squares @ (left**2).sum(0))
        g = np.sqrt(squares @ (right**2).sum(0))
        reach = float(np.linalg.norm(self.start_factor, 2))
        tail = np.flatnonzero(nu * e * reach + residual * g <= floor)  # ‖N‖ <= e ‖R₀‖, and e and g fall: good from here to infinity
        if tail.size == 0:
            return math.inf
        end = int(tail[0]) + 1
        bend = np.zeros(end)  # how far N leaves the chord of an interval
        bend[:-1] = np.diff(points[:end]) ** 2 / 4 * e[: end - 1] * g[: end - 1] / (points[: end - 1] - theta)
        bend[1:] = np.maximum(bend[1:], bend[:-1])  # each end of an interval has to leave room for it
        slope = np.concatenate([g[:1], g[: end - 1]])  # φ g is largest where an interval begins
        allowed = (floor - residual * slope) / nu - bend
        bad = np.flatnonzero(~_norms_within(inverse[:end], left, right, allowed))
        first = 0 if bad.size == 0 else int(bad[-1]) + 1
        return float(points[first]) if first < end and points[first] <= target else math.inf

    def _spread(self) -> float:
        """Bound of ‖[V V₊]‖: one plus how far the basis is from orthonormal, with the rounding of that measure."""
        Q = self._rows[: self.size + self.block]
        defect = Q @ Q.T
        defect[np.diag_indices(len(Q))] -= 1
        unit = float(np.finfo(Q.dtype).eps) / 2
        return math.sqrt(1 + float(np.linalg.norm(defect)) + 2 * len(Q) * Q.shape[1] * unit)

    def enclose(self, target: float, *, probes: int = 15) -> Enclosure:
        """Bounds in which every rounding error is measured in float64: one more pass over A.

        Args:
            target: where an upper bound of σ₁² is wanted.
            probes: random vectors that measure the residual; half as many cost less and bound it less sharply.
        """
        p, b, n = self.size, self.block, self.A.shape[1]
        weights = np.zeros((p + b, probes + 1))
        weights[:p, 0] = self.ritz_vectors[:, -1]
        weights[:p, 1:] = self.rng.standard_normal((p, probes))
        basis = self._rows[: p + b].astype(np.float64).T  # n p+b
        X = basis @ weights
        seen = exact_pass(self.A, X)
        expected = np.zeros_like(weights)
        expected[:p] = self._T[:p, :p] @ weights[:p]
        expected[p:] = self.next_factor @ weights[p - b : p]
        misses = (seen.images - basis @ expected)[:, 1:]
        rounding = 4 * gamma(self.A.shape[0] + n) * seen.frobenius2 * float(np.linalg.norm(X[:, 1:]))
        residual = (float(np.linalg.norm(misses)) + rounding) / chi_floor(probes, FAILURE_OF_PROBES)
        slack = float(np.linalg.norm(self.start.T - basis[:, :b] @ self.start_factor))
        lower = lower_bound_of_top(seen, 0, X[:, 0], max(self.A.shape))
        upper = self.upper_bound(target, residual=residual, slack=slack)
        value = float(seen.lengths2[0] / (X[:, 0] @ X[:, 0]))
        return Enclosure(seen.frobenius2, seen.frobenius_error, value, lower, upper, FAILURE_OF_ALL)


def leading_space_bound(A: Array, X: Float64, target: float) -> Enclosure | None:
    """Bounds of σ₁² that are proved: what the columns of X do not hold of ‖A‖_F² is too little for another large singular value.

    Args:
        A: m x n with m >= n.
        X: n x j, approximate eigenvectors of AᵀA, the best one first.
        target: where the upper bound is wanted.

    Returns:
        The enclosure, its upper bound just above `target` at most; None where this does not decide.
    """
    X = np.ascontiguousarray(_orthonormal_rows(np.ascontiguousarray(X.T))[0].T)
    j = X.shape[1]
    seen = exact_pass(A, X)
    T = X.T @ seen.images
    held = np.diag(T).copy()
    rest = seen.images - X @ T
    couplings2 = (rest * rest).sum(0)
    if target <= held.max():
        return None
    unit = gamma(sum(A.shape) + 16)
    skew = float(np.linalg.norm(X.T @ X - np.eye(j))) + j * unit
    wrong = float(np.linalg.norm(T - np.diag(held))) + 16 * (skew + 2 * j * unit) * seen.frobenius2
    largest = seen.frobenius2 * (1 + gamma(4)) / (1 - seen.frobenius_error)  # what ‖A‖_F² may be
    most = largest + (j + 2) * wrong  # with what rounding can hide of the trace that X leaves
    level = target - wrong
    kept = _gains(level, held, couplings2) > 0
    if level <= held.max() or level - most + _gains(level, held, couplings2)[kept].sum() <= 1e-9 * most:
        return None
    lower = lower_bound_of_top(seen, 0, X[:, 0], max(A.shape))
    value = float(seen.lengths2[0] / (X[:, 0] @ X[:, 0]))
    return Enclosure(seen.frobenius2, seen.frobenius_error, value, lower, target, 0.0)


def _gains(level: float, held: Float64, couplings2: Float64) -> Float64:
    """What each vector takes off the trace that is left to others, less what its coupling to them gives back; 0 for a useless one."""
    room = level - held
    return np.asarray(np.where(room > 0, np.maximum(held - couplings2 / np.where(room > 0, room, 1), 0), 0))


def _orthonormal_rows(W: Array) -> tuple[Array, Float64]:
    """The factors of Wᵀ = V R, as Vᵀ and R. By Cholesky where W is well conditioned, by Householder reflections elsewhere."""
    R, info = scipy.linalg.lapack.dpotrf((W @ W.T).astype(np.float64), lower=0, clean=1)
    diagonal = np.abs(np.diag(R))
    if info == 0 and diagonal.min() > 0.02 * diagonal.max():
        inverse, _ = scipy.linalg.lapack.dtrtri(R)
        return np.asarray(inverse.T.astype(W.dtype) @ W), R
    V, R = np.linalg.qr(W.T)
    return V.T, R.astype(np.float64)


def symmetric_eigen(T: Float64) -> tuple[Float64, Float64]:
    """Eigenvalues (rising) and eigenvectors of a small symmetric matrix; torch's LAPACK needs half of SciPy's time for it."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.ascontiguousarray(T)))
    return np.asarray(values.numpy()), np.asarray(vectors.numpy())


def _grid(theta: float, target: float) -> Float64:
    """Points above θ by steps of a quarter of the distance to it; `target` is one of them."""
    gap = target - theta
    count = math.ceil(math.log(max(4.0, 1000 * theta / gap)) / math.log(1.25))
    points: Float64 = theta + gap * 1.25 ** np.arange(-6, count + 1.0)
    points[6] = target
    return points


def _norms_within(inverse: Float64, left: Float64, right: Float64, allowed: Float64) -> NDArray[np.bool_]:
    """Whether ‖left · diag(inverse row) · rightᵀ‖ <= allowed, row by row; never yes by mistake."""
    b = len(left)
    products = (left[:, None, :] * right[None, :, :]).reshape(b * b, -1)
    N = inverse @ products.T  # l b·b
    good: NDArray[np.bool_] = np.einsum("ij,ij->i", N, N) <= np.maximum(allowed, 0) ** 2
    rest = np.flatnonzero(~good & (allowed > 0))
    if rest.size:
        good[rest] = schatten8(N[rest].reshape(-1, b, b)) <= allowed[rest]
    return good


def schatten8(N: Float64) -> Float64:
    """An upper bound of the largest singular value of each matrix of a stack: (Σ σ⁸)^(1/8), l b b -> l."""
    scale = np.abs(N).max(axis=(1, 2), keepdims=True)
    N = N / np.where(scale > 0, scale, 1)
    square = N @ N.transpose(0, 2, 1)
    fourth = square @ square
    return np.asarray((fourth * fourth).sum(axis=(1, 2)) ** 0.125 * scale[:, 0, 0])
