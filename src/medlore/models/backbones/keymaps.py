"""State dicts of timm, DINOv2's own repository and mmpretrain, renamed into transformers; nothing is guessed silently.

Each naming is a list of rules from a pattern to a transformers name. A key that no rule knows is an error, so a file with an
unknown part (class-attention layers, registers, rotary positions) is refused and never loaded by half.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medlore.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Naming = Literal["timm-vit", "mmpretrain-vit", "timm-dinov2", "timm-swin", "mmpretrain-swin"]
Weights = dict[str, "Tensor"]

_PREFIXES = ("module.", "backbone.", "encoder.", "model.")
_LEAF = r"\.(weight|bias)"

# pattern -> transformers name; an empty name drops the key. `{stage}`-like groups are passed through by number.
_VIT_TIMM = [
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj" + _LEAF, r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1" + _LEAF, r"vit.layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2" + _LEAF, r"vit.layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv" + _LEAF, r"vit.layers.\1.attention.{qkv}.\2"),
    (r"blocks\.(\d+)\.attn\.proj" + _LEAF, r"vit.layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc1|fc2)" + _LEAF, r"vit.layers.\1.mlp.\2.\3"),
    (r"norm" + _LEAF, r"vit.layernorm.\1"),
    (r"(head|pre_logits|decoder|mask_token)\b.*|decoder_.*", ""),
]
_VIT_MMPRETRAIN = [
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.projection" + _LEAF, r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"layers\.(\d+)\.(?:ln1|norm1)" + _LEAF, r"vit.layers.\1.layernorm_before.\2"),
    (r"layers\.(\d+)\.(?:ln2|norm2)" + _LEAF, r"vit.layers.\1.layernorm_after.\2"),
    (r"layers\.(\d+)\.attn\.qkv" + _LEAF, r"vit.layers.\1.attention.{qkv}.\2"),
    (r"layers\.(\d+)\.attn\.proj" + _LEAF, r"vit.layers.\1.attention.o_proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0" + _LEAF, r"vit.layers.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1" + _LEAF, r"vit.layers.\1.mlp.fc2.\2"),
    (r"(?:ln1|norm1)" + _LEAF, r"vit.layernorm.\1"),
    (r"(head|neck)\b.*", ""),
]
_DINOV2_TIMM = [
    (r"cls_token", "dinov2.embeddings.cls_token"),
    (r"mask_token", "dinov2.embeddings.mask_token"),
    (r"pos_embed", "dinov2.embeddings.position_embeddings"),
    (r"patch_embed\.proj" + _LEAF, r"dinov2.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.(norm1|norm2)" + _LEAF, r"dinov2.encoder.layer.\1.\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv" + _LEAF, r"dinov2.encoder.layer.\1.attention.{qkv}.\2"),
    (r"blocks\.(\d+)\.attn\.proj" + _LEAF, r"dinov2.encoder.layer.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"dinov2.encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.(fc1|fc2)" + _LEAF, r"dinov2.encoder.layer.\1.mlp.\2.\3"),
    (r"norm" + _LEAF, r"dinov2.layernorm.\1"),
    (r"head\b.*", ""),
]
_SWIN_BLOCK = r"swin.encoder.layers.\1.blocks.\2."
_SWIN_TIMM = [
    (r"patch_embed\.proj" + _LEAF, r"swin.embeddings.patch_embeddings.projection.\1"),
    (r"patch_embed\.norm" + _LEAF, r"swin.embeddings.norm.\1"),
    (r"absolute_pos_embed", "swin.embeddings.position_embeddings"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm1" + _LEAF, _SWIN_BLOCK + r"layernorm_before.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm2" + _LEAF, _SWIN_BLOCK + r"layernorm_after.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv" + _LEAF, _SWIN_BLOCK + r"attention.{qkv}.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.proj" + _LEAF, _SWIN_BLOCK + r"attention.o_proj.\3"),
    (
        r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table",
        _SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.(fc1|fc2)" + _LEAF, _SWIN_BLOCK + r"mlp.\3.\4"),
    (r"layers\.(\d+)\.downsample\.(norm|reduction)" + _LEAF, r"swin.encoder.layers.\1.downsample.\2.\3"),
    (r"norm" + _LEAF, r"swin.layernorm.\1"),
    (r"layers\.\d+\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)", ""),  # recomputed; the index is checked
    (r"head\b.*", ""),
]
_SWIN_MMPRETRAIN = [
    (r"patch_embed\.projection" + _LEAF, r"swin.embeddings.patch_embeddings.projection.\1"),
    (r"patch_embed\.norm" + _LEAF, r"swin.embeddings.norm.\1"),
    (r"absolute_pos_embed", "swin.embeddings.position_embeddings"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm1" + _LEAF, _SWIN_BLOCK + r"layernorm_before.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm2" + _LEAF, _SWIN_BLOCK + r"layernorm_after.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.qkv" + _LEAF, _SWIN_BLOCK + r"attention.{qkv}.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.proj" + _LEAF, _SWIN_BLOCK + r"attention.o_proj.\3"),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.attn\.w_msa\.relative_position_bias_table",
        _SWIN_BLOCK + "attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.0\.0" + _LEAF, _SWIN_BLOCK + r"mlp.fc1.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.ffn\.layers\.1" + _LEAF, _SWIN_BLOCK + r"mlp.fc2.\3"),
    (r"stages\.(\d+)\.downsample\.(norm|reduction)" + _LEAF, r"swin.encoder.layers.\1.downsample.\2.\3"),
    (r"norm\d*" + _LEAF, r"swin.layernorm.\1"),
    (r"stages\.\d+\.blocks\.\d+\.attn\.(w_msa\.relative_position_index|attn_mask)", ""),
    (r"(head|neck)\b.*", ""),
]


@dataclass(frozen=True)
class Converted:
    """A state dict in transformers' names with the configuration that was read off its shapes.

    Attributes:
        model_type: transformers' word (`vit`, `dinov2`, `swin`).
        config: keyword arguments of that configuration class.
        weights: names of the image-classification class, without the head.
        naming: the naming that was recognised.
        notes: what was assumed or rearranged.
    """

    model_type: Literal["vit", "dinov2", "swin"]
    config: dict[str, Any]
    weights: Weights
    naming: Naming
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path) -> Weights:
    """The tensors of a `.safetensors`, `.pth`, `.pt` or `.bin` file, unwrapped and without common prefixes.

    Raises:
        InputError: no such file.
        CheckpointError: the file is truncated, holds anything but tensors, or needs unsafe loading.
    """
    from medlore.weightfiles import read_tensors

    return _strip_prefixes(read_tensors(path))


def convert_state_dict(weights: Weights, *, where: str, heads: int | None = None) -> Converted:
    """Rename a timm, DINOv2 or mmpretrain state dict into transformers and read its configuration off its shapes.

    Args:
        weights: names -> tensors.
        where: file name for messages.
        heads: attention heads of a ViT, which no tensor shows; by default width / 64, as in every published ViT-Ti to ViT-L.

    Raises:
        CheckpointError: the naming is unknown, some keys belong to an architecture that is not supported, or a part is missing.
    """
    naming = _recognise(weights, where)
    build = _BUILDERS[naming]
    try:
        return build(naming, weights, where, heads)
    except KeyError as missing:
        came = f"{len(weights)} tensors in the naming of {naming} without {missing.args[0]!r}"
        raise CheckpointError(where, came, "a whole state dict", "use the whole file, not a part of the network") from missing


def _recognise(weights: Weights, where: str) -> Naming:
    signs: list[tuple[str, Naming]] = [
        ("stages.0.blocks.0.attn.w_msa.qkv.weight", "mmpretrain-swin"),
        ("layers.0.blocks.0.attn.qkv.weight", "timm-swin"),
        ("blocks.0.ls1.gamma", "timm-dinov2"),
        ("blocks.0.attn.qkv.weight", "timm-vit"),
        ("layers.0.attn.qkv.weight", "mmpretrain-vit"),
    ]
    for sign, naming in signs:
        if sign in weights:
            return naming
    if any(".resblocks." in key for key in weights):
        raise CheckpointError(
            where,
            "the naming of open_clip",
            "a ViT or Swin state dict of timm, DINOv2 or mmpretrain, or a transformers folder",
            "give the transformers folder of this CLIP (`medlore ranks` reads this file as it is)",
        )
    some = ", ".join(list(weights)[:3])
    raise CheckpointError(
        where,
        f"{len(weights)} tensors of an unknown naming ({some}, ...)",
        "a ViT or Swin state dict of timm, DINOv2 or mmpretrain, or a transformers folder",
        "give the transformers folder of this model, with its config.json",
    )


def _rename(rules: Sequence[tuple[str, str]], weights: Weights, where: str) -> Weights:
    renamed: Weights = {}
    unknown = []
    for key, tensor in weights.items():
        for pattern, name in rules:
            match = re.fullmatch(pattern, key)
            if match:
                _put(renamed, match.expand(name) if name else "", tensor)
                break
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            where,
            f"{len(unknown)} of {len(weights)} keys have no place in the transformers model",
            "a plain ViT, DINOv2 or Swin (no registers, no average-pool norm, no query/key norm, no Swin V2)",
            "give the transformers folder of this model, with its config.json",
            faults=unknown,
        )
    return renamed


def _put(renamed: Weights, name: str, tensor: Tensor) -> None:
    if not name:
        return
    if "{qkv}" not in name:
        renamed[name] = tensor
        return
    for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3, dim=0), strict=True):
        renamed[name.replace("{qkv}", part)] = piece.contiguous()


def _build_vit(naming: Naming, weights: Weights, where: str, heads: int | None) -> Converted:
    kind: Literal["vit", "dinov2"] = "dinov2" if naming == "timm-dinov2" else "vit"
    rules = {"timm-vit": _VIT_TIMM, "mmpretrain-vit": _VIT_MMPRETRAIN, "timm-dinov2": _DINOV2_TIMM}[naming]
    renamed = _rename(rules, weights, where)
    patch = renamed[f"{kind}.embeddings.patch_embeddings.projection.weight"]  # d 3 p p
    width, patch_size = patch.shape[0], patch.shape[-1]
    positions = _class_position_first(renamed, kind, width, where)
    block = "dinov2.encoder.layer.{}." if kind == "dinov2" else "vit.layers.{}."
    inner = renamed[block.format(0) + "mlp.fc1.weight"].shape[0]
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": _count(renamed, block.split("{", maxsplit=1)[0]),
        "num_attention_heads": heads or _heads_of(width, where),
        "image_size": math.isqrt(positions - 1) * patch_size,
        "patch_size": patch_size,
        "num_channels": patch.shape[1],
        "qkv_bias": block.format(0) + "attention.q_proj.bias" in renamed,
        "layer_norm_eps": 1e-6,
    }
    if kind == "dinov2":
        config["mlp_ratio"] = inner // width
        renamed.setdefault("dinov2.embeddings.mask_token", patch.new_zeros(1, width))
    else:
        config["intermediate_size"] = inner
    assumed = () if heads else (f"{config['num_attention_heads']} attention heads assumed from the width {width}",)
    return Converted(kind, config, renamed, naming, assumed)


def _class_position_first(renamed: Weights, kind: str, width: int, where: str) -> int:
    """Number of positions, class token included; DINOv2-style timm files leave the class token's position out: it gets zeros."""
    import torch

    key = f"{kind}.embeddings.position_embeddings"
    table = renamed.get(key)
    if table is None or f"{kind}.embeddings.cls_token" not in renamed:
        raise CheckpointError(
            where, "no `cls_token` or no `pos_embed`", "a ViT with a class token and learned positions", "use another checkpoint"
        )
    count = table.shape[1]
    if math.isqrt(count) ** 2 == count:  # positions of the patches only
        renamed[key] = torch.cat([table.new_zeros(1, 1, width), table], dim=1)
        return count + 1
    if math.isqrt(count - 1) ** 2 != count - 1:
        raise CheckpointError(where, f"{count} positions", "a square grid of patches and one class token", "use another checkpoint")
    return count


def _heads_of(width: int, where: str) -> int:
    if width % 64:
        raise CheckpointError(
            where,
            f"width {width}, whose number of attention heads cannot be inferred",
            "a width that is a multiple of 64",
            "give the number of heads",
        )
    return width // 64


def _build_swin(naming: Naming, weights: Weights, where: str, heads: int | None) -> Converted:
    del heads  # the bias tables show them
    timm = naming == "timm-swin"
    notes: list[str] = []
    source = _downsample_at_the_end(weights) if timm else weights
    renamed = _rename(_SWIN_TIMM if timm else _SWIN_MMPRETRAIN, source, where)
    if not timm:
        _reorder_merging(renamed)
        notes.append("patch merging: channels reordered from unfold order to slice order")
    stages = _count(renamed, "swin.encoder.layers.")
    table = "swin.encoder.layers.{}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    tables = [renamed[table.format(s)] for s in range(stages)]  # (2w-1)^2 heads
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    _check_position_index(weights, window, where)
    patch = renamed["swin.embeddings.patch_embeddings.projection.weight"]
    first = "swin.encoder.layers.0.blocks.0."
    config = {
        "embed_dim": patch.shape[0],
        "depths": [_count(renamed, f"swin.encoder.layers.{s}.blocks.") for s in range(stages)],
        "num_heads": [t.shape[1] for t in tables],
        "window_size": window,
        "image_size": window * patch.shape[-1] * 2 ** (stages - 1),
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        "mlp_ratio": renamed[first + "mlp.fc1.weight"].shape[0] / patch.shape[0],
        "qkv_bias": first + "attention.q_proj.bias" in renamed,
        "use_absolute_embeddings": "swin.embeddings.position_embeddings" in renamed,
        "layer_norm_eps": 1e-5,
    }
    return Converted("swin", config, renamed, naming, tuple(notes))


def _downsample_at_the_end(weights: Weights) -> Weights:
    """From 0.9 on timm counts a stage's patch merging to the next stage; transformers, as the original, to the one before."""
    if any(k.startswith("layers.0.downsample.") for k in weights):
        return weights

    def earlier(match: re.Match[str]) -> str:
        return f"layers.{int(match.group(1)) - 1}.downsample."

    return {re.sub(r"^layers\.(\d+)\.downsample\.", earlier, key): tensor for key, tensor in weights.items()}


def _reorder_merging(renamed: Weights) -> None:
    """Patch merging of mmpretrain: channel c, row i, column j lie at 4c + 2i + j by unfold; the original has (i + 2j)·C + c."""
    import torch

    for key in [k for k in renamed if ".downsample." in k]:
        tensor = renamed[key]
        width = tensor.shape[-1] // 4
        if tensor.ndim == 1 or key.endswith("reduction.weight"):
            order = torch.arange(4 * width).reshape(width, 2, 2).permute(2, 1, 0).reshape(-1)  # j i c
            renamed[key] = tensor[..., order].contiguous()


def _check_position_index(weights: Weights, window: int, where: str) -> None:
    """The stored index must be the one that transformers recomputes, else the bias table means something else."""
    import torch

    place = torch.arange(window)
    rows, columns = (g.flatten() for g in torch.meshgrid(place, place, indexing="ij"))
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    expected = down * (2 * window - 1) + right  # w² w²
    for key, tensor in weights.items():
        if key.endswith("relative_position_index") and not torch.equal(tensor.reshape(expected.shape).long(), expected):
            raise CheckpointError(
                f"{where}, {key}", "another order of relative positions", "the order of the original Swin", "convert it first"
            )


_BUILDERS: dict[Naming, Callable[[Naming, Weights, str, int | None], Converted]] = {
    "timm-vit": _build_vit,
    "mmpretrain-vit": _build_vit,
    "timm-dinov2": _build_vit,
    "timm-swin": _build_swin,
    "mmpretrain-swin": _build_swin,
}


def _count(weights: Weights, prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".", 1)[0]) for k in weights if k.startswith(prefix))


def _strip_prefixes(weights: Weights) -> Weights:
    """Take `module.`, `backbone.` and the like away; a head beside a `backbone.` stays and is dropped by the rules."""
    for _ in range(3):
        for prefix in _PREFIXES:
            share = sum(k.startswith(prefix) for k in weights)
            if share and share >= len(weights) / 2:
                weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights
