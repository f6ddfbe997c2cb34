"""The parts of a transformer's blocks, found by structure: attention, MLP and the norm before each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from medlore.errors import TargetError
from medlore.layers.surgery import blocks_of
from medlore.ranks.targets import Target, find_targets

BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class Block:
    """One block with an attention and an MLP branch, each behind its own norm.

    Attributes:
        name: module path.
        width: of its tokens.
        attention: path of the attention module.
        projections: paths of the linear layers that read the first norm (q, k, v, or one fused).
        output: path of the attention's output projection.
        mlp: path of the module that holds the MLP.
        mlp_inputs: paths of the linear layers that read the second norm.
        mlp_output: path of the MLP's last linear layer.
        norms: paths of the norms before attention and MLP.
    """

    name: str
    width: int
    attention: str
    projections: tuple[str, ...]
    output: str
    mlp: str
    mlp_inputs: tuple[str, ...]
    mlp_output: str
    norms: tuple[str, str]


def blocks_with_parts(model: nn.Module, where: str) -> list[Block]:
    """The blocks of ViT, DINOv2, CLIP's vision half, Swin and whatever is built alike, in depth order.

    Args:
        model: the network.
        where: who asks, for the error.

    Raises:
        TargetError: no such blocks, or blocks built otherwise; all are listed.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        targets = find_targets(shapes, "attention+mlp", include_k=True).targets
    except TargetError as error:
        raise _no_blocks(where, "a network without attention") from error
    found, faults = [], []
    for name in blocks_of(model):
        own = [t for t in targets if t.group.startswith(f"{name}.")]
        block = _block(model, name, own)
        if block is not None:
            found.append(block)
        elif own:
            faults.append(f"{name}: {', '.join(t.name.removeprefix(name + '.') for t in own)}")
    if faults or not found:
        raise _no_blocks(where, f"{len(faults)} blocks of another build" if faults else "a network without such blocks", faults)
    return found


def attends_in_windows(attention: nn.Module) -> bool:
    """Whether an attention has a table of position biases, as Swin's has: its windows may be filled up with zeros."""
    return any(name.rsplit(".", 1)[-1] == BIAS_TABLE for name, _ in attention.named_parameters())


def _block(model: nn.Module, name: str, targets: list[Target]) -> Block | None:
    """None where a part is missing or not where a transformer of this kind has it."""
    norms = [f"{name}.{child}" for child, m in model.get_submodule(name).named_children() if isinstance(m, nn.LayerNorm)]
    mlp = [t for t in targets if t.part == "mlp"]
    output = [t for t in targets if t.part == "o"]
    projections = dict.fromkeys(t.name for t in targets if t.part in ("q", "k", "v"))
    if len(norms) != 2 or len(mlp) < 2 or len(output) != 1 or not projections:
        return None
    parents = {t.name.rpartition(".")[0] for t in mlp}
    if len(parents) != 1 or name in parents:
        return None
    return Block(
        name=name,
        width=output[0].shape[0],
        attention=targets[0].group,
        projections=tuple(projections),
        output=output[0].name,
        mlp=parents.pop(),
        mlp_inputs=tuple(t.name for t in mlp[:-1]),
        mlp_output=mlp[-1].name,
        norms=(norms[0], norms[1]),
    )


def _no_blocks(where: str, came: str, faults: list[str] | None = None) -> TargetError:
    return TargetError(
        where,
        came,
        "blocks with two layer norms, an attention with its projections and an MLP (ViT, DINOv2, CLIP, Swin)",
        "use such a network, or another method",
        faults=faults or [],
    )
