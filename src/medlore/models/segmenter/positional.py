"""Sines and cosines that show the query decoder where in the window an image token lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def positional_encoding(grid: tuple[int, int, int], width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Sine-cosine code of every cell of a 3D grid, float32.

    Each axis has a third of the channels, in the order h, w, d; within an axis sine and cosine alternate and the
    wavelength of pair `i` is `10000^(2 i / channels)`. The code is computed, never stored, so any grid can be asked for.

    Args:
        grid: number of cells along h, w, d.
        width: number of channels; a width that is not a multiple of 6 is cut from the next larger one.
        device: where the result lies.

    Returns:
        Tensor (h, w, d, width).

    Source: SAT's positional encoding (768 channels, 256 an axis).

    Examples:
        >>> positional_encoding((1, 1, 2), 6)[0, 0, 1, :4].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    channels = 2 * math.ceil(width / 6)
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2, device=device).float() / channels)
    codes = []
    for axis, cells in enumerate(grid):
        angles = torch.arange(cells, device=device).float()[:, None] * frequencies  # cells channels/2
        code = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # cells channels
        shape = [1, 1, 1, channels]
        shape[axis] = cells
        codes.append(code.view(shape).expand(*grid, channels))
    return torch.cat(codes, dim=-1)[..., :width]
