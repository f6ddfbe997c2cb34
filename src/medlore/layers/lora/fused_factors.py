"""The factors of a fused qkv layer: one trained parameter for each part, seen by PEFT as one ordinary factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.layers.lora.truncation import Truncation


class StackedFactor(nn.Module):
    """`lora_A` of a fused layer: one (rank, in) parameter for each part, stacked in the order q, k, v.

    Args:
        parts: part -> its rows.
        rank: rank that PEFT was given; rows beyond those of the parts are zero on disk.
    """

    _like: Tensor

    def __init__(self, parts: Mapping[str, Tensor], *, in_features: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.in_features, self.rank = in_features, rank
        self.part_names = tuple(parts)
        self.truncations: dict[str, Truncation] = {}
        self.register_buffer("_like", like.new_empty(0), persistent=False)
        for name, rows in parts.items():
            self.register_parameter(name, nn.Parameter(rows.detach().clone()))

    def part(self, name: str) -> Tensor:
        """The (rank, in) parameter of one part."""
        return self.get_parameter(name)

    @property
    def weight(self) -> Tensor:
        """What PEFT sees: all parts stacked, padded with zero rows to the rank."""  # r in
        return _padded([self.part(name) for name in self.part_names], self._like, (self.rank, self.in_features))

    def active_weight(self) -> Tensor:
        """The rows that this step uses: all of them, unless a partial update is installed and the module is training."""
        rows = [_cut(self, name).rows(self.part(name)) for name in self.part_names]
        return torch.cat(rows) if rows else self._like.new_zeros(0, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., active ranks of all parts)."""
        return F.linear(x, self.active_weight())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        weight = _stored(self, state_dict, prefix, rest)
        if weight is None:
            return
        start = 0
        with torch.no_grad():
            for name in self.part_names:
                part = self.part(name)
                part.copy_(weight[start : start + len(part)])
                start += len(part)
        if weight[start:].any():
            rest[-1].append(f"{prefix}weight: values in rows that belong to no part; was it trained further in plain PEFT?")


class BlockFactor(nn.Module):
    """`lora_B` of a fused layer: one (rows, rank) parameter for each part, block-diagonal, zero elsewhere.

    Args:
        parts: part -> its columns.
        rows: part -> first and last-plus-one output row.
        order: for matrices whose parts lie head after head: `rows` count in this order of the output rows; None: as they are.
        scalings: part -> what its product is multiplied with; folded into `weight`.
        rank: rank that PEFT was given.
        use_rslora: whether those scalings are alpha / √rank.
    """

    _like: Tensor
    _order: Tensor | None
    _back: Tensor | None

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        *,
        rows: Mapping[str, tuple[int, int]],
        scalings: Mapping[str, float],
        out_features: int,
        rank: int,
        like: Tensor,
        use_rslora: bool = False,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.rank, self.use_rslora = out_features, rank, use_rslora
        self.rows, self.scalings = dict(rows), dict(scalings)
        self.part_names = tuple(parts)
        self.truncations: dict[str, Truncation] = {}
        self.register_buffer("_like", like.new_empty(0), persistent=False)
        arranged = None if order is None else torch.tensor(order, device=like.device)
        self.register_buffer("_order", arranged, persistent=False)
        self.register_buffer("_back", None if arranged is None else arranged.argsort(), persistent=False)
        self.bias = None
        for name, columns in parts.items():
            self.register_parameter(name, nn.Parameter(columns.detach().clone()))

    def part(self, name: str) -> Tensor:
        """The (rows, rank) parameter of one part."""
        return self.get_parameter(name)

    @property
    def weight(self) -> Tensor:
        """What PEFT sees: block-zero, with the scalings folded in."""  # out r
        return _padded_columns(self._blocks({n: self.part(n) for n in self.part_names}), self.rank)

    def active_weight(self) -> Tensor:
        """The columns that this step uses, scalings folded in; see `StackedFactor.active_weight`."""
        return self._blocks({n: _cut(self, n).columns(self.part(n)) for n in self.part_names})

    def forward(self, h: Tensor) -> Tensor:
        """(..., active ranks of all parts) -> (..., out); rows without a part are zero."""
        columns = {n: _cut(self, n).columns(self.part(n)) for n in self.part_names}
        pieces = h.split([c.shape[1] for c in columns.values()], dim=-1)
        made = {n: F.linear(p, c) * self.scalings[n] for (n, c), p in zip(columns.items(), pieces, strict=True)}
        return self._between_zeros(made, like=next(iter(made.values()), h), width=None)

    def _blocks(self, columns: Mapping[str, Tensor]) -> Tensor:
        total = sum(c.shape[1] for c in columns.values())
        placed, start = {}, 0
        for name, block in columns.items():
            width = block.shape[1]
            placed[name] = F.pad(block * self.scalings[name], (start, total - start - width)).transpose(0, 1)
            start += width
        return self._between_zeros(placed, like=self._like, width=total).transpose(0, 1).contiguous()

    def _between_zeros(self, made: Mapping[str, Tensor], *, like: Tensor, width: int | None) -> Tensor:
        """Put pieces (..., rows of a part) side by side along the output rows, zeros between them."""
        lead = (width,) if width is not None else like.shape[:-1]
        pieces, at = [], 0
        for name in sorted(made, key=lambda n: self.rows[n]):
            first, last = self.rows[name]
            pieces += [like.new_zeros(*lead, first - at), made[name]]
            at = last
        whole = torch.cat([*pieces, like.new_zeros(*lead, self.out_features - at)], dim=-1)
        return whole if self._back is None else whole.index_select(-1, self._back)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001 - torch's signature
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        weight = _stored(self, state_dict, prefix, rest)
        if weight is None:
            return
        left, start = weight.clone() if self._order is None else weight[self._order.to(weight.device)], 0
        with torch.no_grad():
            for name in self.part_names:
                part, (first, last) = self.part(name), self.rows[name]
                block = left[first:last, start : start + part.shape[1]]
                part.copy_(block / self.scalings[name])
                block.zero_()
                start += part.shape[1]
        if left.any():
            rest[-1].append(f"{prefix}weight: values outside the blocks of q, k and v; was it trained further in plain PEFT?")


def _cut(factor: StackedFactor | BlockFactor, part: str) -> Truncation:
    return factor.truncations.get(part, _WHOLE) if factor.training else _WHOLE


_WHOLE = Truncation()


def _padded(parts: list[Tensor], like: Tensor, shape: tuple[int, int]) -> Tensor:
    have = sum(len(p) for p in parts)
    return torch.cat([*parts, like.new_zeros(shape[0] - have, shape[1])])


def _padded_columns(matrix: Tensor, rank: int) -> Tensor:
    return F.pad(matrix, (0, rank - matrix.shape[1])) if matrix.shape[1] < rank else matrix


def _stored(factor: StackedFactor | BlockFactor, state_dict: Mapping[str, Any], prefix: str, rest: tuple[Any, ...]) -> Tensor | None:
    """The one tensor that stands for all parts on disk, or None after the fault was noted."""
    _metadata, strict, missing, _unexpected, faults = rest
    weight = state_dict.get(prefix + "weight")
    if weight is None:
        if strict:
            missing.append(prefix + "weight")
        return None
    if weight.shape != factor.weight.shape:
        faults.append(f"{prefix}weight: shape {tuple(weight.shape)} in the file, {tuple(factor.weight.shape)} here")
        return None
    return torch.as_tensor(weight)
