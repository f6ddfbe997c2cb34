"""One line of a plan, and the matrix that it speaks of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pydantic
from torch import Tensor

from medlore.ranks.targets import Part, Target

STRICT = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class PlannedLayer:
    """One factor pair of a plan.

    Args:
        name: module path in the model, without `.weight`.
        part: what the matrix does.
        shape: its rows and columns; a convolution counts as out x (in · k^d).
        rank: rank of the factor pair.
        alpha: its alpha.
        rows: first and last-plus-one row inside a fused matrix; None when the whole matrix is meant.
        tensor: parameter inside the module, `weight` or `in_proj_weight`.
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
    tensor: Literal["weight", "in_proj_weight"] = "weight"
    group: str = ""
    block: int = -1
    measured_shape: tuple[int, int] | None = None
    stable_rank: float | None = None
    lower: float | None = None
    upper: float | None = None
    decided_by: str = "given"
    sha256: str | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the factor pair: rank · (rows + columns)."""
        return self.rank * sum(self.shape)

    @property
    def key(self) -> str:
        """Name of the tensor in a state dict."""
        return f"{self.name}.{self.tensor}" if self.name else self.tensor

    @property
    def label(self) -> str:
        """Name and, inside a fused matrix, the part."""
        return self.name if self.rows is None else f"{self.name}[{self.part}]"


def matrix_of(place: PlannedLayer | Target, tensor: Tensor) -> Tensor:
    """The matrix of one target inside its tensor: rows of a fused matrix, a convolution flattened to out x (in · k^d)."""
    matrix = tensor.flatten(1)
    return matrix if place.rows is None else matrix[place.rows[0] : place.rows[1]]


def digest(matrix: Tensor) -> str | None:
    """First 16 hexadecimal digits of the SHA-256 of a matrix as little-endian float32; None for a matrix without values."""
    if matrix.is_meta:
        return None
    values = np.ascontiguousarray(matrix.detach().float().cpu().numpy()).astype("<f4", copy=False)
    return hashlib.sha256(values.data).hexdigest()[:16]
