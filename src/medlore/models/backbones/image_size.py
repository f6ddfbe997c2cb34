"""The input size of a 2D backbone: reading it, and building the same network for another one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medlore.errors import InputError


def vision_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the image network (CLIP nests it)."""
    return getattr(config, "vision_config", config)


def image_size_of(model: Any) -> int:
    """Side of the input, pixels; 224 for networks that take any size and name none (ResNet)."""
    size = getattr(vision_config(model.config), "image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def with_image_size(model: Any, image_size: int) -> Any:
    """The same network for another input size: built anew, with position embeddings that are resampled once.

    Raises:
        InputError: the size is no multiple of the patch size, or too small for the network.
    """
    config = type(model.config)(**model.config.to_dict())
    vision_config(config).image_size = image_size
    patch = int(getattr(vision_config(config), "patch_size", 1))
    swin = config.model_type == "swin"
    if image_size < patch or (not swin and image_size % patch):
        fix = f"take {max(1, round(image_size / patch)) * patch}"
        raise InputError("image_size", f"got {image_size}", f"a multiple of the patch size {patch}", fix)
    if config.model_type in ("resnet", "medlore-resnet", "medlore-shufflenet"):
        model.config = config
        return model
    resized = type(model)(config)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    tables = [k for k in weights if k.endswith(("position_embeddings", "position_embedding.weight"))]
    weights |= {k: resize_positions(weights[k], (image_size // patch) ** 2, class_token=not swin) for k in tables}
    resized.load_state_dict(weights)
    return resized


def resize_positions(table: Tensor, patches: int, *, class_token: bool = True) -> Tensor:
    """Resample learned position embeddings to another square grid: bicubic, with antialiasing when the grid shrinks.

    Args:
        table: (n, d) or (1, n, d); the class token's row first, if there is one. It is passed through untouched.
        patches: number of patches of the new grid, a square number.
        class_token: whether the first row belongs to the class token.

    Returns:
        A table of the same form with `patches` rows, plus one for the class token.

    Example:
        >>> resize_positions(torch.ones(1, 5, 8), 16).shape
        torch.Size([1, 17, 8])

    Source: Dosovitskiy et al., ICLR 2021, section 3.2 (2D interpolation); the filter is ours, as in timm.
    """
    rows = table.reshape(-1, table.shape[-1]).float()
    first, grid = (rows[:1], rows[1:]) if class_token else (rows[:0], rows)
    old, new = math.isqrt(grid.shape[0]), math.isqrt(patches)
    if old != new:
        image = grid.T.reshape(1, -1, old, old)  # 1 d g g
        image = torch.nn.functional.interpolate(image, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        grid = image.reshape(rows.shape[1], -1).T
    return torch.cat([first, grid]).reshape(*table.shape[:-2], -1, table.shape[-1]).to(table.dtype)


def check_image_size(model: Any) -> None:
    """A Swin's last feature map must hold one attention window, else its bias table does not fit.

    Raises:
        InputError: the input is too small.
    """
    config = model.config
    if config.model_type != "swin":
        return
    side = -(-image_size_of(model) // int(config.patch_size))
    for _ in range(len(config.depths) - 1):
        side = -(-side // 2)
    if side < config.window_size:
        smallest = config.window_size * 2 ** (len(config.depths) - 1) * int(config.patch_size)
        raise InputError("image_size", f"got {image_size_of(model)}", f"at least {smallest} for this Swin", f"take {smallest}")
