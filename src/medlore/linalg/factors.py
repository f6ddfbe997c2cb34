"""Factor pairs of a low-rank change: shapes, product, exact conversion between layouts, truncation with its error.

The forward pass, merging and every export go through :func:`delta_weight`, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medlore.errors import InputError
from medlore.linalg.matricize import Layout, as_matrix, interleave_side, matrix_shape


def factor_shapes(weight_shape: Sequence[int], rank: int, layout: Layout = "channel") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``lora_A`` and ``lora_B`` for a weight.

    With groups the weight is (out, in / groups, *kernel), and so is what the pair multiplies to: the groups share ``lora_A``.

    Args:
        weight_shape: (out, in / groups, *kernel), or (out, in).
        rank: inner size, from 1.
        layout: "channel" or "interleaved".

    Returns:
        The two shapes. Channel: (rank, in / groups, *kernel) and (out, rank, 1, ...). Interleaved, with k the first kernel side:
        (rank * k, in / groups * prod(kernel) / k) and (out * k, rank * k).

    Examples:
        >>> factor_shapes((32, 16, 3, 3), 4)
        ((4, 16, 3, 3), (32, 4, 1, 1))
        >>> factor_shapes((32, 16, 3, 3, 3), 4, "interleaved")
        ((12, 144), (96, 12))

    Source: channel: Hu et al. 2021 (LoRA) with PEFT's convolution form; interleaved: LoRKD (CVPR 2024) and loralib.
    """
    out, columns = matrix_shape(weight_shape)
    if layout == "channel":
        return (rank, *weight_shape[1:]), (out, rank, *([1] * (len(weight_shape) - 2)))
    k = interleave_side(weight_shape)
    return (rank * k, columns // k), (out * k, rank * k)


def delta_weight(
    lora_A: Tensor, lora_B: Tensor, *, weight_shape: Sequence[int], layout: Layout = "channel", scaling: float = 1.0
) -> Tensor:
    """The change of the weight that a factor pair stands for.

    16-bit factors are multiplied in 32 bits and stay there, so that one rounding happens, at the sum with the base weight.

    Args:
        lora_A: as in :func:`factor_shapes`.
        lora_B: as in :func:`factor_shapes`.
        weight_shape: (out, in / groups, *kernel), or (out, in).
        layout: how the pair is to be read.
        scaling: alpha / rank.

    Returns:
        A tensor of `weight_shape`, in float32 or float64.

    Raises:
        InputError: the factors do not multiply to that weight.

    Examples:
        >>> import torch
        >>> A, B = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
        >>> tuple(delta_weight(A, B, weight_shape=(8, 4, 3, 3), scaling=0.5).shape)
        (8, 4, 3, 3)

    Source: LoRA eq. 3 (channel); LoRKD, "efficient knowledge separation" (interleaved: the product's memory read as the kernel).
    """
    left, right = factor_matrices(lora_A, lora_B, layout=layout)
    if left.shape[1] != right.shape[0] or left.shape[0] * right.shape[1] != math.prod(weight_shape):
        raise InputError(
            "lora_A, lora_B",
            f"shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}",
            f"factors of a {layout} weight of shape {tuple(weight_shape)}",
            "use the shapes from factor_shapes",
        )
    # an autocast region would round the product to 16 bits
    with torch.autocast(left.device.type, enabled=False):
        product = widened(left) @ widened(right)
    return (product if scaling == 1.0 else product * scaling).view(tuple(weight_shape))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least 32 bits."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def factor_matrices(lora_A: Tensor, lora_B: Tensor, *, layout: Layout) -> tuple[Tensor, Tensor]:
    """The two matrices (B, A) whose product's memory is the weight change."""
    if layout == "channel":
        return lora_B.reshape(lora_B.shape[0], -1), as_matrix(lora_A)
    return lora_B, lora_A


def channel_factors(lora_A: Tensor, lora_B: Tensor, *, weight_shape: Sequence[int], layout: Layout) -> tuple[Tensor, Tensor]:
    """The same change as a pair in the channel layout, by rearranging alone (no arithmetic, differentiable).

    Interleaved: row c of the weight matrix is rows c*k ... c*k+k-1 of ``B @ A`` one after the other. So the matrix is
    ``[B_0 ... B_{k-1}] @ blockdiag(A, ..., A)``, with B_j the rows c*k+j of B: a channel pair of rank ``rank * k**2``.

    Args:
        lora_A: as in :func:`factor_shapes`.
        lora_B: as in :func:`factor_shapes`.
        weight_shape: (out, in / groups, *kernel), or (out, in).
        layout: the layout of the pair that is given.

    Returns:
        ``lora_A`` (R, in / groups, *kernel) and ``lora_B`` (out, R, 1, ...).

    Source: ours.
    """
    out, columns = matrix_shape(weight_shape)
    ones = [1] * (len(weight_shape) - 2)
    if layout == "channel":
        return lora_A, lora_B
    k = interleave_side(weight_shape)
    inner, width = lora_A.shape  # rank * k, columns / k
    blocks = lora_A.new_zeros(k, inner, k, width)
    index = torch.arange(k, device=lora_A.device)
    blocks[index, :, index] = lora_A.expand(k, inner, width)
    return blocks.view(k * inner, *weight_shape[1:]) if columns else blocks, lora_B.reshape(out, k * inner, *ones)


def truncate(lora_A: Tensor, lora_B: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """The best channel pair of at most `rank`, and how far it is from the given one.

    Costs two thin QR factorisations and the SVD of a small square: the product itself is never formed.

    Args:
        lora_A: (R, in / groups, *kernel), channel layout.
        lora_B: (out, R, 1, ...), channel layout.
        rank: largest rank of the result, from 1; None keeps the numerical rank, which is exact to rounding.

    Returns:
        ``lora_A``, ``lora_B`` (in the dtype given, computed in float64) and the Frobenius norm of the difference of the products.

    Raises:
        InputError: the rank is below 1.

    Examples:
        >>> import torch
        >>> A, B, error = truncate(torch.ones(3, 4), torch.ones(5, 3))
        >>> tuple(A.shape), tuple(B.shape), error < 1e-9
        ((1, 4), (5, 1), True)

    Source: Eckart-Young-Mirsky, on R_B R_A' of two QR factorisations.
    """
    if rank is not None and rank < 1:
        raise InputError("rank", f"got {rank}", "a whole number from 1", "give --rank 1 or more, or none for the exact conversion")
    left, right = (m.detach().double() for m in factor_matrices(lora_A, lora_B, layout="channel"))
    Q_left, R_left = torch.linalg.qr(left)  # out m, m R
    Q_right, R_right = torch.linalg.qr(right.mT)  # in n, n R
    U, values, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    noise = float(values[0]) * max(left.shape[0], right.shape[1]) * torch.finfo(torch.float64).eps if values.numel() else 0.0
    kept = max(1, int((values > noise).sum()))
    kept = kept if rank is None else min(rank, kept)
    root = values[:kept].sqrt()  # shared between the two, so that neither overflows in 16 bits
    new_B = Q_left @ (U[:, :kept] * root)
    new_A = (root[:, None] * Vh[:kept]) @ Q_right.mT
    error = float(values[kept:].square().sum().sqrt())
    shape_A, shape_B = (kept, *lora_A.shape[1:]), (lora_B.shape[0], kept, *lora_B.shape[2:])
    return new_A.to(lora_A.dtype).view(shape_A), new_B.to(lora_B.dtype).view(shape_B), error


def converted(
    lora_A: Tensor, lora_B: Tensor, *, weight_shape: Sequence[int], layout: Layout, rank: int | None = None
) -> tuple[Tensor, Tensor, float]:
    """A pair of any layout as a channel pair of the smallest rank that holds it.

    Args:
        lora_A: as in :func:`factor_shapes`.
        lora_B: as in :func:`factor_shapes`.
        weight_shape: (out, in / groups, *kernel), or (out, in).
        layout: the layout of the pair that is given.
        rank: an upper bound for the rank; the conversion is exact to rounding without one.

    Returns:
        ``lora_A``, ``lora_B`` in the channel layout of rank <= min(rank * k**2, rows, columns of the weight), and the Frobenius error.

    Source: ours.
    """
    wide_A, wide_B = channel_factors(lora_A.detach(), lora_B.detach(), weight_shape=weight_shape, layout=layout)
    if layout == "channel" and (rank is None or rank >= lora_A.shape[0]):
        return wide_A, wide_B, 0.0
    return truncate(wide_A, wide_B, rank=rank)
