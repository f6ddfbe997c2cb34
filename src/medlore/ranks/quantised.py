"""Weights in 8 bits beside their scales: read as what they stand for, or refused; never as bare integers or bare fp8 numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from medlore.errors import CheckpointError

_SCALES = ("{key}_scale", "{key}_scale_inv", "{stem}.scale_weight")  # compressed-tensors, DeepSeek and transformers, ComfyUI
_BITSANDBYTES = "{stem}.SCB"  # greatest magnitude of each row; the row was divided by it and multiplied by 127
_ZERO = "{key}_zero_point"
_PACKED = (".qweight", ".weight_packed", ".weight.absmax", "_blocks")
_USUAL_BLOCK = 128
_FULL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACCEPTED = "floating-point weights, or fp8 and int8 weights with one scale, one a row, or one a block beside them"


def is_quantised(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are no weights by themselves."""
    return tensor.dtype not in _FULL


def dequantised(where: str, key: str, tensor: Tensor, names: Collection[str], read: Callable[[str], Tensor]) -> Tensor:
    """The weights that an fp8 or int8 tensor stands for, float32.

    Args:
        where: how the source is called.
        key: name of the tensor.
        tensor: its numbers.
        names: all tensors of the source.
        read: reads one of them.

    Raises:
        CheckpointError: no scale beside it, a scale that does not fit, packed or integer weights of another kind.
    """
    stem = key.removesuffix(".weight")
    place = f"{where}, tensor {key}"
    scb = _BITSANDBYTES.format(stem=stem)
    if tensor.dtype == torch.int8 and scb in names:
        return tensor.float() * _spread(place, read(scb).float() / 127, tensor)
    scale = next((n for pattern in _SCALES if (n := pattern.format(key=key, stem=stem)) in names), None)
    if scale is None:
        if tensor.dtype.is_floating_point and not any(_is_scale(n) for n in names):
            return tensor.float()  # cast to fp8 as they were: complete in themselves
        raise CheckpointError(place, f"numbers of type {tensor.dtype} without a scale", _ACCEPTED, "give the unquantised checkpoint")
    zero = _ZERO.format(key=key)
    values = tensor.float() - (_spread(place, read(zero).float(), tensor) if zero in names else 0.0)
    return values * _spread(place, read(scale).float(), tensor)


def packed_weights(names: Collection[str]) -> str | None:
    """A tensor of weights that are packed in fewer than 8 bits, if there is one: they are not read."""
    return next((name for name in names if name.endswith(_PACKED)), None)


def _is_scale(name: str) -> bool:
    return name.endswith(("weight_scale", "weight_scale_inv", "scale_weight", ".SCB"))


def _spread(place: str, scale: Tensor, weight: Tensor) -> Tensor:
    """A scale for every number: one for all, one a row, or one a block of rows and columns."""
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(place, "a scale that is not finite", _ACCEPTED, "fetch the file again, or give the unquantised checkpoint")
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and scale.shape[0] == weight.shape[0]:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if scale.ndim == weight.ndim:
        for axis, size in enumerate(weight.shape):
            scale = _repeated(place, scale, axis, size, weight)
        return scale
    raise _misfit(place, scale, weight)


def _repeated(place: str, scale: Tensor, axis: int, size: int, weight: Tensor) -> Tensor:
    blocks = scale.shape[axis]
    if blocks in (1, size):
        return scale
    block = _USUAL_BLOCK if -(-size // _USUAL_BLOCK) == blocks else size // blocks if blocks and size % blocks == 0 else 0
    if not block:
        raise _misfit(place, scale, weight)
    return scale.repeat_interleave(block, dim=axis).narrow(axis, 0, size)


def _misfit(place: str, scale: Tensor, weight: Tensor) -> CheckpointError:
    came = f"a scale of shape {tuple(scale.shape)} for weights of shape {tuple(weight.shape)}"
    return CheckpointError(place, came, _ACCEPTED, "give the unquantised checkpoint")
