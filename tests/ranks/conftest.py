"""The weights of reference/sr-lora.md 10.1, and files of every container and naming that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def golden_weights() -> Weights:
    """Four blocks of width 64: (qkv 192 x 64, projection 64 x 64), drawn as the reference says."""
    g = np.random.default_rng(0)
    blocks = []
    for i in range(4):
        pair = []
        for shape in ((192, 64), (64, 64)):
            w = g.standard_normal(shape).astype(np.float32)
            w *= ((np.arange(64) + 1.0) ** (-1.0 * (i + 1) / 4)).astype(np.float32)
            pair.append(torch.from_numpy(w))
        blocks.append((pair[0], pair[1]))
    return blocks


def timm(weights: Weights) -> dict[str, Tensor]:
    state = {"cls_token": torch.ones(1, 1, 64), "patch_embed.proj.weight": torch.ones(64, 3, 4, 4), "norm.weight": torch.ones(64)}
    for i, (qkv, proj) in enumerate(weights):
        state |= {
            f"blocks.{i}.attn.qkv.weight": qkv,
            f"blocks.{i}.attn.qkv.bias": torch.ones(192),
            f"blocks.{i}.attn.q_norm.weight": torch.ones(16),  # a decoy with one axis
            f"blocks.{i}.attn.proj.weight": proj,
            f"blocks.{i}.norm1.weight": torch.ones(64),
        }
    return state | {"head.weight": torch.ones(10, 64)}


def separate(weights: Weights, path: str, q: str, k: str, v: str, o: str) -> dict[str, Tensor]:
    state = {}
    for i, (qkv, proj) in enumerate(weights):
        for name, value in zip((q, k, v), qkv.chunk(3), strict=True):
            state[f"{path.format(i)}.{name}.weight"] = value.contiguous()
        state[f"{path.format(i)}.{o}.weight"] = proj
    return state


NAMINGS: dict[str, Callable[[Weights], dict[str, Tensor]]] = {
    "timm": timm,
    "mmpretrain": lambda w: {
        k: t
        for i, (qkv, proj) in enumerate(w)
        for k, t in {f"backbone.layers.{i}.attn.qkv.weight": qkv, f"backbone.layers.{i}.attn.proj.weight": proj}.items()
    },
    "mmpretrain-swin": lambda w: {
        k: t
        for i, (qkv, proj) in enumerate(w)
        for k, t in {
            f"stages.{i // 2}.blocks.{i % 2}.attn.w_msa.qkv.weight": qkv,
            f"stages.{i // 2}.blocks.{i % 2}.attn.w_msa.proj.weight": proj,
        }.items()
    },
    "timm-swin": lambda w: {
        k: t
        for i, (qkv, proj) in enumerate(w)
        for k, t in {
            f"layers.{i // 2}.blocks.{i % 2}.attn.qkv.weight": qkv,
            f"layers.{i // 2}.blocks.{i % 2}.attn.proj.weight": proj,
        }.items()
    },
    "open_clip": lambda w: {
        k: t
        for i, (qkv, proj) in enumerate(w)
        for k, t in {
            f"visual.transformer.resblocks.{i}.attn.in_proj_weight": qkv,
            f"visual.transformer.resblocks.{i}.attn.out_proj.weight": proj,
            f"transformer.resblocks.{i}.attn.in_proj_weight": torch.ones(96, 32),  # the text tower
            f"transformer.resblocks.{i}.attn.out_proj.weight": torch.ones(32, 32),
        }.items()
    },
    "transformers-4": lambda w: separate(
        w, "vit.encoder.layer.{}.attention", "attention.query", "attention.key", "attention.value", "output.dense"
    ),
    "transformers-4-swin": lambda w: separate(
        w, "swin.encoder.layers.0.blocks.{}.attention", "self.query", "self.key", "self.value", "output.dense"
    ),
    "transformers-5": lambda w: separate(w, "vit.layers.{}.attention", "q_proj", "k_proj", "v_proj", "o_proj"),
    "clip": lambda w: separate(w, "vision_model.encoder.layers.{}.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "mpnet": lambda w: separate(w, "encoder.layer.{}.attention.attn", "q", "k", "v", "o"),
}


@pytest.fixture(params=NAMINGS)
def naming(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def named(golden_weights: Weights, naming: str) -> dict[str, Tensor]:
    """The golden weights under one family's names."""
    return NAMINGS[naming](golden_weights)


@pytest.fixture
def timm_state(golden_weights: Weights) -> dict[str, Tensor]:
    return timm(golden_weights)


@pytest.fixture
def timm_file(timm_state: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "vit.safetensors"
    save_file(timm_state, path)
    return path


@pytest.fixture
def jax_file(golden_weights: Weights, tmp_path: Path) -> Path:
    """The same weights as the JAX code stores them: in x out, heads on an axis of their own."""
    arrays: dict[str, np.ndarray] = {"embedding/kernel": np.ones((4, 4, 3, 64), np.float32), "head/kernel": np.ones((64, 10), np.float32)}
    for i, (qkv, proj) in enumerate(golden_weights):
        stem = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1"
        for name, w in zip(("query", "key", "value"), qkv.chunk(3), strict=True):
            arrays[f"{stem}/{name}/kernel"] = w.numpy().T.reshape(64, 4, 16)
            arrays[f"{stem}/{name}/bias"] = np.ones((4, 16), np.float32)
        arrays[f"{stem}/out/kernel"] = proj.numpy().T.reshape(4, 16, 64)
        arrays[f"Transformer/encoderblock_{i}/MlpBlock_3/Dense_0/kernel"] = np.ones((64, 128), np.float32)
        arrays[f"Transformer/encoderblock_{i}/MlpBlock_3/Dense_1/kernel"] = np.ones((128, 64), np.float32)
    path = tmp_path / "ViT.npz"
    np.savez(path, **arrays)
    return path
