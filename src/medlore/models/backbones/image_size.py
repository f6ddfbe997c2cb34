"""The input size of a 2D backbone: reading it, and building the same network for another one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medlore.errors import InputError
from medlore.models.backbones.families import Family

_BIASES = "relative_position_bias_table"
_CLASS_ROWS = 3  # from the class token to a patch, from a patch to it, and from it to itself


def vision_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the image network (CLIP nests it)."""
    return getattr(config, "vision_config", config)


def image_size_of(model: Any) -> int:
    """Side of the input, pixels; 224 for networks that take any size and name none (ResNet)."""
    size = getattr(vision_config(model.config), "image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def with_image_size(model: Any, image_size: int, family: Family) -> Any:
    """The same network for another input size: built anew, with tables of positions that are resampled once.

    Raises:
        InputError: the size is no multiple of the patch size, or too small for the network.
    """
    config = type(model.config)(**model.config.to_dict())
    vision_config(config).image_size = image_size
    if family.any_size:
        model.config = config
        return model
    patch = int(getattr(vision_config(config), "patch_size", 1))
    if image_size < patch or (family.whole_patches and image_size % patch):
        fix = f"use {max(1, round(image_size / patch)) * patch}"
        raise InputError("image_size", f"got {image_size}", f"a multiple of the patch size {patch}", fix)
    resized = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}

    def fitted(name: str, tensor: Tensor) -> Tensor:
        if name.endswith(("position_embeddings", "position_embedding.weight")):
            return resize_positions(tensor, (image_size // patch) ** 2, prefix=family.prefix_tokens)
        if name.endswith(_BIASES) and tensor.shape != shapes[name]:
            return resize_biases(tensor, shapes[name][0])
        return tensor

    weights = {name: fitted(name, tensor) for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    resized.load_state_dict(weights)
    return resized


def resize_positions(table: Tensor, patches: int, *, prefix: int = 1) -> Tensor:
    """Resample learned position embeddings to another square grid: bicubic, with antialiasing when the grid shrinks.

    Args:
        table: (n, d) or (1, n, d).
        patches: number of patches of the new grid, a square number.
        prefix: so many first rows belong to the class token and its like; they are passed through untouched.

    Returns:
        A table of the same form with `prefix` and `patches` rows.

    Examples:
        >>> resize_positions(torch.ones(1, 5, 8), 16).shape
        torch.Size([1, 17, 8])

    Source: Dosovitskiy et al., ICLR 2021, section 3.2 (2D interpolation); the filter is ours, as in timm.
    """
    rows = table.reshape(-1, table.shape[-1]).float()
    first, grid = rows[:prefix], rows[prefix:]
    old, new = math.isqrt(grid.shape[0]), math.isqrt(patches)
    if old != new:
        image = grid.T.reshape(1, -1, old, old)  # 1 d g g
        image = torch.nn.functional.interpolate(image, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        grid = image.reshape(rows.shape[1], -1).T
    return torch.cat([first, grid]).reshape(*table.shape[:-2], -1, table.shape[-1]).to(table.dtype)


def resize_biases(table: Tensor, rows: int) -> Tensor:
    """Resample BEiT's table of relative positions: (2g - 1)^2 distances and three rows of the class token, by heads.

    Args:
        table: distances and last three rows, heads.
        rows: of the table for the new grid.
    """
    return torch.cat([resize_positions(table[:-_CLASS_ROWS], rows - _CLASS_ROWS, prefix=0), table[-_CLASS_ROWS:]])


def check_image_size(model: Any, family: Family) -> None:
    """Refuse an input below the smallest that the network can take.

    Raises:
        InputError: the input is too small.
    """
    config = vision_config(model.config)
    smallest, whole = (1, 1) if family.smallest is None else family.smallest(config)
    if image_size_of(model) < smallest:
        raise InputError("image_size", f"got {image_size_of(model)}", f"at least {whole} for this {family.caption}", f"use {whole}")
