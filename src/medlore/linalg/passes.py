"""Passes over one weight matrix, row chunk by row chunk, so that each chunk is read once and stays in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]

UNIT_64 = float(np.finfo(np.float64).eps) / 2
_CHUNK_BYTES = 1 << 20  # a chunk, its products and the vectors fit into a second-level cache


def gamma(count: int) -> float:
    """Bound of the relative error of `count` chained float64 operations, n u / (1 - n u), in any order.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., Lemma 3.1.
    """
    return count * UNIT_64 / (1 - count * UNIT_64)


def chi_floor(degrees: int, failure: float) -> float:
    """The t with P[‖g‖ <= t] = failure for a standard normal vector g with `degrees` entries."""
    return float(np.sqrt(2 * scipy.special.gammaincinv(degrees / 2, failure)))


def row_chunks(A: Array, bytes_per_entry: int) -> list[Array]:
    """Views of successive rows of A, about one cache-full each."""
    rows = max(16, _CHUNK_BYTES // (bytes_per_entry * A.shape[1]))
    return [A[i : i + rows] for i in range(0, A.shape[0], rows)]


def apply_gram(A: Array, rows: Array) -> Array:
    """AᵀA applied to every row of `rows` (b n), in A's own precision: one pass over A."""
    X = np.ascontiguousarray(rows.T)  # n b
    chunks = row_chunks(A, A.itemsize)
    images: Array = (chunks[0] @ X).T @ chunks[0]
    for C in chunks[1:]:
        images += (C @ X).T @ C
    return images


@dataclass(frozen=True)
class ExactPass:
    """What one float64 pass over A yields.

    Attributes:
        frobenius2: ‖A‖_F².
        frobenius_error: bound of its relative error: a chunk's sum of squares, then the sum over the chunks.
        images: AᵀA X, n x b.
        lengths2: ‖A x‖² for every column x of X.
    """

    frobenius2: float
    frobenius_error: float
    images: Float64
    lengths2: Float64


def exact_pass(A: Array, X: Float64) -> ExactPass:
    """‖A‖_F², AᵀA X and the squared lengths of A X, in float64; A is converted chunk by chunk into one small buffer."""
    frobenius2, lengths2 = 0.0, np.zeros(X.shape[1])
    images = np.zeros(X.T.shape)
    chunks = row_chunks(A, 16)  # float32 source and float64 copy
    buffer = np.empty(chunks[0].shape)
    for chunk in chunks:
        C = buffer[: len(chunk)]
        C[...] = chunk
        frobenius2 += float(np.dot(C.ravel(), C.ravel()))
        Y = C @ X
        images += Y.T @ C
        lengths2 += np.einsum("ij,ij->j", Y, Y)
    return ExactPass(frobenius2, gamma(chunks[0].size + len(chunks)), images.T, lengths2)


def upper_square(U: Array, X: Float64) -> Float64:
    """UᵀU X in float64 for an upper triangular U in Fortran order; only what can be non-zero is converted, in one small buffer."""
    L, n = U.T, len(U)  # its rows lie in the order of the memory
    rows = max(16, min(n, _CHUNK_BYTES // (12 * n)))
    buffer = np.empty((rows, n))
    middle, images = np.zeros_like(X), np.empty_like(X)
    parts = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    for part in parts:
        middle[: part.stop] += _converted(L, part, buffer).T @ X[part]
    for part in parts:
        images[part] = _converted(L, part, buffer) @ middle[: part.stop]
    return images


def _converted(L: Array, rows: slice, buffer: Float64) -> Float64:
    C = buffer[: rows.stop - rows.start, : rows.stop]
    C[...] = L[rows, : rows.stop]
    return C


def frobenius_norm(values: Float64) -> tuple[float, float]:
    """‖A‖_F and a bound of its relative error; squares neither overflow nor vanish."""
    power = int(np.frexp(np.abs(values).max())[1])
    flat = np.ldexp(values, -power).ravel()
    size = _CHUNK_BYTES // 16
    parts = [flat[i : i + size] for i in range(0, flat.size, size)]
    squares = 0.0
    for part in parts:
        squares += float(np.dot(part, part))
    return float(np.ldexp(np.sqrt(squares), power)), gamma(size + len(parts) + 4)


def lower_bound_of_top(seen: ExactPass, column: int, x: Float64, width: int) -> float:
    """A number surely below σ₁² = max ‖A x‖² / ‖x‖², from the pass's column for x, less its float64 rounding."""
    length = float(np.sqrt(x @ x))
    image = float(np.sqrt(seen.lengths2[column])) * (1 - gamma(width + 8))
    sigma = image / length - gamma(width) * float(np.sqrt(seen.frobenius2))
    return max(0.0, sigma) ** 2 * (1 - gamma(2 * width))


def gram_upper(A: Array) -> Array:
    """The upper triangle of AᵀA in A's precision, Fortran order; what is below the diagonal is zero."""
    syrk = scipy.linalg.blas.ssyrk if A.dtype == np.float32 else scipy.linalg.blas.dsyrk
    result: Array = syrk(1.0, A.T) if A.flags.c_contiguous else syrk(1.0, A, trans=1)
    return result


def gram_upper_64(A: Array) -> Float64:
    """The same in float64, added up over chunks of rows, so that A needs no float64 copy."""
    n = A.shape[1]
    G: Float64 = np.zeros((n, n), order="F")
    rows = max(256, n)
    for i in range(0, A.shape[0], rows):
        C = np.ascontiguousarray(A[i : i + rows], np.float64)
        G = scipy.linalg.blas.dsyrk(1.0, C.T, beta=1.0, c=G, overwrite_c=1)
    return G
