"""EVA starts from the right singular vectors of a layer's inputs over all batches, and looks at each batch once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from medlore.errors import InputError
from medlore.layers.tuning.explained_variance import Scatter, shared_ranks
from medlore.layers.tuning.methods import Request, Tuning, install_method
from medlore.ranks.allocate import plan_ranks

RANK, WIDTH = 3, 32
QUERY, VALUE, OUTPUT = (f"attention.{part}_proj" for part in "qvo")


def network() -> Any:
    torch.manual_seed(5)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4, num_labels=3
    )
    model = transformers.ViTForImageClassification(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def few_images() -> list[Tensor]:
    """Two unequal batches of noise: no direction stands out, which is where a search for it goes on and on."""
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return [x[:16], x[16:]]


def with_eva(model: nn.Module, batches: list[Tensor]) -> Tuning:
    request = Request(
        head="classifier", sample=torch.zeros(1, 3, 8, 8), plan=plan_ranks(model, rule=f"uniform:{RANK}"), batches=lambda: batches
    )
    return install_method("eva", model, request)


def starts(tuning: Tuning) -> dict[str, Tensor]:
    """A of every pair by the name of its layer."""
    found = {n: p.detach() for n, p in tuning.model.named_parameters() if "lora_A" in n}
    return {n.removeprefix("base_model.model.").partition(".lora_A")[0]: p for n, p in found.items()}


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> np.ndarray[Any, Any]:
    """All rows (n, d) that a layer of the plain network reads."""
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch)
    handle.remove()
    return torch.cat(rows).double().numpy()


def test_each_batch_is_seen_once() -> None:
    model, sizes = network(), []
    model.register_forward_pre_hook(lambda *call: sizes.append(len(call[2]["pixel_values"])), with_kwargs=True)
    with_eva(model, few_images())
    assert sizes == [16, 4]


def test_the_start_is_the_singular_value_decomposition_of_all_inputs() -> None:
    found = starts(with_eva(network(), few_images()))
    shares = {}
    for name, a in found.items():
        rows = inputs_of(network(), name, few_images())
        _, values, vectors = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
        shares[name] = values**2 / (values**2).sum()
        assert np.allclose(np.abs(np.sum(a.numpy() * vectors[: len(a)], axis=1)), 1, atol=1e-4)  # the sign is free
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-5)
    assert sum(map(len, found.values())) == RANK * 6
    taken = min(float(shares[name][len(a) - 1]) for name, a in found.items())
    left = max(float(shares[name][len(a)]) for name, a in found.items() if len(a) < 2 * RANK)
    assert taken >= left - 1e-6
    assert max(map(len, found.values())) <= 2 * RANK


def test_query_and_value_read_one_tensor_and_share_their_directions() -> None:
    found = starts(with_eva(network(), few_images()))
    for block in range(2):
        query, value = (next(a for n, a in found.items() if f"layers.{block}.{part}" in n) for part in (QUERY, VALUE))
        both = min(len(query), len(value))
        assert torch.equal(query[:both], value[:both])
    output = next(a for n, a in found.items() if OUTPUT in n)
    assert not torch.allclose(output[:1].abs(), query[:1].abs(), atol=1e-2)


def test_the_network_is_left_as_it_was() -> None:
    model = network().train()
    tuned = with_eva(model, few_images()).model
    assert tuned.training
    assert not any(module._forward_pre_hooks for name, module in tuned.named_modules() if name.endswith("_proj"))
    with torch.inference_mode():
        x = few_images()[0]
        assert torch.equal(tuned.eval()(pixel_values=x).logits, network()(pixel_values=x).logits)


def test_rows_may_come_in_any_portions() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 30
    scatter = Scatter()
    for portion in rows.split([1, 25, 14]):
        scatter.add(portion)
    _, values, vectors = np.linalg.svd((rows - rows.mean(0)).double().numpy())
    shares, directions = scatter.leading(9)
    assert np.allclose(shares, values**2 / np.sum(values**2), rtol=1e-4)
    assert np.allclose(np.abs(directions @ vectors.T), np.eye(6), atol=1e-2)


def test_inputs_that_never_vary_explain_nothing() -> None:
    scatter = Scatter()
    scatter.add(torch.ones(5, 4))
    shares, directions = scatter.leading(2)
    assert shares.tolist() == [0, 0]
    assert directions.shape == (2, 4)


def test_the_largest_shares_come_first_and_a_layer_may_get_none() -> None:
    shares = {"a": np.array([0.5, 0.4]), "b": np.array([0.1]), "c": np.array([0.4, 0.3])}
    assert shared_ranks(shares, 3) == {"a": 2, "b": 0, "c": 1}
    assert shared_ranks(shares, 9) == {"a": 2, "b": 1, "c": 2}


def test_wrong_use() -> None:
    with pytest.raises(InputError, match="no images to look at"):
        with_eva(network(), [])
    with pytest.raises(InputError, match=r"not finite in 6 layers, first vit\.layers\.0\.attention\.q_proj"):
        with_eva(network(), [torch.full((2, 3, 8, 8), float("nan"))])
