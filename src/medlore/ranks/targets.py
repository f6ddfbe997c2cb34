"""Which weights of a module or checkpoint are adapted: found by structure, so every family's names lead to the same parts.

An attention module is whatever holds a fused `qkv` / `in_proj_weight` matrix, or sibling `query, key, value` (`q_proj, ...`)
matrices; its output projection is the matrix beside or above them. That covers timm, transformers 4 and 5, mmpretrain,
open_clip / `nn.MultiheadAttention` and JAX ViT names without a table of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from medlore.errors import InputError, TargetError, UnknownNameError

Part = Literal["q", "k", "v", "o", "qkv", "mlp", "conv", "linear"]
Layout = Literal["timm", "transformers", "mmpretrain", "open_clip", "jax", "plain"]
TargetSet = Literal["attention", "attention+mlp", "all-linear", "conv"]
Kind = Literal["linear", "conv", "other"]

PARTS: tuple[Part, ...] = get_args(Part)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TARGET_SETS: tuple[TargetSet, ...] = get_args(TargetSet)

_SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
)
_FUSED = ("qkv.weight", "in_proj_weight", "Wqkv.weight")
_OUT_BESIDE = ("proj", "out_proj", "o_proj", "o", "out", "to_out.0")
_OUT_ABOVE = ("output.dense",)
_MLP = (
    "mlp.fc1", "mlp.fc2", "mlp.fc1_g", "mlp.fc1_x", "mlp.w12", "mlp.w3", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "mlp.weights_in", "mlp.weights_out", "mlp.c_fc", "mlp.c_proj", "mlp.linear1", "mlp.linear2", "mlp.linear_1", "mlp.linear_2",
    "mlp.0", "mlp.3", "ffn.layers.0.0", "ffn.layers.1", "intermediate.dense", "output.dense", "linear1", "linear2",
    "MlpBlock_3.Dense_0", "MlpBlock_3.Dense_1",
)  # fmt: skip
_HEADS = frozenset(
    {"head", "heads", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "fc", "score", "lm_head", "cls_head"}
)
_AUXILIARY = ("decoder", "momentum", "teacher")
_IMAGE_TOWERS = ("visual", "vision_model", "vision_tower", "image_encoder")


@dataclass(frozen=True)
class Target:
    """One matrix that may receive a factor pair.

    Args:
        name: module path, without `.weight`; for `in_proj_weight` the path of the attention module.
        tensor: name of the parameter inside that module, `weight` or `in_proj_weight`.
        part: what the matrix does.
        rows: first and last-plus-one row inside a fused matrix; None when the whole matrix is meant.
        shape: rows and columns of the part as a matrix; a convolution counts as out x (in · k^d).
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

    @property
    def key(self) -> str:
        """Name of the tensor in a state dict."""
        return f"{self.name}.{self.tensor}" if self.name else self.tensor


@dataclass(frozen=True)
class Attention:
    """The four projections of one attention module (any of k, o may be missing)."""

    path: str
    parts: Mapping[Part, Target]


@dataclass(frozen=True)
class Found:
    """What `find_targets` returns: targets in depth order, all attention modules, and the naming that was met."""

    targets: tuple[Target, ...]
    attentions: tuple[Attention, ...]
    layout: Layout


def find_targets(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: str = "attention",
    *,
    include_k: bool = False,
    kinds: Mapping[str, Kind] | None = None,
) -> Found:
    """The targets among the tensors of a model or file, in depth order, q before k, v, o and the MLP of the same block.

    Args:
        shapes: tensor name -> shape, of every tensor.
        wanted: `attention` (q, v, output projection), `attention+mlp`, `all-linear`, `conv`, or a regular expression that must
            match a whole module name (as in PEFT).
        include_k: adapt the key projection too.
        kinds: tensor name -> what its module is, where the modules are known; a file has names and shapes only.

    Decoder, momentum and teacher blocks do not count while other blocks are there, nor does the text tower of an image-text
    model (name it with a regular expression); classification heads and embeddings never do.

    Raises:
        TargetError: nothing answers, or a matrix that does has no values.
        UnknownNameError: `wanted` is a plain word that is neither a set nor a match.
        InputError: the regular expression is broken.
    """
    matrices = {k: s for k, s in shapes.items() if len(s) == 2 and (kinds is None or kinds.get(k) == "linear")}
    attentions = _attentions(matrices)
    known = _known_parts(attentions, matrices)
    layout = _layout_of(attentions)
    if wanted == "attention":
        found = [t for many in known.values() for t in many if t.part != "mlp"]
    elif wanted == "attention+mlp":
        found = [t for many in known.values() for t in many]
    elif wanted == "all-linear":
        found = _all_linear(matrices, known)
    elif wanted == "conv":
        found = _convolutions(shapes, kinds)
    else:
        found = _by_regex(shapes, kinds, known, wanted)
    if not include_k:
        found = [t for t in found if t.part != "k" or (wanted not in TARGET_SETS and t.rows is None)]
    if not found:
        raise _nothing_found(wanted, shapes)
    empty = [f"{t.key} ({t.part}): {t.shape[0]} x {t.shape[1]}" for t in found if min(t.shape) == 0]
    if empty:
        raise TargetError(
            f"--targets {wanted}",
            f"{len(empty)} matrices without values",
            "matrices with at least one row and column",
            "choose other targets, or take a whole checkpoint",
            faults=empty,
        )
    number = {a.path: i for i, a in enumerate(attentions)}
    placed = (replace(t, block=number.get(t.group, -1)) for t in sorted(found, key=_depth_order))
    return Found(tuple(placed), tuple(attentions), layout)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which `blocks.10` follows `blocks.9`.

    Example:
        >>> sorted(["blocks.10.attn", "blocks.9.attn"], key=natural_key)
        ['blocks.9.attn', 'blocks.10.attn']
    """
    pieces = re.split(r"(\d+)", name)
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in pieces)


def _depth_order(target: Target) -> tuple[object, ...]:
    mlp_rank = next((i for i, leaf in enumerate(_MLP) if target.name.endswith("." + leaf)), 0) if target.part == "mlp" else 0
    return (natural_key(target.group or target.name), PARTS.index(target.part), mlp_rank, natural_key(target.name))


def _attentions(matrices: Mapping[str, tuple[int, ...]]) -> list[Attention]:
    found: dict[str, Attention] = {}
    for key in matrices:
        for leaf in _FUSED:
            if key == leaf or key.endswith("." + leaf):
                path = key[: -len(leaf)].rstrip(".")
                found.setdefault(path, _fused_attention(path, leaf, matrices))
        for names in _SEPARATE:
            if key.endswith(f".{names[0]}.weight"):
                path = key.removesuffix(f".{names[0]}.weight")
                if f"{path}.{names[2]}.weight" in matrices:
                    found.setdefault(path, _separate_attention(path, names, matrices))
    kept = [a for a in found.values() if a.parts and a.path.split(".")[0] not in _HEADS]
    main = [a for a in kept if not _is_auxiliary(a.path)] or kept
    image = [a for a in main if any(piece in _IMAGE_TOWERS for piece in a.path.split("."))]
    return sorted(image or main, key=lambda a: natural_key(a.path))


def _fused_attention(path: str, leaf: str, matrices: Mapping[str, tuple[int, ...]]) -> Attention:
    key = f"{path}.{leaf}" if path else leaf
    height, width = matrices[key]
    third, rest = divmod(height, 3)
    if rest:  # multi-query and other unequal splits: not a q, k, v of one size
        return Attention(path, {})
    name, tensor = (path, leaf) if leaf == "in_proj_weight" else (key.removesuffix(".weight"), "weight")
    parts: dict[Part, Target] = {}
    for index, part in enumerate(("q", "k", "v")):
        rows = (index * third, (index + 1) * third)
        parts[part] = Target(name, part, (third, width), rows, tensor, path)  # type: ignore[index, arg-type]
    return Attention(path, parts | _output(path, matrices))


def _separate_attention(path: str, names: tuple[str, str, str], matrices: Mapping[str, tuple[int, ...]]) -> Attention:
    parts: dict[Part, Target] = {}
    for part, leaf in zip(("q", "k", "v"), names, strict=True):
        if (shape := matrices.get(f"{path}.{leaf}.weight")) is not None:
            parts[part] = Target(f"{path}.{leaf}", part, (shape[0], shape[1]), group=path)  # type: ignore[index, arg-type]
    return Attention(path, parts | _output(path, matrices))


def _output(path: str, matrices: Mapping[str, tuple[int, ...]]) -> dict[Part, Target]:
    above = path.rpartition(".")[0]
    candidates = [f"{path}.{leaf}" if path else leaf for leaf in _OUT_BESIDE] + [f"{above}.{leaf}" for leaf in _OUT_ABOVE if above]
    for name in candidates:
        if (shape := matrices.get(f"{name}.weight")) is not None:
            return {"o": Target(name, "o", (shape[0], shape[1]), group=path)}
    return {}


def _known_parts(attentions: Iterable[Attention], matrices: Mapping[str, tuple[int, ...]]) -> dict[str, list[Target]]:
    """Tensor name -> its targets, for attention and the MLP of the same block."""
    known: dict[str, list[Target]] = {}
    for attention in attentions:
        for target in attention.parts.values():
            known.setdefault(target.key, []).append(target)
        for target in _mlp_of(attention, matrices, set(known)):
            known.setdefault(target.key, []).append(target)
    return known


def _mlp_of(attention: Attention, matrices: Mapping[str, tuple[int, ...]], taken: set[str]) -> list[Target]:
    block = attention.path
    while block:
        block = block.rpartition(".")[0]
        names = [f"{block}.{leaf}" if block else leaf for leaf in _MLP]
        here = [n for n in names if f"{n}.weight" in matrices and f"{n}.weight" not in taken]
        if here:
            return [Target(n, "mlp", (matrices[f"{n}.weight"][0], matrices[f"{n}.weight"][1]), group=attention.path) for n in here]
    return []


def _all_linear(matrices: Mapping[str, tuple[int, ...]], known: Mapping[str, list[Target]]) -> list[Target]:
    found = [t for many in known.values() for t in many]
    rest = []
    for key, (height, width) in matrices.items():
        name = key.removesuffix(".weight")
        if key in known or name == key or _is_head_or_embedding(name):
            continue
        rest.append(Target(name, "linear", (height, width)))
    main = [t for t in rest if not _is_auxiliary(t.name)]
    return found + (main if found or main else rest)


def _convolutions(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Kind] | None) -> list[Target]:
    found = []
    for key, shape in shapes.items():
        depthwise = len(shape) > 2 and shape[1] == 1 and shape[0] > 1  # a file does not tell groups; one input channel does
        is_conv = kinds.get(key) == "conv" if kinds is not None else key.endswith(".weight") and 3 <= len(shape) <= 5 and not depthwise
        if is_conv:
            found.append(_conv_target(key.removesuffix(".weight"), shape))
    main = [t for t in found if not _is_auxiliary(t.name)]
    return main or found


def _conv_target(name: str, shape: tuple[int, ...]) -> Target:
    width = 1
    for size in shape[1:]:
        width *= size
    return Target(name, "conv", (shape[0], width))


def _by_regex(
    shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Kind] | None, known: Mapping[str, list[Target]], pattern: str
) -> list[Target]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError("--targets", f"{pattern!r} is no regular expression ({error})", _accepted_sets(), "mend the expression") from error
    found = []
    for key, shape in shapes.items():
        name = key.removesuffix(".weight").removesuffix(".in_proj_weight")
        usable = kinds is None or kinds.get(key) in ("linear", "conv")
        if name == key or len(shape) < 2 or not usable or not compiled.fullmatch(name):
            continue
        if key in known:
            found += known[key]
        elif key.endswith("weight") and not key.endswith("in_proj_weight"):
            found.append(Target(name, "linear", (shape[0], shape[1])) if len(shape) == 2 else _conv_target(name, shape))
    return found


def _layout_of(attentions: list[Attention]) -> Layout:
    if not attentions:
        return "plain"
    first = attentions[0]
    q = first.parts["q"]
    if "MultiHeadDotProductAttention" in q.name:
        return "jax"
    if q.tensor == "in_proj_weight":
        return "open_clip"
    if q.rows is None:
        return "transformers"
    blocks_free = re.search(r"(^|\.)layers\.\d+\.attn$", first.path) is not None
    return "mmpretrain" if first.path.endswith("w_msa") or blocks_free else "timm"


def _is_auxiliary(path: str) -> bool:
    return any(piece.startswith(_AUXILIARY) for piece in path.split("."))


def _is_head_or_embedding(name: str) -> bool:
    pieces = name.split(".")
    return pieces[0] in _HEADS or pieces[-1] in _HEADS or any("embed" in p or "bias" in p for p in pieces)


def _accepted_sets() -> str:
    return f"{', '.join(TARGET_SETS)}, or a regular expression for whole module names"


def _nothing_found(wanted: str, shapes: Mapping[str, tuple[int, ...]]) -> InputError:
    if wanted not in TARGET_SETS and re.fullmatch(r"[\w+-]+", wanted):
        return UnknownNameError("--targets", wanted, TARGET_SETS, "take one of them, or a regular expression that matches module names")
    names = sorted({k for k, s in shapes.items() if len(s) >= 2}, key=natural_key)
    shown = ", ".join(names[:5]) or "none"
    return TargetError(
        f"--targets {wanted}",
        f"no weight answers; the {len(names)} matrices here start with {shown}",
        _accepted_sets(),
        "choose other targets, or another file",
    )
