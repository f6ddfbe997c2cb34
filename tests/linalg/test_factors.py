"""Factor pairs: shapes, products, exact conversion between layouts, truncation with its error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medlore.errors import InputError, UnknownNameError
from medlore.linalg.factors import channel_factors, converted, delta_weight, factor_shapes, truncate
from medlore.linalg.matricize import as_matrix, checked_layout, from_matrix

WEIGHTS = [(8, 6), (8, 6, 3, 3), (9, 3, 1, 1), (8, 5, 3, 3, 3), (8, 6, 1, 3, 3), (8, 6, 3, 1, 1), (6, 1, 3, 3)]
LAYOUTS = ["channel", "interleaved"]


def pair_of(shape: tuple[int, ...], rank: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape_A, shape_B = factor_shapes(shape, rank, layout)  # type: ignore[arg-type]
    return torch.randn(shape_A, dtype=torch.float64), torch.randn(shape_B, dtype=torch.float64)


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_matrix_and_back(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(from_matrix(as_matrix(weight), shape), weight)
    assert as_matrix(weight)[1, 0] == weight[(1, *[0] * (len(shape) - 1))]


def test_matrix_refusals() -> None:
    with pytest.raises(InputError, match=r"shape \(4,\).*two or more axes"):
        as_matrix(torch.zeros(4))
    with pytest.raises(InputError, match=r"\(3, 4\).*\(8, 54\)"):
        from_matrix(torch.zeros(3, 4), (8, 6, 3, 3))
    with pytest.raises(UnknownNameError, match=r"'interleave'.*'interleaved'"):
        checked_layout("interleave")


def test_published_shapes(golden: Path) -> None:
    """The factor shapes of LoRKD's Nano checkpoint, ranks 12,10,10,4,8,8,12,2 and twice that in the decoder."""
    gammas = [12, 10, 10, 4, 8, 8, 12, 2]
    shapes = {}
    for line in (golden / "lorkd_keys_lorkd_nano.txt").read_text().splitlines():
        key, _, shape = line.partition("\t")
        shapes[key] = tuple(int(n) for n in shape.strip("() ").split(",") if n.strip())
    seen = 0
    for key, shape in shapes.items():
        if ".lora_A_list." in key and key.startswith("model.module.backbone."):
            expert = int(key.rpartition(".")[2])
            rank = gammas[expert] * (2 if ".decoder." in key else 1)
            weight = shapes[key.rpartition(".lora_A_list.")[0] + ".conv.weight"]
            assert (shape, shapes[key.replace("lora_A_list", "lora_B_list")]) == factor_shapes(weight, rank, "interleaved"), key
            seen += 1
    assert seen >= 18 * 8


@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_interleaved_is_the_memory_of_the_product(shape: tuple[int, ...]) -> None:
    lora_A, lora_B = pair_of(shape, 2, "interleaved")
    found = delta_weight(lora_A, lora_B, weight_shape=shape, layout="interleaved", scaling=2.0)
    assert torch.equal(found, ((lora_B @ lora_A) * 2.0).view(shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_conversion_is_exact(shape: tuple[int, ...], layout: str) -> None:
    lora_A, lora_B = pair_of(shape, 2, layout)
    wanted = delta_weight(lora_A, lora_B, weight_shape=shape, layout=layout)  # type: ignore[arg-type]
    rearranged = channel_factors(lora_A, lora_B, weight_shape=shape, layout=layout)  # type: ignore[arg-type]
    new_A, new_B, error = converted(lora_A, lora_B, weight_shape=shape, layout=layout)  # type: ignore[arg-type]
    for A, B in (rearranged, (new_A, new_B)):
        assert torch.allclose(delta_weight(A, B, weight_shape=shape), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    k = shape[2] if len(shape) > 2 and layout == "interleaved" else 1
    assert new_A.shape[0] <= min(2 * k * k, shape[0], wanted[0].numel()) if layout == "interleaved" else new_A.shape[0] == 2
    assert error < 1e-10


def test_rank_of_an_interleaved_pair() -> None:
    """Rank 2 of the interleaved layout is matrix rank 18 at k = 3."""
    lora_A, lora_B = pair_of((64, 64, 3, 3), 2, "interleaved")
    assert converted(lora_A, lora_B, weight_shape=(64, 64, 3, 3), layout="interleaved")[0].shape[0] == 18


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_truncation_is_the_best_and_says_its_error(rank: int) -> None:
    lora_A, lora_B = pair_of((12, 5, 3, 3), 6, "channel")
    whole = as_matrix(delta_weight(lora_A, lora_B, weight_shape=(12, 5, 3, 3)))
    new_A, new_B, error = truncate(lora_A, lora_B, rank=rank)
    distance = float((whole - as_matrix(delta_weight(new_A, new_B, weight_shape=(12, 5, 3, 3)))).norm())
    best = float(torch.linalg.svdvals(whole)[rank:].norm())
    assert new_A.shape[0] == min(rank, 6)
    assert distance == pytest.approx(best, abs=1e-10)
    assert error == pytest.approx(best, abs=1e-10)


def test_zero_pair_and_16_bits() -> None:
    zero_A, zero_B, error = truncate(torch.randn(3, 4), torch.zeros(5, 3))
    assert (zero_A.shape[0], error) == (1, 0.0)
    assert not (zero_B @ zero_A).any()
    product = delta_weight(torch.ones(2, 4).bfloat16(), torch.ones(5, 2).bfloat16(), weight_shape=(5, 4))
    assert product.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert delta_weight(torch.ones(2, 4), torch.ones(5, 2), weight_shape=(5, 4)).dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"rank: got 0.*from 1"):
        truncate(torch.zeros(2, 3), torch.zeros(4, 2), rank=0)
    with pytest.raises(InputError, match=r"shapes \(2, 3\) and \(4, 3\).*\(4, 3\)"):
        delta_weight(torch.zeros(2, 3), torch.zeros(4, 3), weight_shape=(4, 3))
