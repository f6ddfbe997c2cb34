"""State dicts with the tensor names of timm's networks and random values, and what their sources do with each matrix.

No tensor here comes from timm: names and cuts are restated. A kind of attention draws its tensors and says which rows are q and v.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
Truth = dict[str, np.ndarray]
Kind = Callable[["Draw", str, int, int], Truth | None]


class Draw:
    """Random matrices whose spectra differ, and the state dict that they go into."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def put(self, name: str, *shape: int) -> np.ndarray:
        """One weight; its values in float64."""
        rows = torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=self.generator))
        columns = torch.exp(0.5 * torch.randn(shape[-1], generator=self.generator))
        self.state[name] = torch.randn(shape, generator=self.generator) * rows * columns
        return self.state[name].double().numpy()

    def ones(self, name: str, *shape: int) -> None:
        """A norm, a table, a bias: no matrix of an attention."""
        self.state[name] = torch.ones(shape)


def _cut(matrix: np.ndarray, parts: str, sizes: list[int], heads: int = 1) -> Truth:
    by_head = matrix.reshape(heads, sum(sizes), matrix.shape[1])
    ends = np.cumsum([0, *sizes])
    return {p: by_head[:, ends[i] : ends[i + 1]].reshape(-1, matrix.shape[1]) for i, p in enumerate(parts)}


def stacked(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """`qkv` in three parts: ViT, Swin, MViT, PiT, NesT, Hiera, DaViT, XCA and most others."""
    found = _cut(draw.put(f"{path}.qkv.weight", 3 * d, d), "qkv", [d, d, d])
    draw.ones(f"{path}.qkv.bias", 3 * d)
    draw.ones(f"{path}.q_norm.weight", d // heads)
    return found | {"o": draw.put(f"{path}.proj.weight", d, d)}


def widened(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """The same between stages, where the width doubles (Hiera)."""
    found = _cut(draw.put(f"{path}.qkv.weight", 6 * d, d), "qkv", [2 * d] * 3)
    return found | {"o": draw.put(f"{path}.proj.weight", 2 * d, 2 * d)}


def swin(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """With a table of position biases."""
    draw.ones(f"{path}.relative_position_bias_table", 9, heads)
    draw.ones(f"{path}.relative_position_index", 4, 4)
    return stacked(draw, path, d, heads)


def swin_v2(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """With a small network for the position biases beside it."""
    draw.put(f"{path}.cpb_mlp.0.weight", 24, 2)
    draw.put(f"{path}.cpb_mlp.2.weight", heads, 24)
    draw.ones(f"{path}.logit_scale", heads, 1, 1)
    return stacked(draw, path, d, heads)


def apart(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """Class attention of CaiT and XCiT, NextViT."""
    return {p: draw.put(f"{path}.{p}.weight", d, d) for p in "qkv"} | {"o": draw.put(f"{path}.proj.weight", d, d)}


def projected(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """EVA-02 and BEiT-3."""
    draw.ones(f"{path}.norm.weight", d)
    return {p: draw.put(f"{path}.{p}_proj.weight", d, d) for p in "qkv"} | {"o": draw.put(f"{path}.proj.weight", d, d)}


def crossing(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """Cross attention of CrossViT."""
    return {p: draw.put(f"{path}.w{p}.weight", d, d) for p in "qkv"} | {"o": draw.put(f"{path}.proj.weight", d, d)}


def talking(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """CaiT: two small matrices mix the heads."""
    draw.put(f"{path}.proj_l.weight", heads, heads)
    draw.put(f"{path}.proj_w.weight", heads, heads)
    return stacked(draw, path, d, heads)


def reduced(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """q beside k and v in one matrix, with a convolution that shortens them: PVT v2, Twins, the pooling of SigLIP."""
    draw.put(f"{path}.sr.weight", d, d, 2, 2)
    q = draw.put(f"{path}.q.weight", d, d)
    return {"q": q} | _cut(draw.put(f"{path}.kv.weight", 2 * d, d), "kv", [d, d]) | {"o": draw.put(f"{path}.proj.weight", d, d)}


def gated(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """q and k in one matrix beside v: ConViT, TNT."""
    draw.put(f"{path}.pos_proj.weight", heads, 3)
    draw.ones(f"{path}.gating_param", heads)
    found = _cut(draw.put(f"{path}.qk.weight", 2 * d, d), "qk", [d, d])
    return found | {"v": draw.put(f"{path}.v.weight", d, d), "o": draw.put(f"{path}.proj.weight", d, d)}


def levit(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """Head after head, v twice as wide as k, linear layers with a norm of their own."""
    key, value = d // heads // 2, d // heads
    draw.ones(f"{path}.attention_biases", heads, 16)
    found = _cut(draw.put(f"{path}.qkv.linear.weight", heads * (2 * key + value), d), "qkv", [key, key, value], heads)
    draw.ones(f"{path}.qkv.bn.weight", heads * (2 * key + value))
    return found | {"o": draw.put(f"{path}.proj.ln.linear.weight", d, heads * value)}


def levit_between(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """LeViT between its stages."""
    key, value = d // heads // 2, 2 * d // heads
    draw.ones(f"{path}.attention_biases", heads, 16)
    found = _cut(draw.put(f"{path}.kv.linear.weight", heads * (key + value), d), "kv", [key, value], heads)
    q = draw.put(f"{path}.q.ln.linear.weight", heads * key, d)
    return found | {"q": q, "o": draw.put(f"{path}.proj.ln.linear.weight", 2 * d, heads * value)}


def head_by_head(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """TinyViT, EfficientFormer: head after head, with a table of biases."""
    draw.ones(f"{path}.attention_biases", heads, 16)
    draw.ones(f"{path}.norm.weight", d)
    found = _cut(draw.put(f"{path}.qkv.weight", 3 * d, d), "qkv", [d // heads] * 3, heads)
    return found | {"o": draw.put(f"{path}.proj.weight", d, d)}


def maxvit(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """MaxViT (rw): head after head, biases from a table."""
    draw.ones(f"{path}.rel_pos.relative_position_bias_table", 9, heads)
    found = _cut(draw.put(f"{path}.qkv.weight", 3 * d, d), "qkv", [d // heads] * 3, heads)
    return found | {"o": draw.put(f"{path}.proj.weight", d, d)}


def maxvit_mlp(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """MaxViT (rmlp): the same, biases from a small network."""
    draw.put(f"{path}.rel_pos.mlp.fc1.weight", 24, 2)
    draw.put(f"{path}.rel_pos.mlp.fc2.weight", heads, 24)
    found = _cut(draw.put(f"{path}.qkv.weight", 3 * d, d), "qkv", [d // heads] * 3, heads)
    return found | {"o": draw.put(f"{path}.proj.weight", d, d)}


def maxvit_tf(draw: Draw, path: str, d: int, heads: int) -> Truth:
    """MaxViT (tf): three parts."""
    draw.ones(f"{path}.rel_pos.relative_position_bias_table", heads, 3, 3)
    return stacked(draw, path, d, heads)


def convolved(draw: Draw, path: str, d: int, heads: int) -> None:
    """1x1 convolutions: CoAtNet, Visformer, MobileViT v2. They are left out, and that is said."""
    draw.put(f"{path}.qkv.weight", 3 * d, d, 1, 1)
    draw.put(f"{path}.proj.weight", d, d, 1, 1)


def without_q(draw: Draw, path: str, d: int, heads: int) -> None:
    """GCViT's global windows: `qkv` holds k and v alone. Left out."""
    draw.put(f"{path}.qkv.weight", 2 * d, d)
    draw.put(f"{path}.proj.weight", d, d)


def outlook(draw: Draw, path: str, d: int, heads: int) -> None:
    """VOLO's outlook attention has no q and k. Left out."""
    draw.put(f"{path}.v.weight", d, d)
    draw.put(f"{path}.attn.weight", 81 * heads, d)
    draw.put(f"{path}.proj.weight", d, d)


VIT = [("blocks.{}.attn", stacked)]

# name of the network -> paths of its attentions (`{}` counts blocks) and their kinds
NETWORKS: dict[str, list[tuple[str, Kind]]] = {
    "vit_tiny_patch16_224": VIT,
    "vit_small_patch14_dinov2": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_224.mae": VIT,
    "vit_medium_patch16_gap_256": VIT,
    "flexivit_small": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "naflexvit_base_patch16_gap": VIT,
    "samvit_base_patch16": VIT,
    "eva_giant_patch14_224": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "beit_base_patch16_224": [("blocks.{}.attn", swin)],
    "beitv2_base_patch16_224": [("blocks.{}.attn", swin)],
    "eva02_tiny_patch14_224": [("blocks.{}.attn", projected)],
    "beit3_base_patch16_224": [("blocks.{}.attn", projected)],
    "vit_base_patch16_siglip_224": [*VIT, ("attn_pool", reduced)],
    "swin_tiny_patch4_window7_224": [("layers.0.blocks.{}.attn", swin), ("layers.1.blocks.{}.attn", swin)],
    "swin_s3_tiny_224": [("layers.0.blocks.{}.attn", swin), ("layers.1.blocks.{}.attn", swin)],
    "swinv2_tiny_window8_256": [("layers.0.blocks.{}.attn", swin_v2)],
    "swinv2_cr_tiny_224": [("stages.0.blocks.{}.attn", stacked)],
    "cait_xxs24_224": [("blocks.{}.attn", talking), ("blocks_token_only.{}.attn", apart)],
    "xcit_tiny_12_p16_224": [("blocks.{}.attn", stacked), ("cls_attn_blocks.{}.attn", apart)],
    "pvt_v2_b0": [("stages.0.blocks.{}.attn", reduced)],
    "twins_pcpvt_small": [("blocks.0.{}.attn", reduced)],
    "twins_svt_small": [("blocks.0.0.attn", stacked), ("blocks.0.1.attn", reduced)],
    "convit_tiny": [("blocks.{}.attn", gated), ("blocks.9.attn", stacked)],
    "tnt_s_patch16_224": [("blocks.{}.attn_in", gated), ("blocks.{}.attn_out", gated)],
    "levit_128": [("stages.0.blocks.{}.attn", levit), ("stages.1.downsample.attn_downsample", levit_between)],
    "tiny_vit_5m_224": [("stages.1.blocks.{}.attn", head_by_head)],
    "efficientformer_l1": [("stages.3.blocks.{}.token_mixer", head_by_head)],
    "caformer_s18": [("stages.2.blocks.{}.token_mixer", stacked)],
    "fastvit_sa12": [("stages.3.blocks.{}.token_mixer", stacked)],
    "maxvit_nano_rw_256": [("stages.0.blocks.{}.attn_block.attn", maxvit), ("stages.0.blocks.{}.attn_grid.attn", maxvit)],
    "maxvit_rmlp_nano_rw_256": [("stages.0.blocks.{}.attn_block.attn", maxvit_mlp), ("stages.0.blocks.{}.attn_grid.attn", maxvit_mlp)],
    "maxvit_tiny_tf_224": [("stages.0.blocks.{}.attn_block.attn", maxvit_tf), ("stages.0.blocks.{}.attn_grid.attn", maxvit_tf)],
    "coatnet_0_rw_224": [("stages.2.blocks.{}.attn", convolved), ("stages.3.blocks.{}.attn", stacked)],
    "visformer_tiny": [("stage2.{}.attn", convolved), ("stage3.{}.attn", stacked)],
    "mvitv2_tiny": [("stages.0.blocks.{}.attn", stacked)],
    "hiera_tiny_224": [("blocks.{}.attn", stacked), ("blocks.2.attn", widened)],
    "sam2_hiera_tiny": [("blocks.{}.attn", stacked), ("blocks.2.attn", widened)],
    "jx_nest_tiny": [("levels.0.transformer_encoder.{}.attn", stacked)],
    "crossvit_9_240": [("blocks.0.blocks.0.{}.attn", stacked), ("blocks.0.fusion.{}.attn", crossing)],
    "volo_d1_224": [("network.0.{}.attn", outlook), ("network.2.{}.attn", stacked), ("post_network.0.attn", reduced)],
    "pit_ti_224": [("transformers.0.blocks.{}.attn", stacked)],
    "davit_tiny": [("stages.0.blocks.{}.spatial_block.attn", stacked), ("stages.0.blocks.{}.channel_block.attn", stacked)],
    "coat_tiny": [("serial_blocks1.{}.factoratt_crpe", stacked)],
    "nextvit_small": [("stages.2.blocks.{}.e_mhsa", apart)],
    "mobilevit_s": [("stages.2.1.transformer.{}.attn", stacked)],
    "edgenext_small": [("stages.1.blocks.{}.xca", stacked)],
    "gcvit_tiny": [("stages.0.blocks.0.attn", swin), ("stages.0.blocks.1.attn", without_q)],
}
