"""Files with timm's names: the plan is q, v and output projection of every attention, or says what it left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import medlore
from ranks.timm_names import NETWORKS, Draw, Truth


def drawn(name: str) -> tuple[Draw, dict[str, Truth | None]]:
    """A state dict of two blocks of every kind, with the rest of a network around it."""
    draw = Draw(sum(map(ord, name)))
    d, heads = 24, 3
    truth: dict[str, Truth | None] = {}
    for pattern, kind in NETWORKS[name]:
        for number in range(2 if "{}" in pattern else 1):
            path = pattern.format(number)
            truth[path] = kind(draw, path, d, heads)
            block = path.rpartition(".")[0]
            if block:
                draw.put(f"{block}.mlp.fc1.weight", 2 * d, d)
                draw.put(f"{block}.mlp.fc2.weight", d, 2 * d)
                draw.ones(f"{block}.norm1.weight", d)
    draw.put("patch_embed.proj.weight", d, 3, 4, 4)
    draw.ones("pos_embed", 1, 17, d)
    draw.put("head.weight", 10, d)
    return draw, truth


def stable_rank(matrix: np.ndarray) -> float:
    s = np.linalg.svd(matrix, compute_uv=False)
    return float((s**2).sum() / s[0] ** 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_of_timm(name: str, tmp_path: Path) -> None:
    draw, truth = drawn(name)
    save_file(draw.state, tmp_path / "model.safetensors")
    plan = medlore.plan_ranks(tmp_path / "model.safetensors", include_k=True)
    outcome = {s.path: s.outcome for s in plan.coverage}
    assert {path: parts is not None for path, parts in truth.items()} == {path: outcome[path] == "taken" for path in truth}
    assert all(s.why for s in plan.coverage if s.outcome != "taken")
    assert {(x.group, x.part) for x in plan.layers} == {(path, part) for path, parts in truth.items() if parts for part in parts}
    for layer in plan.layers:
        matrix = (truth[layer.group] or {})[layer.part]
        exact = stable_rank(matrix)
        assert layer.shape == matrix.shape
        assert layer.lower * (1 - 1e-9) <= exact <= layer.upper * (1 + 1e-9)  # type: ignore[operator]
        assert layer.rank == round(exact)


def test_at_least_forty_networks_are_tried() -> None:
    assert len(NETWORKS) >= 40
