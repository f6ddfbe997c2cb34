"""A weight of any layer as a matrix, and back.

Every low-rank statement of this project is about the matrix of :func:`as_matrix`: one row for each output channel, one
column for each weight that reaches it.

Two layouts of a factor pair have names:

``channel``
    ``lora_A`` is a convolution with the kernel of the layer to ``rank`` channels, ``lora_B`` a 1x1 convolution back to the
    output channels (PEFT's form). The matrix of the delta is ``B @ A``: its rank is at most ``rank``.
``interleaved``
    LoRKD's form: ``lora_A`` is (rank * k, in * prod(other kernel sides)), ``lora_B`` is (out * k, rank * k), with k the first
    kernel side, and the *memory* of ``B @ A`` is read as the weight. Its matrix has rank up to ``rank * k**2``.

For a linear layer k is 1 and both layouts are the same matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from medlore.errors import InputError, UnknownNameError

Layout = Literal["channel", "interleaved"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def checked_layout(layout: str) -> Layout:
    """The layout of that name.

    Raises:
        UnknownNameError: no layout has that name.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    raise UnknownNameError("layout", layout, LAYOUTS)


def as_matrix(weight: Tensor) -> Tensor:
    """The weight as a matrix: a row an output channel.

    Args:
        weight: (out, in / groups, *kernel), or (out, in) of a linear layer.

    Returns:
        (out, in / groups * prod(kernel)), a view where the memory allows one.

    Raises:
        InputError: the weight has fewer than two axes (biases and norm weights are no matrices).

    Examples:
        >>> import torch
        >>> tuple(as_matrix(torch.zeros(8, 4, 3, 3)).shape)
        (8, 36)

    Source: ours (the unfolding that im2col makes).
    """
    if weight.ndim < 2:
        raise InputError("weight", f"a tensor of shape {tuple(weight.shape)}", "two or more axes", "leave biases and norm weights out")
    return weight.reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`as_matrix`.

    Args:
        matrix: (out, in / groups * prod(kernel)).
        weight_shape: (out, in / groups, *kernel).

    Returns:
        The same numbers in `weight_shape`.

    Raises:
        InputError: the matrix does not hold that weight.

    Source: ours.
    """
    rows, columns = matrix_shape(weight_shape)
    if tuple(matrix.shape) != (rows, columns):
        raise InputError(
            "matrix",
            f"shape {tuple(matrix.shape)}",
            f"({rows}, {columns}) for a weight of {tuple(weight_shape)}",
            "unfold the weight with as_matrix",
        )
    return matrix.reshape(tuple(weight_shape))


def matrix_shape(weight_shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of :func:`as_matrix` for a weight of that shape."""
    return weight_shape[0], math.prod(weight_shape[1:])


def interleave_side(weight_shape: Sequence[int]) -> int:
    """The k of the interleaved layout: the first kernel side, 1 for a linear layer."""
    return weight_shape[2] if len(weight_shape) > 2 else 1
