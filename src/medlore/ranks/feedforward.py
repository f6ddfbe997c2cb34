"""The MLP of an attention's block, and the stacked weights of experts: by their usual names, else by their shapes.

An MLP has a matrix that widens (hidden x width, or twice hidden where a gate is fused into it) and one that leads back
(width x hidden). Whatever else the block holds (routers, adapters, norms) has no such partner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medlore.ranks.places import Attention, Seen, Shapes, Target, natural_key
from medlore.ranks.roles import roles_of, words_of

MLP = (
    "mlp.fc1", "mlp.fc2", "mlp.fc1_g", "mlp.fc1_x", "mlp.w12", "mlp.w3", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "mlp.weights_in", "mlp.weights_out", "mlp.c_fc", "mlp.c_proj", "mlp.linear1", "mlp.linear2", "mlp.linear_1", "mlp.linear_2",
    "mlp.0", "mlp.3", "ffn.layers.0.0", "ffn.layers.1", "intermediate.dense", "output.dense", "linear1", "linear2",
    "MlpBlock_3.Dense_0", "MlpBlock_3.Dense_1",
)  # fmt: skip
_OTHER = frozenset({
    "router", "gate_logits", "head", "classifier", "pooler", "adapter", "lora", "embed", "embeddings", "embedding", "norm",
    "table", "bias",
})  # fmt: skip
_MOST_ATTENTIONS_OF_A_BLOCK = 3  # of itself, of an encoder, of an image


@dataclass(frozen=True)
class _Network:
    shapes: Shapes
    matrices: Shapes
    attentions: Sequence[Attention]
    own: frozenset[str]  # tensors of all attentions


def feedforward_of(attentions: Sequence[Attention], shapes: Shapes, matrices: Shapes) -> tuple[dict[str, list[Target]], list[Seen]]:
    """Path of an attention -> the matrices of its block's MLP, each given to the first attention of the block; and what was seen."""
    own = frozenset(t.key for a in attentions for t in a.parts.values())
    network = _Network(shapes, matrices, attentions, own)
    found: dict[str, list[Target]] = {}
    seen: list[Seen] = []
    taken = set(own)
    for attention in attentions:
        targets = _in_block(attention, network, taken)
        found[attention.path] = [t for t in targets if t.key not in taken]
        taken |= {t.key for t in targets}
        if targets:
            seen.append(Seen(attention.path, "taken", " ".join(_short(t, attention) for t in found[attention.path]), kind="mlp"))
        elif not _shares_a_block(attention, found, network):
            why = "no MLP was found in its block: no pair of matrices that widens and leads back"
            seen.append(Seen(attention.path, "left out", why=why, kind="mlp"))
    return found, seen


def depth_in_mlp(name: str) -> int:
    """Place of a matrix within its MLP."""
    return next((i for i, leaf in enumerate(MLP) if name.endswith("." + leaf)), 0)


def is_expert_stack(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the matrices of all experts of a mixture, one on the other (expert, rows, columns).

    Examples:
        >>> is_expert_stack("layers.0.mlp.experts.gate_up_proj", (8, 64, 32))
        True
    """
    return len(shape) == 3 and "experts" in key.split(".")[:-1] and not key.endswith(("bias", "scale", "scale_inv"))


def stack_target(key: str, shape: tuple[int, ...], group: str = "") -> Target:
    """The target of such a tensor: one rank for all its experts, as PEFT has it."""
    return Target(key, "mlp", (shape[1], shape[2]), tensor="", group=group, experts=shape[0])


def _in_block(attention: Attention, network: _Network, taken: set[str]) -> list[Target]:
    """What the smallest part of the network around the attention holds: usual names first, then whatever has the shapes."""
    block, others = attention.path, tuple[str, ...]()
    while block:
        block = block.rpartition(".")[0]
        start = f"{block}." if block else ""
        others += _other_blocks(start, attention, network)
        found = _named(start, attention, network.matrices, taken)
        if not found:
            if sum(a.path.startswith(start) for a in network.attentions) > _MOST_ATTENTIONS_OF_A_BLOCK:
                return []
            found = sorted(_pairs(start, attention, network, taken, others), key=lambda t: natural_key(t.name))
        if found := found + _stacks(start, attention, network, taken, others):
            return found
    return []


def _named(start: str, attention: Attention, matrices: Shapes, taken: set[str]) -> list[Target]:
    here = [start + leaf for leaf in MLP if f"{start}{leaf}.weight" in matrices and f"{start}{leaf}.weight" not in taken]
    return [Target(n, "mlp", (matrices[f"{n}.weight"][0], matrices[f"{n}.weight"][1]), group=attention.path) for n in here]


def _pairs(start: str, attention: Attention, network: _Network, taken: set[str], others: tuple[str, ...]) -> list[Target]:
    """Linear layers below `start` that are one of a pair: up (h or 2h, width), down (width, h)."""
    width = attention.parts["q"].shape[1]
    here = {
        key: shape
        for key, shape in network.matrices.items()
        if key.startswith(start)
        and key.endswith(".weight")
        and key not in taken
        and _may_be_mlp(key[len(start) :])
        and not key.startswith(others)
    }
    up = {shape[0] for shape in here.values() if shape[1] == width}
    down = {shape[1] for shape in here.values() if shape[0] == width}
    hidden = {h for h in down if h in up or 2 * h in up}

    def of_a_pair(height: int, columns: int) -> bool:
        return (height == width and columns in hidden) or (columns == width and (height in hidden or height / 2 in hidden))

    fitting = {key.removesuffix(".weight"): shape for key, shape in here.items() if of_a_pair(*shape)}
    return [Target(n, "mlp", (s[0], s[1]), group=attention.path) for n, s in fitting.items()] if len(fitting) > 1 else []


def _stacks(start: str, attention: Attention, network: _Network, taken: set[str], others: tuple[str, ...]) -> list[Target]:
    mine = {k: s for k, s in network.shapes.items() if k.startswith(start) and k not in taken and not k.startswith(others)}
    free = ((k, s) for k, s in mine.items() if is_expert_stack(k, s))
    return sorted((stack_target(k, s, attention.path) for k, s in free), key=lambda t: natural_key(t.name))


def _may_be_mlp(relative: str) -> bool:
    pieces = relative.split(".")[:-1]
    return not any(roles_of(piece) or set(words_of(piece)) & _OTHER for piece in pieces)


def _other_blocks(start: str, attention: Attention, network: _Network) -> tuple[str, ...]:
    """Children of a part of the network that hold another attention: what lies in them is that attention's."""
    paths = [a.path for a in network.attentions if a.path.startswith(start)]
    children = {f"{start}{path[len(start) :].split('.')[0]}." for path in paths}
    return tuple(child for child in children if not f"{attention.path}.".startswith(child))


def _shares_a_block(attention: Attention, found: Mapping[str, Iterable[Target]], network: _Network) -> bool:
    """Whether the MLP of another attention lies beside both, as in a block with self and cross attention."""
    block, others = attention.path, tuple[str, ...]()
    while block:
        block = block.rpartition(".")[0]
        start = f"{block}." if block else ""
        inside = [a.path for a in network.attentions if a.path.startswith(start)]
        if len(inside) > _MOST_ATTENTIONS_OF_A_BLOCK:
            return False
        others += _other_blocks(start, attention, network)
        if any(t.name.startswith(start) and not t.name.startswith(others) for path in inside for t in found.get(path, ())):
            return True
    return False


def _short(target: Target, attention: Attention) -> str:
    """Its name without what it shares with the attention's."""
    ours, theirs = target.name.split("."), attention.path.split(".")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    return ".".join(ours[same:])
