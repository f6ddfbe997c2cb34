"""Which weights of a module or checkpoint are adapted: found by structure, so every family's names lead to the same parts.

`attention` and `feedforward` find the parts; here a set of targets, or a regular expression, chooses among them. That covers timm,
transformers 4 and 5, mmpretrain, open_clip / `nn.MultiheadAttention` and JAX ViT names without a table of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.ranks.attention import HEADS, find_attentions, is_auxiliary
from medlore.ranks.feedforward import depth_in_mlp, feedforward_of, is_expert_stack, stack_target
from medlore.ranks.fused_rows import Orders
from medlore.ranks.places import (
    LAYOUTS,
    PARTS,
    TARGET_SETS,
    Attention,
    Found,
    Kind,
    Layout,
    Part,
    Seen,
    Shapes,
    Target,
    TargetSet,
    Tower,
    natural_key,
)

__all__ = [
    "LAYOUTS",
    "PARTS",
    "TARGET_SETS",
    "Attention",
    "Found",
    "Kind",
    "Layout",
    "Part",
    "Target",
    "TargetSet",
    "find_targets",
    "natural_key",
]


def find_targets(
    shapes: Shapes,
    wanted: str = "attention",
    *,
    include_k: bool = False,
    kinds: Mapping[str, Kind] | None = None,
    tower: Tower = "auto",
    orders: Orders | None = None,
    tied: Mapping[str, str] | None = None,
) -> Found:
    """The targets among the tensors of a model or file, in depth order, q before k, v, o and the MLP of the same block.

    Args:
        shapes: tensor name -> shape, of every tensor.
        wanted: `attention` (q, v, output projection), `attention+mlp`, `all-linear`, `conv`, or a regular expression that must
            match a whole module name (as in PEFT).
        include_k: adapt the key projection too.
        kinds: tensor name -> what its module is, where the modules are known; a file has names and shapes only.
        tower: which half of an image-text model counts; `auto` takes the image half where there is one.
        orders: identifies the rows of a fused matrix by calling the module; None for names alone.
        tied: tensor name -> the tensor in `shapes` that holds its values too.

    Decoder, momentum and teacher blocks do not count while other blocks are there; classification heads and embeddings never do.
    Whatever was left out, and why, stands in `coverage`.

    Raises:
        TargetError: nothing answers, or a matrix that does has no values.
        UnknownNameError: `wanted` is a plain word that is neither a set nor a match, or there is no such tower.
        InputError: the regular expression is broken.
    """
    tied = tied or {}
    matrices = {k: s for k, s in shapes.items() if len(s) == 2 and (kinds is None or kinds.get(k) == "linear") and k not in tied}
    attentions, coverage = find_attentions(shapes, matrices, tower=tower, orders=orders, tied=tied)
    mlps, mlp_coverage = feedforward_of(attentions, shapes, matrices)
    known = _known_parts(attentions, mlps)
    layout = _layout_of(attentions)
    if wanted == "attention":
        found = [t for many in known.values() for t in many if t.part != "mlp"]
    elif wanted == "attention+mlp":
        found = [t for many in known.values() for t in many]
        _refuse_without_mlp(found, mlp_coverage)
    elif wanted == "all-linear":
        found = _all_linear(shapes, matrices, known)
    elif wanted == "conv":
        found = _convolutions(shapes, kinds)
    else:
        found = _by_regex(shapes, kinds, known, wanted)
    if not include_k:
        found = [t for t in found if t.part != "k" or (wanted not in TARGET_SETS and t.rows is None)]
    if not found:
        raise _nothing_found(wanted, shapes, matrices, coverage)
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
    return Found(tuple(placed), tuple(attentions), layout, _coverage(wanted, coverage, mlp_coverage, include_k=include_k))


def _coverage(wanted: str, attentions: Iterable[Seen], mlps: Iterable[Seen], *, include_k: bool) -> tuple[Seen, ...]:
    """What is said of each module, for the sets that speak of attention; k is not taken unless it was asked for."""
    if wanted not in ("attention", "attention+mlp"):
        return ()
    kept = [s if include_k else replace(s, parts=s.parts.replace("k ", "")) for s in attentions]
    return (*kept, *(mlps if wanted == "attention+mlp" else ()))


def _depth_order(target: Target) -> tuple[object, ...]:
    mlp_rank = depth_in_mlp(target.name) if target.part == "mlp" else 0
    return (natural_key(target.group or target.name), PARTS.index(target.part), mlp_rank, natural_key(target.name))


def _known_parts(attentions: Iterable[Attention], mlps: Mapping[str, list[Target]]) -> dict[str, list[Target]]:
    """Tensor name -> its targets, for attention and the MLP of the same block."""
    known: dict[str, list[Target]] = {}
    for attention in attentions:
        for target in [*attention.parts.values(), *mlps.get(attention.path, ())]:
            known.setdefault(target.key, []).append(target)
    return known


def _refuse_without_mlp(found: list[Target], coverage: Iterable[Seen]) -> None:
    """An MLP that was asked for and is nowhere is not passed over."""
    if found and not any(t.part == "mlp" for t in found):
        raise TargetError(
            "--targets attention+mlp",
            "no MLP was found in any block",
            "blocks with an MLP of linear layers, or with experts",
            "use --targets attention, all-linear, or a regular expression that matches the modules",
            faults=[f"{seen.path}: {seen.why}" for seen in coverage if seen.why],
        )


def _all_linear(shapes: Shapes, matrices: Shapes, known: Mapping[str, list[Target]]) -> list[Target]:
    found = [t for many in known.values() for t in many]
    rest = []
    for key, (height, width) in matrices.items():
        name = key.removesuffix(".weight")
        if key in known or name == key or _is_head_or_embedding(name):
            continue
        rest.append(Target(name, "linear", (height, width)))
    rest += [stack_target(k, s) for k, s in shapes.items() if k not in known and is_expert_stack(k, s)]
    main = [t for t in rest if not is_auxiliary(t.name)]
    return found + (main if found or main else rest)


def _convolutions(shapes: Shapes, kinds: Mapping[str, Kind] | None) -> list[Target]:
    found = []
    for key, shape in shapes.items():
        depthwise = len(shape) > 2 and shape[1] == 1 and shape[0] > 1  # a file does not store groups; one input channel shows them
        is_conv = kinds.get(key) == "conv" if kinds is not None else key.endswith(".weight") and 3 <= len(shape) <= 5 and not depthwise
        if is_conv:
            found.append(_conv_target(key.removesuffix(".weight"), shape))
    main = [t for t in found if not is_auxiliary(t.name)]
    return main or found


def _conv_target(name: str, shape: tuple[int, ...]) -> Target:
    width = 1
    for size in shape[1:]:
        width *= size
    return Target(name, "conv", (shape[0], width))


def _by_regex(shapes: Shapes, kinds: Mapping[str, Kind] | None, known: Mapping[str, list[Target]], pattern: str) -> list[Target]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            "--targets", f"{pattern!r} is not a valid regular expression ({error})", _accepted_sets(), "correct the expression"
        ) from error
    found = []
    for key, shape in shapes.items():
        name = key.removesuffix(".weight").removesuffix(".in_proj_weight")
        if is_expert_stack(key, shape) and compiled.fullmatch(key):
            found.append(next(iter(known.get(key, ())), stack_target(key, shape)))
            continue
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


def _is_head_or_embedding(name: str) -> bool:
    pieces = name.split(".")
    return pieces[0] in HEADS or pieces[-1] in HEADS or any("embed" in p or "bias" in p for p in pieces)


def _accepted_sets() -> str:
    return f"{', '.join(TARGET_SETS)}, or a regular expression for whole module names"


def _nothing_found(wanted: str, shapes: Shapes, matrices: Shapes, coverage: Iterable[Seen]) -> InputError:
    if wanted not in TARGET_SETS and re.fullmatch(r"[\w+-]+", wanted):
        return UnknownNameError("--targets", wanted, TARGET_SETS, "use one of them, or a regular expression that matches module names")
    names = sorted({k for k, s in shapes.items() if len(s) >= 2}, key=natural_key)
    shown = ", ".join(names[:5]) or "none"
    return TargetError(
        f"--targets {wanted}",
        f"no weight answers; the {len(names)} matrices here start with {shown}",
        _accepted_sets(),
        _what_would_match(shapes, matrices) if wanted in TARGET_SETS else "choose other targets, or another file",
        faults=[f"{seen.path}: {seen.why}" for seen in coverage if seen.why],
    )


def _what_would_match(shapes: Shapes, matrices: Shapes) -> str:
    """The `--targets` that meet something here."""
    linear = [k.removesuffix(".weight") for k in matrices if k.endswith(".weight") and not _is_head_or_embedding(k.removesuffix(".weight"))]
    leaves = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
    choices = []
    if linear:
        choices.append("--targets all-linear")
    if leaves:
        choices.append(f"--targets '.*\\.({'|'.join(re.escape(leaf) for leaf in leaves[:6])})'")
    if any(len(s) >= 3 and k.endswith(".weight") for k, s in shapes.items()):
        choices.append("--targets conv")
    return f"use {' or '.join(choices)}" if choices else "choose other targets, or another file"
