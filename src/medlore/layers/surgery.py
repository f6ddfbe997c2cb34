"""Choosing what trains: freezing, the last blocks, biases; and reading a head's input without the head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from medlore.errors import InputError, TargetError


def freeze(model: nn.Module) -> None:
    """No parameter of `model` trains any more."""
    model.requires_grad_(False)


def thaw_head(model: nn.Module, head: str) -> None:
    """The parameters of the module `head` train."""
    model.get_submodule(head).requires_grad_(True)


def thaw_biases(model: nn.Module) -> None:
    """Every parameter whose name ends in `bias` trains (BitFit).

    Raises:
        TargetError: the model has none.

    Source: Ben Zaken et al., "BitFit", ACL 2022.
    """
    biases = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
    if not biases:
        raise TargetError("bitfit", "a model without biases", "a model with biases", "use another method")
    for parameter in biases:
        parameter.requires_grad_(True)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks in depth order: members of a ModuleList that hold no longer ModuleList themselves.

    Works for ViT, DINOv2, CLIP (layers), Swin, ConvNeXt (blocks of all stages) and ResNet (stages), whatever they are called. A list
    of single layers (the norm and the convolution between two stages) is no list of blocks where there are larger ones.

    Examples:
        >>> blocks_of(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
        ['layers.0', 'layers.1']
    """
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for index, member in enumerate(module):
            if not any(isinstance(inner, nn.ModuleList) and len(inner) for inner in member.modules()):
                names.append(f"{name}.{index}" if name else str(index))
    composed = [name for name in names if any(True for _ in model.get_submodule(name).children())]
    return composed or names


def thaw_last_blocks(model: nn.Module, count: int) -> list[str]:
    """The last `count` blocks train, and whatever norm stands behind them; their names are returned.

    Raises:
        InputError: fewer blocks than `count`, or a count below 1.
    """
    blocks = blocks_of(model)
    if not 1 <= count <= len(blocks):
        raise InputError("last_blocks", f"got {count}", f"1 to {len(blocks)} for this model", "give the number of blocks to train")
    chosen = blocks[-count:]
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    last = max(i for i, name in enumerate(names) if name.startswith(blocks[-1] + "."))
    for name in names[last + 1 :]:
        model.get_parameter(name).requires_grad_(True)
    return chosen


def freeze_unused(model: nn.Module, sample: Tensor) -> list[str]:
    """Freeze what no gradient reaches (a mask token, a norm that the head goes around), so that counts are true.

    Args:
        model: called with `pixel_values`, answers with `.logits`.
        sample: (b, c, h, w) one small batch; its values do not matter.
    """
    training = model.training
    model.eval()
    model(pixel_values=sample).logits.sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad(set_to_none=True)
    model.train(training)
    return unused


@contextlib.contextmanager
def without_head(model: nn.Module, head: str) -> Iterator[nn.Module]:
    """Inside the block the model's logits are the input of its head; afterwards the head is back."""
    kept = model.get_submodule(head)
    model.set_submodule(head, nn.Identity())
    try:
        yield model
    finally:
        model.set_submodule(head, kept)


def set_training(model: nn.Module) -> None:
    """Training mode, except for normalisation layers whose parameters are frozen: their statistics stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.eval()


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: trainable parameters, and running statistics beside them."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters(recurse=False)):
            state |= {f"{name}.{key}": buffer for key, buffer in module.named_buffers(recurse=False)}
    return state


def load_trainable_state(model: nn.Module, state: dict[str, Tensor], *, expected: Iterable[str] | None = None) -> None:
    """Put tensors of `trainable_state` back, in place.

    Args:
        model: the model they were trained in.
        state: names -> tensors.
        expected: names that must be there; None for all that train in `model` now.

    Raises:
        TargetError: names or shapes that the model does not have, or expected tensors that `state` lacks; all are listed.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = trainable_state(model) if expected is None else expected
    faults = [f"{name}: missing" for name in wanted if name not in state]
    faults += [f"{name}: not in the model" for name in state if name not in own]
    faults += [
        f"{name}: {tuple(t.shape)} stored, {tuple(own[name].shape)} in the model"
        for name, t in state.items()
        if name in own and own[name].shape != t.shape
    ]
    if faults:
        raise TargetError(
            "trained weights", f"{len(faults)} do not fit", "the model they were trained in", "name that model", faults=faults
        )
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
