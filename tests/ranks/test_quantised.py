"""8-bit weights beside their scales are read as what they stand for (float64 SVD of the product), or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import medlore
from medlore.errors import CheckpointError

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
FP8 = torch.float8_e4m3fn


def weights(rows: int = 64, columns: int = 64) -> dict[str, Tensor]:
    """Matrices whose rows have very different sizes, so that a scale that is passed over changes the rank."""
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(rows, columns, generator=g) * torch.logspace(0, -2, rows)[:, None] for n in NAMES}


def by_row(w: Tensor) -> dict[str, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 448
    return {".weight": (w / scale).to(FP8), ".weight_scale": scale}


def by_row_flat(w: Tensor) -> dict[str, Tensor]:
    found = by_row(w)
    return found | {".weight_scale": found[".weight_scale"].flatten()}


def by_tensor(w: Tensor) -> dict[str, Tensor]:
    scale = w.abs().max() / 448
    return {".weight": (w / scale).to(FP8), ".weight_scale": scale}


def by_block(w: Tensor) -> dict[str, Tensor]:
    """DeepSeek's: blocks of 128, the last ones cut off; `_inv` by name, multiplied all the same."""
    padded = torch.zeros(-(-w.shape[0] // 128) * 128, -(-w.shape[1] // 128) * 128)
    padded[: w.shape[0], : w.shape[1]] = w
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128).abs().amax((1, 3)) / 448
    spread = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
    return {".weight": (w / spread).to(FP8), ".weight_scale_inv": blocks}


def whole_numbers(w: Tensor) -> dict[str, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / 127
    return {".weight": (w / scale).round().to(torch.int8), ".weight_scale": scale}


def with_zero_points(w: Tensor) -> dict[str, Tensor]:
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    return {".weight": (w / scale + zero).round().clamp(-128, 127).to(torch.int8), ".weight_scale": scale, ".weight_zero_point": zero}


def bitsandbytes(w: Tensor) -> dict[str, Tensor]:
    most = w.abs().amax(1)
    return {".weight": (w / most[:, None] * 127).round().to(torch.int8), ".SCB": most}


FORMS = [by_row, by_row_flat, by_tensor, by_block, whole_numbers, with_zero_points, bitsandbytes]


@pytest.mark.case("fp8_scales")
@pytest.mark.parametrize("form", FORMS)
def test_ranks_are_those_of_the_product(form: object, tmp_path: Path) -> None:
    large = weights(200, 160)
    state = {f"layers.0.self_attn.{n}{end}": t for n, w in large.items() for end, t in form(w).items()}  # type: ignore[operator]
    save_file(state, tmp_path / "eight.safetensors")
    plan = medlore.plan_ranks(tmp_path / "eight.safetensors")
    assert [x.part for x in plan.layers] == ["q", "v", "o"]
    for layer in plan.layers:
        s = np.linalg.svd(large[layer.name.rpartition(".")[2]].double().numpy(), compute_uv=False)
        full = (s**2).sum() / s[0] ** 2
        assert layer.stable_rank == pytest.approx(full, rel=0.05)  # what 8 bits leave of it
        assert layer.rank < 20  # without the scales it is above 60


def test_a_module_in_eight_bits_like_its_file(tmp_path: Path) -> None:
    """A linear layer that holds fp8 and a scale beside it, as transformers' own has."""

    class Eight(nn.Linear):
        def __init__(self, w: Tensor) -> None:
            super().__init__(w.shape[1], w.shape[0], bias=False)
            found = by_row(w)
            self.weight = nn.Parameter(found[".weight"], requires_grad=False)
            self.register_buffer("weight_scale", found[".weight_scale"])

    net = nn.ModuleDict({"self_attn": nn.ModuleDict({n: Eight(w) for n, w in weights().items()})})
    save_file(net.state_dict(), tmp_path / "eight.safetensors")
    assert [x.rank for x in medlore.plan_ranks(net).layers] == [x.rank for x in medlore.plan_ranks(tmp_path / "eight.safetensors").layers]
    assert medlore.plan_ranks(net).layers[0].rank == 6


def test_fp8_without_any_scale_is_taken_as_it_is(tmp_path: Path) -> None:
    state = {f"layers.0.self_attn.{n}.weight": w.to(FP8) for n, w in weights().items()}
    save_file(state, tmp_path / "cast.safetensors")
    save_file({k: v.float() for k, v in state.items()}, tmp_path / "full.safetensors")
    one, other = (medlore.plan_ranks(tmp_path / f"{n}.safetensors") for n in ("cast", "full"))
    assert (one.sha256, one.layers) == (other.sha256, other.layers)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({".weight_scale": torch.ones(7, 1)}, r"a scale of shape \(7, 1\) for weights of shape \(64, 64\)"),
        ({".weight_scale": torch.full((64, 1), float("nan"))}, "a scale that is not finite"),
    ],
)
def test_scales_that_do_not_fit_are_refused(change: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    state = {f"layers.0.self_attn.{n}{end}": t.clone() for n, w in weights().items() for end, t in (by_row(w) | change).items()}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=text):
        medlore.plan_ranks(tmp_path / "odd.safetensors")


def test_one_layer_without_its_scale_is_refused(tmp_path: Path) -> None:
    state = {f"layers.0.self_attn.{n}{end}": t for n, w in weights().items() for end, t in by_row(w).items()}
    del state["layers.0.self_attn.v_proj.weight_scale"]
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"v_proj\.weight: numbers of type torch\.float8_e4m3fn without a scale"):
        medlore.plan_ranks(tmp_path / "one.safetensors")
