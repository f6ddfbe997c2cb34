"""Where a head reads a network of tokens: behind which block, and the class token, the mean of the patches, or both.

The last block of a pre-trained network is often not the one whose features suit another task, and which reading suits is a matter of how
it was trained. A cut network ends behind the chosen block; its own last norm stays in front of the head.

Sources: Oquab et al., "DINOv2", 2023, section 7.1 (both readings side by side, intermediate blocks through the last norm);
Bolya et al., "Perception Encoder", 2025 (the best features are not at the end of the network).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from medlore.errors import InputError
from medlore.layers.surgery import blocks_of
from medlore.models.backbones.families import FAMILIES

if TYPE_CHECKING:
    from medlore.models.backbones.reading import Backbone

Reading = Literal["cls", "mean", "both"]
READINGS: tuple[Reading, ...] = ("cls", "mean", "both")


@dataclass(frozen=True, order=True)
class Cut:
    """Where the head reads.

    Attributes:
        block: blocks that are kept, from 1.
        reading: `cls`, `mean` (of the patches) or `both`, one beside the other.
    """

    block: int
    reading: Reading

    def __str__(self) -> str:
        words = {"cls": "the class token", "mean": "the mean of the patches", "both": "the class token and the mean of the patches"}
        return f"{words[self.reading]} behind block {self.block}"


def own_cut(backbone: Backbone) -> Cut | None:
    """Where the head of a backbone reads as it is; None for networks that cannot be read otherwise (Swin, CLIP, ResNet and others)."""
    reads = FAMILIES[backbone.family].reads
    return None if reads is None else Cut(len(blocks_of(backbone.model)), reads)


@torch.inference_mode()
def block_features(backbone: Backbone, pixels: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Features behind several blocks, in one pass.

    Args:
        backbone: one with an `own_cut`.
        pixels: (b, 3, s, s) normalised, on the device of the network.
        blocks: numbers from 1.

    Returns:
        (b, len(blocks), 2 d) float32 on the CPU: class token, then mean of the patches, both behind the network's last norm.
    """
    names, norm = blocks_of(backbone.model), _last_norm(backbone.model)
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [backbone.model.get_submodule(names[number - 1]).register_forward_hook(keep(number)) for number in blocks]
    try:
        backbone.model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()
    first = _prefix(backbone)
    rows = [norm(seen[number]) for number in blocks]
    return torch.stack([torch.cat([t[:, 0], t[:, first:].mean(1)], dim=1).float() for t in rows], dim=1).cpu()


def read_as(features: Tensor, reading: Reading) -> Tensor:
    """The part of `block_features` (..., 2 d) that a reading takes: (..., d), or all of it."""
    half = features.shape[-1] // 2
    return {"cls": features[..., :half], "mean": features[..., half:], "both": features}[reading]


def cut_backbone(backbone: Backbone, cut: Cut, *, classes: int, seed: int = 0) -> Backbone:
    """Cut the network in place and put a fresh head where `cut` says; nothing changes where the head reads there already.

    Args:
        backbone: a network of tokens.
        cut: block and reading.
        classes: outputs of the new head.
        seed: of the new head (normal, 0.01; bias 0).

    Raises:
        InputError: the network has no such block, or cannot be read otherwise.
    """
    own = own_cut(backbone)
    if own is None:
        fix = "leave --features at auto, or take a ViT or DINOv2"
        raise InputError("features", f"{cut} of a {FAMILIES[backbone.family].caption}", "a network of tokens that can be cut", fix)
    if not 1 <= cut.block <= own.block:
        raise InputError("feature-block", f"got {cut.block}", f"1 to {own.block} for this network", "name one of its blocks")
    if cut == own:
        return backbone
    model: Any = backbone.model
    blocks = blocks_of(model)
    parent = model.get_submodule(blocks[0].rpartition(".")[0])
    del parent[cut.block :]
    model.config.num_hidden_layers = cut.block
    if own.reading == "cls" and cut.reading != "cls":
        norm = _last_norm(model)
        norm.__class__ = _ReadingNorm
        norm.reading, norm.prefix = cut.reading, _prefix(backbone)
    width = int(model.config.hidden_size) * (2 if cut.reading == "both" else 1)
    head = _PartHead(width, classes, part=("cls", "mean").index(cut.reading) if own.reading == "both" and cut.reading != "both" else None)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    model.set_submodule(backbone.head_name, head)
    return replace(backbone, notes=(*backbone.notes, f"the head reads {cut}"))


class _PartHead(nn.Linear):
    """A linear head that reads one half of what it is given: 0 the first, 1 the second, None all of it."""

    def __init__(self, width: int, classes: int, *, part: int | None) -> None:
        super().__init__(width, classes)
        self.part = part

    def forward(self, features: Tensor) -> Tensor:
        """(b, d or 2 d) -> (b, classes); cached features have the width that is read."""
        if self.part is not None and features.shape[-1] != self.in_features:
            features = features[..., self.part * self.in_features : (self.part + 1) * self.in_features]
        return super().forward(features)


class _ReadingNorm(nn.LayerNorm):
    """A last norm behind which the first token holds what the head shall read: the mean of the patches, or both."""

    reading: Reading = "mean"
    prefix: int = 1

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, n, d) -> (b, 1, d or 2 d)."""
        normed = super().forward(tokens)
        mean = normed[:, self.prefix :].mean(dim=1, keepdim=True)
        return mean if self.reading == "mean" else torch.cat([normed[:, :1], mean], dim=2)


def _last_norm(model: nn.Module) -> Any:
    """The layer norm behind the blocks."""
    blocks = blocks_of(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    behind = [name for name in names if not any(name.startswith(f"{block}.") for block in blocks)]
    return model.get_submodule(behind[-1])


def _prefix(backbone: Backbone) -> int:
    """Tokens before those of the patches."""
    return 1 + int(getattr(backbone.model.config, "num_register_tokens", 0))
