"""The rank tables of the paper against the weights they are said to come from, for anyone who has these weights.

No weights are shipped. Give a folder of them, one file each with its own name (any format that `medlore ranks` reads):

    MEDLORE_WEIGHTS=/my/weights pytest -m weights tests/golden/test_published_ranks.py

with `vit-b-in21k.pth`, `vit-b-dino.pth`, `vit-b-mae.pth`, `vit-l-in.pth`, `vit-l-mae.pth`, `vit-l-dino.pth`, `swin-b.pth`, `swin-t.pth`
or `swin-s.pth` (`.pt`, `.bin`, `.npz` and `.safetensors` too), as many as are at hand. `docs/reproduce.md` says which weights are meant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import medlore
from medlore.assets import asset_path
from medlore.files import read_json

VARIABLE = "MEDLORE_WEIGHTS"
ENDINGS = (".pth", ".pt", ".bin", ".npz", ".safetensors")
LISTS = ("vit-b-in21k", "vit-b-dino", "vit-b-mae", "vit-l-in", "vit-l-mae", "vit-l-dino", "swin-b", "swin-t", "swin-s")
# two lists of ViT-B differ by 1 in four places (two sets of weights, or values near a half): a table may be off by that, not by more
NEAR = 1


def weights_of(name: str) -> Path:
    """The file a user gave, or a skip that says how to give it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder with {name}.pth (or {', '.join(ENDINGS[1:])}) to check its published ranks")
    found = [path for ending in ENDINGS if (path := Path(folder) / f"{name}{ending}").is_file()]
    if not found:
        pytest.skip(f"no {name}.pth (or {', '.join(ENDINGS[1:])}) in {VARIABLE}={folder}")
    return found[0]


def published(name: str) -> list[int]:
    """(qkv, output) pairs of a table, one after the other, stages unfolded."""
    return list(_flat(read_json(asset_path("rank-lists") / f"{name}.json")["ranks"]))


def _flat(value: Any) -> Sequence[int]:
    return [value] if isinstance(value, int) else [number for part in value for number in _flat(part)]


def computed(source: Any) -> list[int]:
    """The same from weights: the rank of the stacked q, k, v matrix (once, though q and v each get it), then of the output projection."""
    ranks = [layer.rank for layer in medlore.plan_ranks(source, granularity="fused").layers]
    assert len(ranks) % 3 == 0, "q, v and the output projection of every block"
    blocks = [ranks[i : i + 3] for i in range(0, len(ranks), 3)]
    assert all(q == v for q, v, _ in blocks)
    return [rank for q, _, o in blocks for rank in (q, o)]


def differences(mine: Sequence[int], theirs: Sequence[int]) -> list[str]:
    """Where two tables differ by more than a rounding."""
    assert len(mine) == len(theirs), f"{len(mine) // 2} blocks in the weights, {len(theirs) // 2} in the table"
    kinds = ("qkv", "output")
    return [
        f"block {i // 2 + 1} {kinds[i % 2]}: {a}, published {b}"
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
        if abs(a - b) > NEAR
    ]


@pytest.mark.weights
@pytest.mark.parametrize("name", LISTS)
def test_published_ranks_come_from_these_weights(name: str) -> None:
    found = computed(weights_of(name))
    assert differences(found, published(name)) == []


def test_the_comparison_computes_and_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path on two blocks whose stable ranks are known: equal to the truth, and red for a table that is off by two."""
    width, blocks = 8, nn.ModuleList(nn.ModuleDict() for _ in range(2))
    truth = []
    for number, block in enumerate(blocks, 3):
        block["attn"] = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width, bias=False)})
        qkv, proj = torch.zeros(3 * width, width), torch.zeros(width, width)
        for i in range(number):  # so many equal singular values
            qkv[i, i] = 2.0
        for i in range(number + 2):
            proj[i, i] = 0.5
        block["attn"]["qkv"].weight.data, block["attn"]["proj"].weight.data = qkv, proj
        truth += [number, number + 2]
    state = {f"blocks.{key}": value for key, value in blocks.state_dict().items()}
    torch.save(state, tmp_path / "tiny.pth")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    found = computed(weights_of("tiny"))
    assert differences(found, truth) == []
    assert differences(found, [truth[0], truth[1] + 2, *truth[2:]]) == ["block 1 output: 5, published 7"]


def test_without_weights_it_says_how_to_give_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"set MEDLORE_WEIGHTS to a folder with vit-b-mae\.pth"):
        weights_of("vit-b-mae")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"no vit-b-mae\.pth"):
        weights_of("vit-b-mae")


@pytest.mark.parametrize(("name", "qkv", "output"), [("vit-b-in21k", 916, 700), ("vit-b-dino", 973, 543), ("vit-b-mae", 728, 879)])
def test_sums_of_the_shipped_tables(name: str, qkv: int, output: int) -> None:
    """Sums as read in the published lists; they decide the parameters that the paper reports (3,889,152 for ViT-B)."""
    table = published(name)
    assert (sum(table[::2]), sum(table[1::2])) == (qkv, output)
