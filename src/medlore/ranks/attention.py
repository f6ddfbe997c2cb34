"""The attention modules of a network, found by structure, and what is said of each: taken, taken in part, left out and why.

An attention is whatever holds matrices whose names spell q, k and v, apart or fused. Its output projection is the matrix in the
same module that reads what the attention makes (as many columns as there are rows of q or v), else the one beside that module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from medlore.errors import UnknownNameError
from medlore.ranks.fused_rows import Answer, Fused, Orders, order_by_name
from medlore.ranks.places import TOWERS, Attention, Order, Part, Rows, Seen, Shapes, Target, Tower, natural_key
from medlore.ranks.roles import output_likeness, speaks_of_attention, split_name

HEADS = frozenset(
    {"head", "heads", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "fc", "score", "lm_head", "cls_head"}
)
_AUXILIARY = ("decoder", "momentum", "teacher")
_IMAGE_TOWERS = ("visual", "vision_model", "vision_tower", "image_encoder")
_IMAGE_WORDS = re.compile(r"^(visual|vision|image|img)_?(encoder|model|tower|transformer|backbone|trunk|net)?$")
_OUT_BESIDE = ("proj", "out_proj", "o_proj", "o", "out", "to_out.0")


@dataclass
class _Candidate:
    """The tensors of one path whose names spell roles: roles -> tensor name."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)


def find_attentions(
    shapes: Shapes, matrices: Shapes, *, tower: Tower = "auto", orders: Orders | None = None, tied: Mapping[str, str] | None = None
) -> tuple[list[Attention], list[Seen]]:
    """The attentions that count, in depth order, and all that were seen.

    Args:
        shapes: every tensor.
        matrices: those that can be adapted as they are.
        tower: which half of an image-text model counts.
        orders: identifies the rows of a fused matrix by calling the module; None, or None as its answer, leaves it to the names.
        tied: tensor -> the tensor whose values it shares.
    """
    if tower not in TOWERS:
        raise UnknownNameError("--tower", tower, TOWERS)
    found: dict[str, Attention] = {}
    seen: dict[str, Seen] = {}
    tied = tied or {}
    for candidate in _candidates({k: s for k, s in shapes.items() if k not in tied}).values():
        attention, note = _read(candidate, shapes, matrices, orders)
        if attention is None:
            seen[note.path] = note
        else:
            found[attention.path], seen[attention.path] = attention, note
    seen |= {n.path: n for n in _unknown(matrices, found, seen)} | {n.path: n for n in _shared(tied, found)}
    kept = [a for a in found.values() if not _in_head(a.path)]
    _leave_out(seen, found.values(), kept, "part of a head")
    counting = _counting(kept, tower, seen)
    ordered = sorted(counting, key=lambda a: natural_key(a.path))
    return ordered, sorted(seen.values(), key=lambda s: natural_key(s.path))


def is_auxiliary(path: str) -> bool:
    """Whether a path lies in a decoder, a momentum copy or a teacher."""
    return any(piece.startswith(_AUXILIARY) for piece in path.split("."))


def _candidates(shapes: Shapes) -> dict[str, _Candidate]:
    """Paths whose tensors spell q and v at least, apart or fused; a name that is more than a role is not one."""
    candidates: dict[str, _Candidate] = {}
    for key, shape in shapes.items():
        if len(shape) < 2:
            continue
        if key == "in_proj_weight" or key.endswith(".in_proj_weight"):
            path, roles = key.removesuffix("in_proj_weight").rstrip("."), "qkv"
        elif key.endswith(".weight"):
            path, _, roles = split_name(key.removesuffix(".weight"))
        else:
            path, _, roles = split_name(key.removesuffix("_weight"))  # nn.MultiheadAttention with k and v of other widths
        if not roles and key.endswith(".in_proj.weight") and any(speaks_of_attention(p) for p in path.split(".")[-3:-1]):
            path, roles = path.removesuffix(".in_proj"), "qkv"
        if roles:
            candidates.setdefault(path, _Candidate(path)).keys.setdefault(roles, key)
    return {path: c for path, c in candidates.items() if _best_cover(c) is not None}


def _best_cover(candidate: _Candidate) -> tuple[str, ...] | None:
    """The roles of the tensors that give q, v and, if possible, k, each once: one fused matrix before several."""
    by_roles = {"".join(sorted(roles)): roles for roles in candidate.keys}
    for cover in (("kqv",), ("q", "kv"), ("kq", "v"), ("k", "qv"), ("q", "k", "v"), ("q", "v")):
        if all(part in by_roles for part in cover):
            return tuple(by_roles[part] for part in cover)
    return None


def _read(candidate: _Candidate, shapes: Shapes, matrices: Shapes, orders: Orders | None) -> tuple[Attention | None, Seen]:
    path = candidate.path
    cover = _best_cover(candidate) or ()
    keys = {roles: candidate.keys[roles] for roles in cover}
    odd = [key for key in keys.values() if key not in matrices]
    if odd:
        return None, Seen(path, "left out", why=f"{', '.join(odd)}: {_what(shapes[odd[0]])}, not the weight of a linear layer")
    if "weight" in "".join(k.rpartition(".")[2] for k in keys.values() if k.endswith(("q_proj_weight", "v_proj_weight"))):
        return None, Seen(path, "left out", why="k and v of other widths than q, which PEFT cannot adapt in nn.MultiheadAttention")
    parts, order, why = _projections(path, keys, shapes, matrices, orders)
    if why:
        return None, Seen(path, "left out", why=why)
    output, why = _output(path, keys, matrices, widths={p: t.shape for p, t in parts.items()})
    if output is not None:
        parts["o"] = output
    taken = " ".join(part for part in ("q", "k", "v", "o") if part in parts)
    return Attention(path, parts, order), Seen(path, "in part" if why else "taken", taken, order, why)


def _what(shape: tuple[int, ...]) -> str:
    return "a convolution" if len(shape) > 3 else f"{len(shape)} axes"


def _projections(
    path: str, keys: Mapping[str, str], shapes: Shapes, matrices: Shapes, orders: Orders | None
) -> tuple[dict[Part, Target], Order, str]:
    """Targets of q, k and v, how fused rows were identified, and why they could not be."""
    parts: dict[str, Target] = {}
    order: Order = "apart"
    for roles, key in keys.items():
        height, width = matrices[key]
        name, tensor = _module_of(key)
        if len(roles) == 1:
            parts[roles] = Target(name, roles, (height, width), tensor=tensor, group=path)  # type: ignore[arg-type]
            continue
        answer = _rows_of(path, roles, keys, shapes, matrices, orders)
        if answer.split is None:
            return {}, answer.order, answer.why
        order = answer.order
        for part, rows in answer.split.items():
            parts[part] = _fused_part(name, tensor, part, rows, (height, width), path)
    names: tuple[Part, ...] = ("q", "k", "v")
    return {part: parts[part] for part in names if part in parts}, order, ""


def _rows_of(path: str, roles: str, keys: Mapping[str, str], shapes: Shapes, matrices: Shapes, orders: Orders | None) -> Answer:
    key = keys[roles]
    height, width = matrices[key]
    q_key = keys.get("q", "")
    output, _ = _output(path, keys, matrices, widths={})
    fused = Fused(
        path,
        key,
        roles,
        (height, width),
        q_rows=matrices[q_key][0] if q_key else 0,
        out_width=output.shape[1] if output is not None else 0,
        out_key=output.key if output is not None else "",
        q_key=q_key,
    )
    answer = orders(fused) if orders is not None else None
    return order_by_name(fused, shapes) if answer is None else answer


def _fused_part(name: str, tensor: str, part: str, rows: Rows, shape: tuple[int, int], path: str) -> Target:
    period = None if rows.period == shape[0] else rows.period
    size = replace(rows, period=period).count(shape[0])
    return Target(name, part, (size, shape[1]), (rows.first, rows.last), tensor, path, period=period)  # type: ignore[arg-type]


def _module_of(key: str) -> tuple[str, str]:
    """Module and parameter of a tensor's name."""
    if key == "in_proj_weight" or key.endswith(".in_proj_weight"):
        return key.removesuffix("in_proj_weight").rstrip("."), "in_proj_weight"
    return key.removesuffix(".weight"), "weight"


def _output(path: str, keys: Mapping[str, str], matrices: Shapes, widths: Mapping[Part, tuple[int, int]]) -> tuple[Target | None, str]:
    """The output projection, or why there is none: by its usual name, else by its shape, beside q, k and v or just above them."""
    above = path.rpartition(".")[0]
    made = _made(keys, matrices, widths)
    usual = [f"{path}.{leaf}" if path else leaf for leaf in _OUT_BESIDE]
    for name in [*usual, f"{above}.output.dense"] if speaks_of_attention(above) else usual:
        if (shape := matrices.get(f"{name}.weight")) is not None:
            return Target(name, "o", (shape[0], shape[1]), group=path), ""
    for scope in (path, above) if above else (path,):
        inside = _inside(scope, path, keys, matrices, made)
        if inside:
            best = min(inside.values())
            names = [name for name, likeness in inside.items() if likeness == best]
            if len(names) > 1:
                return None, f"no output projection: {', '.join(names[:4])} could each be one"
            shape = matrices[f"{names[0]}.weight"]
            return Target(names[0], "o", (shape[0], shape[1]), group=path), ""
    return None, "no output projection was found beside or above it"


def _made(keys: Mapping[str, str], matrices: Shapes, widths: Mapping[Part, tuple[int, int]]) -> set[int]:
    """How many columns the output projection may have: as many as q or v has rows; of a fused matrix whatever may be v."""
    if widths:
        return {shape[0] for part, shape in widths.items() if part in ("q", "v")}
    made = {matrices[key][0] for roles, key in keys.items() if len(roles) == 1}
    for roles, key in keys.items():
        if len(roles) > 1:
            height, width = matrices[key]
            made |= {height // len(roles), width} | ({height // 2, 2 * height // 3} if "v" in roles else set())
    return made


def _inside(scope: str, path: str, keys: Mapping[str, str], matrices: Shapes, made: set[int]) -> dict[str, int]:
    """Matrices below `scope` that read what the attention makes, with the likeness of their names."""
    start = f"{scope}." if scope else ""
    found = {}
    for key, shape in matrices.items():
        if not key.startswith(start) or key in keys.values() or not key.endswith(".weight") or shape[1] not in made:
            continue
        name = key.removesuffix(".weight")
        relative = name[len(start) :]
        if scope != path and (name.startswith(f"{path}.") or speaks_of_attention(relative.split(".")[0])):
            continue
        likeness = output_likeness(relative, strict=scope != path)
        if likeness is not None:
            found[name] = likeness
    return found


def _unknown(matrices: Shapes, found: Mapping[str, Attention], seen: Mapping[str, Seen]) -> Iterable[Seen]:
    """Modules that are called an attention, hold matrices, and have no names of q, k and v."""
    known = [*found, *seen]
    paths: dict[str, list[str]] = {}
    for key in matrices:
        pieces = key.split(".")[:-1]
        places = [i for i, piece in enumerate(pieces) if speaks_of_attention(piece)]
        if places:
            paths.setdefault(".".join(pieces[: places[-1] + 1]), []).append(".".join(pieces[places[-1] + 1 :]))
    for path, leaves in paths.items():
        if not any(p == path or p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in known):
            yield Seen(
                path, "left out", why=f"no q, k and v that could be identified among {', '.join(sorted(leaves)[:6]) or 'its tensors'}"
            )


def _shared(tied: Mapping[str, str], found: Mapping[str, Attention]) -> Iterable[Seen]:
    """Attentions whose weights are those of another one: a module that stands in two places has one set of factors."""
    for copy, original in tied.items():
        path, _, roles = split_name(copy.removesuffix(".weight").removesuffix(".in_proj_weight"))
        owner = split_name(original.removesuffix(".weight").removesuffix(".in_proj_weight"))[0]
        if (roles or copy.endswith("in_proj_weight")) and path not in found and owner in found:
            yield Seen(path, "left out", why=f"its weights are those of {owner}, which has their factor pairs")


def _in_head(path: str) -> bool:
    """A head has no numbered blocks below it."""
    pieces = path.split(".")
    return pieces[0] in HEADS or any(p in HEADS and not any(q.isdigit() for q in pieces[i:]) for i, p in enumerate(pieces))


def _counting(kept: list[Attention], tower: Tower, seen: dict[str, Seen]) -> list[Attention]:
    """Without decoders, momentum copies, teachers and the other tower, as long as something else is there."""
    image = [a for a in kept if _in_image_tower(a.path)]
    text = [a for a in kept if not _in_image_tower(a.path)]
    if tower == "both":
        main = [*_without_auxiliary(image), *_without_auxiliary(text)]
    elif tower == "text" and image and text:
        main = _without_auxiliary(text)
        _leave_out(seen, image, main, "the image tower; --tower vision or both takes it")
    else:
        main = _without_auxiliary(kept)
        images = [a for a in main if _in_image_tower(a.path)]
        if images:
            _leave_out(seen, main, images, "not in the image tower; --tower text or both takes it")
            main = images
    _leave_out(seen, kept, main, "a decoder, momentum copy or teacher beside other blocks")
    return main


def _without_auxiliary(attentions: list[Attention]) -> list[Attention]:
    return [a for a in attentions if not is_auxiliary(a.path)] or attentions


def _in_image_tower(path: str) -> bool:
    pieces = path.split(".")
    return any(
        p in _IMAGE_TOWERS or (_IMAGE_WORDS.match(p) is not None and any(q.isdigit() for q in pieces[i + 1 :]))
        for i, p in enumerate(pieces)
    )


def _leave_out(seen: dict[str, Seen], before: Iterable[Attention], after: Iterable[Attention], why: str) -> None:
    stay = {a.path for a in after}
    for attention in before:
        note = seen[attention.path]
        if attention.path not in stay and note.outcome != "left out":
            seen[attention.path] = Seen(attention.path, "left out", why=why)
