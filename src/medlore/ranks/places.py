"""Where a factor pair may go: one matrix (`Target`), the projections of one attention (`Attention`), and what was seen (`Seen`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import pydantic

Part = Literal["q", "k", "v", "o", "qkv", "mlp", "conv", "linear"]
Layout = Literal["timm", "transformers", "mmpretrain", "open_clip", "jax", "plain"]
TargetSet = Literal["attention", "attention+mlp", "all-linear", "conv"]
Kind = Literal["linear", "conv", "other"]
Tower = Literal["auto", "vision", "text", "both"]
Order = Literal["apart", "by name", "probed", "by torch"]
Outcome = Literal["taken", "in part", "left out"]

PARTS: tuple[Part, ...] = get_args(Part)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TARGET_SETS: tuple[TargetSet, ...] = get_args(TargetSet)
TOWERS: tuple[Tower, ...] = get_args(Tower)

Shapes = Mapping[str, tuple[int, ...]]
STRICT = pydantic.ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Rows:
    """Which rows of a fused matrix belong to one part.

    Args:
        first: first row, within one period.
        last: row behind the last one.
        period: the pattern repeats after so many rows (q, k and v of one head after the other); None: it does not.
    """

    first: int
    last: int
    period: int | None = None

    def count(self, height: int) -> int:
        """Number of rows in a matrix of `height` rows."""
        repeats = 1 if self.period is None else height // self.period
        return repeats * (self.last - self.first)


@dataclass(frozen=True)
class Target:
    """One matrix that may receive a factor pair.

    Args:
        name: module path, without `.weight`; for `in_proj_weight` the path of the attention module; for the stacked weights of
            experts the path of the parameter.
        tensor: name of the parameter inside that module: `weight`, `in_proj_weight`, or empty where `name` is the parameter.
        part: what the matrix does.
        rows: first and last-plus-one row inside a fused matrix (inside one period); None when the whole matrix is meant.
        period: rows after which the pattern of a fused matrix repeats; None when it does not.
        shape: rows and columns of the part as a matrix; a convolution counts as out x (in · k^d).
        experts: matrices of this shape that are stacked in the tensor; 1 for an ordinary one.
        group: path of the attention module of the block that the part belongs to.
        block: number of that attention module in depth order, from 0; -1 outside attention blocks.
    """

    name: str
    part: Part
    shape: tuple[int, int]
    rows: tuple[int, int] | None = None
    tensor: str = "weight"
    group: str = ""
    block: int = -1
    period: int | None = None
    experts: int = 1

    @property
    def key(self) -> str:
        """Name of the tensor in a state dict."""
        return ".".join(piece for piece in (self.name, self.tensor) if piece)


@dataclass(frozen=True)
class Attention:
    """The four projections of one attention module (any of k, o may be missing)."""

    path: str
    parts: Mapping[Part, Target]
    order: Order = "apart"


@dataclass(frozen=True)
class Seen:
    """One attention module, or the MLP of its block, and what became of it.

    Args:
        path: module path.
        outcome: `taken`, `in part` (some matrices that were asked for were not found) or `left out`.
        parts: what was taken, such as `q v o`.
        order: how the rows of a fused matrix were identified: `apart` (nothing is fused), `by name`, `probed` (by calling the module)
            or `by torch` (`nn.MultiheadAttention`).
        why: the reason, where something is missing.
        kind: `attention`, or `mlp` where the MLP of a block was asked for.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = STRICT

    path: str
    outcome: Outcome
    parts: str = ""
    order: Order = "apart"
    why: str = ""
    kind: Literal["attention", "mlp"] = "attention"


@dataclass(frozen=True)
class Found:
    """What `find_targets` returns: targets in depth order, the attention modules taken, the naming that was met, all that was seen."""

    targets: tuple[Target, ...]
    attentions: tuple[Attention, ...]
    layout: Layout
    coverage: tuple[Seen, ...] = ()


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `blocks.10` follows `blocks.9`.

    Examples:
        >>> sorted(["blocks.10.attn", "blocks.9.attn"], key=natural_key)
        ['blocks.9.attn', 'blocks.10.attn']
    """
    pieces = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in pieces)
