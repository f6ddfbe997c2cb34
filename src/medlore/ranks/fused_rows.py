"""Which rows of a fused matrix are q, k and v, as far as names and shapes show; a module in memory is probed instead (`probing`).

Most networks stack the parts (`[q; k; v]`). Some lay out one head after the other (`[q₀ k₀ v₀ q₁ k₁ v₁ ...]`), some have fewer
heads of k and v than of q. A name that is used for several of these orders gives no answer here, and the matrix is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from medlore.ranks.places import Order, Rows, Shapes

Split = Mapping[str, Rows]
_GIVE_THE_MODEL = "give the model itself or its transformers folder, where the order can be tried out"

# Names under which files of different families hold different orders.
_SEVERAL_ORDERS = (
    (re.compile(r"query_key_value\.weight$"), "heads one after the other in GPT-NeoX and Bloom, parts in others"),
    (re.compile(r"(^|\.)h\.\d+\.attn\.qkv_proj\.weight$"), "CodeGen stores it in quarters, others in thirds"),
    (re.compile(r"c_attn\.weight$"), "GPT-BigCode stores it by heads, others by parts"),
    (re.compile(r"(^|\.)in_proj\.weight$"), "DeBERTa stores it by heads, others by parts"),
    (re.compile(r"(^|\.)wqkv\.weight$"), "InternLM stores it by groups of heads, others by parts"),
)


@dataclass(frozen=True)
class Fused:
    """One matrix that holds several of q, k and v.

    Args:
        path: of the attention.
        key: name of the tensor.
        roles: what it holds, in the order of its name.
        shape: rows and columns.
        q_rows: rows of q where q has a matrix of its own.
        out_width: columns of the output projection; 0 where it is not known.
        out_key: name of its tensor.
        q_key: name of the tensor of q, where it has one.
    """

    path: str
    key: str
    roles: str
    shape: tuple[int, int]
    q_rows: int = 0
    out_width: int = 0
    out_key: str = ""
    q_key: str = ""


@dataclass(frozen=True)
class Answer:
    """Rows of each part and how they were identified, or why they are not known."""

    split: Split | None
    order: Order = "by name"
    why: str = ""


Orders = Callable[[Fused], Answer | None]


def order_by_name(fused: Fused, shapes: Shapes) -> Answer:
    """The order that names and shapes show."""
    if fused.key.endswith("in_proj_weight"):
        return _stacked(fused, order="by torch")
    biases = shapes.get(f"{fused.path}.attention_biases" if fused.path else "attention_biases")
    if biases is not None and len(biases) == 2:
        return _levit(fused, heads=biases[0])
    if re.search(r"(^|\.)attn_(block|grid)\.attn$", fused.path):
        return _maxvit(fused, shapes)
    for pattern, why in _SEVERAL_ORDERS:
        if pattern.search(fused.key):
            return Answer(None, why=f"the order of the rows of {fused.key} is not known ({why}); {_GIVE_THE_MODEL}")
    return _stacked(fused)


def stacked(roles: str, height: int) -> Split:
    """Equal parts, one after the other."""
    size = height // len(roles)
    return {role: Rows(i * size, (i + 1) * size) for i, role in enumerate(roles)}


def _stacked(fused: Fused, order: Order = "by name") -> Answer:
    size, rest = divmod(fused.shape[0], len(fused.roles))
    other_width = fused.out_width not in (0, size) and "v" in fused.roles
    other_q = fused.q_rows not in (0, size) and "k" in fused.roles
    if rest or (order == "by name" and (other_width or other_q)):
        came = f"{fused.key} has {fused.shape[0]} rows for {', '.join(fused.roles)}"
        return Answer(None, why=f"{came}, which are not of one size; {_GIVE_THE_MODEL}")
    return Answer(stacked(fused.roles, fused.shape[0]), order)


def _levit(fused: Fused, heads: int) -> Answer:
    """LeViT, TinyViT, EfficientFormer: one head after the other, v of a size of its own."""
    per_head, rest = divmod(fused.shape[0], max(heads, 1))
    if fused.roles == "qkv":
        v = fused.out_width // max(heads, 1)
        key = (per_head - v) // 2
    else:
        key = fused.q_rows // max(heads, 1)
        v = per_head - key
    sizes = {"q": key, "k": key, "v": v}
    if rest or key < 1 or v < 1 or sum(sizes[role] for role in fused.roles) != per_head:
        return Answer(None, why=f"{fused.key} does not divide into {heads} heads; {_GIVE_THE_MODEL}")
    return Answer(by_heads(fused.roles, sizes))


def by_heads(roles: str, sizes: Mapping[str, int]) -> Split:
    """The parts of one head after the other, head after head."""
    period, at, split = sum(sizes[role] for role in roles), 0, {}
    for role in roles:
        split[role] = Rows(at, at + sizes[role], period)
        at += sizes[role]
    return split


def _maxvit(fused: Fused, shapes: Shapes) -> Answer:
    """MaxViT of timm: those with tables as in TensorFlow stack the parts, the others lay out heads."""
    table = shapes.get(f"{fused.path}.rel_pos.relative_position_bias_table")
    last = shapes.get(f"{fused.path}.rel_pos.mlp.fc2.weight")
    if table is not None and len(table) == 3:
        return _stacked(fused)
    heads = table[1] if table is not None and len(table) == 2 else last[0] if last is not None else 0
    size, rest = divmod(fused.shape[0], 3 * heads) if heads else (0, 1)
    if rest:
        return Answer(None, why=f"{fused.key}: the number of heads is not known; {_GIVE_THE_MODEL}")
    return Answer(by_heads("qkv", dict.fromkeys("qkv", size)))
