"""One line of a plan, and the matrix that it speaks of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pydantic
from torch import Tensor

from medlore.ranks.places import STRICT, Part, Rows, Target


@dataclass(frozen=True)
class PlannedLayer:
    """One factor pair of a plan.

    Args:
        name: module path in the model, without `.weight`.
        part: what the matrix does.
        shape: its rows and columns; a convolution counts as out x (in · k^d).
        rank: rank of the factor pair.
        alpha: its alpha.
        rows: first and last-plus-one row inside a fused matrix (inside one period); None when the whole matrix is meant.
        period: rows after which the pattern of a fused matrix repeats, head after head; None when the parts lie one after the other.
        tensor: parameter inside the module, `weight` or `in_proj_weight`; empty where `name` is the parameter itself.
        experts: matrices of this shape that are stacked in the tensor and have one rank; 1 for an ordinary one.
        group: path of the attention module that it belongs to.
        block: number of that attention module in depth order; -1 outside attention blocks.
        measured_shape: matrix whose stable rank was measured; differs from `shape` for fused granularity.
        stable_rank: that stable rank; None where the rule needs none.
        lower: certified lower bound of it.
        upper: certified upper bound of it.
        decided_by: how the integer became sure: `lanczos`, `cholesky`, `trace`, `proof`, `exact`, `given`, `uniform` or `budget`.
        sha256: first 16 hexadecimal digits of the hash of the matrix as little-endian float32; None for weights without values.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    name: str
    part: Part
    shape: tuple[int, int]
    rank: int
    alpha: float
    rows: tuple[int, int] | None = None
    tensor: Literal["weight", "in_proj_weight", ""] = "weight"
    group: str = ""
    block: int = -1
    period: int | None = None
    experts: int = 1
    measured_shape: tuple[int, int] | None = None
    stable_rank: float | None = None
    lower: float | None = None
    upper: float | None = None
    decided_by: str = "given"
    sha256: str | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the factor pair: rank · (rows + columns), for each of stacked experts."""
        return self.experts * self.rank * sum(self.shape)

    @property
    def key(self) -> str:
        """Name of the tensor in a state dict."""
        return ".".join(piece for piece in (self.name, self.tensor) if piece)

    @property
    def label(self) -> str:
        """Name and, inside a fused matrix, the part."""
        return self.name if self.rows is None else f"{self.name}[{self.part}]"


def matrix_of(place: PlannedLayer | Target, tensor: Tensor) -> Tensor:
    """The matrix of one target inside its tensor: rows of a fused matrix, a convolution flattened to out x (in · k^d).

    The matrices of stacked experts stay apart: (experts, rows, columns).
    """
    if place.experts > 1 or not place.tensor:
        return tensor
    matrix = tensor.flatten(1)
    if place.rows is None:
        return matrix
    first, last = place.rows
    if place.period is None:
        return matrix[first:last]
    heads: Tensor = matrix.unflatten(0, (-1, place.period))  # heads, rows of one, columns
    return heads[:, first:last].flatten(0, 1)


def row_indices(place: PlannedLayer | Target, height: int) -> list[int]:
    """Rows of a fused matrix of `height` rows that belong to one part, in their order.

    Examples:
        >>> row_indices(PlannedLayer("attn.qkv", "k", (4, 8), 1, 1.0, rows=(2, 4), period=6), 12)
        [2, 3, 8, 9]
    """
    rows = Rows(*(place.rows or (0, height)), place.period)
    period = rows.period or height
    return [start + row for start in range(0, height, period) for row in range(rows.first, rows.last)]


def digest(matrix: Tensor) -> str | None:
    """First 16 hexadecimal digits of the SHA-256 of a matrix as little-endian float32; None for a matrix without values."""
    if matrix.is_meta:
        return None
    values = np.ascontiguousarray(matrix.detach().float().cpu().numpy()).astype("<f4", copy=False)
    return hashlib.sha256(values.data).hexdigest()[:16]
