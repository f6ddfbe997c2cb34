"""Alpha rules, budgets, given lists."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import medlore
from medlore.errors import DataError, InputError, TargetError, UnknownNameError
from medlore.ranks.rules import AlphaRule, alpha_rule, given_ranks, read_budget, share_budget, shipped_rank_lists
from medlore.ranks.targets import Target


def target(m: int, n: int, name: str = "l", part: str = "q", group: str = "g") -> Target:
    return Target(name, part, (m, n), group=group)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rule", "alpha", "scaling"),
    [
        ("rank", AlphaRule("rank", 1.0), 16.0, 1.0),
        ("rank*0.5", AlphaRule("rank", 0.5), 8.0, 0.5),
        ("rslora", AlphaRule("rslora", 8.0), 8.0, 2.0),
        ("rslora*3", AlphaRule("rslora", 3.0), 3.0, 0.75),
        (1, AlphaRule("constant", 1.0), 1.0, 1 / 16),
        ("32", AlphaRule("constant", 32.0), 32.0, 2.0),
    ],
)
def test_alpha_rules(text: str | float, rule: AlphaRule, alpha: float, scaling: float) -> None:
    read = alpha_rule(text)
    assert read == rule
    assert read.alpha(16) == alpha
    assert read.scaling(alpha, 16) == pytest.approx(scaling)
    assert alpha_rule(str(read)) == read


@pytest.mark.parametrize("text", ["rank*0", "rank*x", "-1", "ranks", "nan", "rslora*", "inf", ""])
def test_wrong_alpha_rules(text: str) -> None:
    with pytest.raises(InputError, match=r"alpha: .*rslora\*C"):
        alpha_rule(text)


def test_budgets_are_read() -> None:
    targets = [target(10, 20), target(4, 6)]
    read = {
        t: read_budget(t, targets, model_parameters=1000).parameters for t in ("250", "0.5k", "1M", "2%", "1.5 %", "uniform:3", "uniform:9")
    }
    assert read == {"250": 250, "0.5k": 500, "1M": 10**6, "2%": 20, "1.5 %": 15, "uniform:3": 120, "uniform:9": 9 * 30 + 4 * 10}
    with pytest.raises(InputError, match=r"--budget: 'much'"):
        read_budget("much", targets, model_parameters=1)


def test_largest_remainder_by_hand() -> None:
    targets = [target(20, 20), target(20, 20), target(20, 20)]  # 40 parameters a rank
    budget = read_budget("400", targets, model_parameters=0)  # ten ranks in all
    assert share_budget([5.0, 3.0, 1.0], targets, budget, min_rank=1, max_rank=None) == [6, 3, 1]  # 5.56 3.33 1.11
    assert share_budget([5.0, 3.0, 1.0], targets, budget, min_rank=2, max_rank=None) == [5, 3, 2]
    assert share_budget([5.0, 3.0, 1.0], targets, budget, min_rank=1, max_rank=4) == [4, 4, 2]  # 4, 4.5 -> 4, 1.5


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60), st.floats(1, 40)), min_size=1, max_size=12),
    st.floats(0.0, 1.0),
    st.integers(1, 2),
)
def test_budget_is_met_as_nearly_as_ranks_allow(rows: list[tuple[int, int, float]], fill: float, min_rank: int) -> None:
    targets = [target(m, n) for m, n, _ in rows]
    values = [v for _, _, v in rows]
    costs = [m + n for m, n, _ in rows]
    least = sum(c * min(min_rank, *t.shape) for c, t in zip(costs, targets, strict=True))
    most = sum(c * min(t.shape) for c, t in zip(costs, targets, strict=True))
    budget = read_budget(str(least + int(fill * (most - least))), targets, model_parameters=0)
    ranks = share_budget(values, targets, budget, min_rank=min_rank, max_rank=None)
    spent = sum(c * r for c, r in zip(costs, ranks, strict=True))
    assert all(min(min_rank, *t.shape) <= r <= min(t.shape) for r, t in zip(ranks, targets, strict=True))
    assert spent <= budget.parameters
    same = [(r, v) for r, v, t in zip(ranks, values, targets, strict=True) if t.shape == targets[0].shape]
    assert all(a[0] <= b[0] + 1 for a in same for b in same if a[1] <= b[1])  # more stable rank, not less rank, up to a remainder


def test_a_budget_below_the_minimum_is_refused() -> None:
    targets = [target(10, 10)]
    with pytest.raises(InputError, match=r"at least 40 \(rank 2 everywhere\)"):
        share_budget([3.0], targets, read_budget("39", targets, model_parameters=0), min_rank=2, max_rank=None)


BLOCKS = [target(90, 90, f"b{i}.{p}", p, f"b{i}") for i in range(2) for p in ("q", "v", "o")]


@pytest.mark.parametrize(
    "text", ["[[9, 10], [25, 35]]", "lora_ranks = [[9, 10],\n [25, 35],]", "[[[9, 10]], [[25, 35]]]", '{"ranks": [[9, 10], [25, 35]]}']
)
def test_lists_of_pairs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ranks.txt"
    path.write_text(text)
    assert given_ranks(path, BLOCKS) == [9, 9, 10, 25, 25, 35]
    assert given_ranks([[9, 8, 10], (25, 24, 35)], BLOCKS) == [9, 8, 10, 25, 24, 35]


def test_mapping_of_names() -> None:
    ranks = {t.name: i + 1 for i, t in enumerate(BLOCKS)}
    assert given_ranks(ranks, BLOCKS) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(TargetError, match=r"(?s)3 names do not fit.*'b0\.x' names no target.*b0\.q \(q\): no rank.*b1\.o \(o\): rank 2\.5"):
        given_ranks({k: v for k, v in ranks.items() if k != "b0.q"} | {"b0.x": 3, "b1.o": 2.5}, BLOCKS)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([[9, 10]], "1 blocks in the list, 2 in the model"),
        ([[9, 10], [1, 2, 3, 4]], "neither a pair nor a triple"),
        ([[9, 0], [91, 5]], r"(?s)3 ranks do not fit.*b0\.o \(o\): rank 0.*b1\.v \(v\): rank 91"),
    ],
)
def test_lists_that_do_not_fit(ranks: list[list[int]], text: str) -> None:
    with pytest.raises(TargetError, match=text):
        given_ranks(ranks, BLOCKS)


@pytest.mark.parametrize(
    ("text", "kind"), [("print(1)", "neither JSON nor a list"), ('"text"', "nested lists"), ("[[1.5, 2]]", "nested lists")]
)
def test_files_that_hold_no_ranks(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "ranks.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=kind):
        given_ranks(path, BLOCKS)


def test_an_unknown_shipped_list_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'vit-b-in21k'"):
        given_ranks("medlore:rank-lists/vit-b-in22k", BLOCKS)


class Blocks(nn.Module):
    """Attention matrices of a backbone without values."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        kinds = {"device": "meta", "bias": False}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(d, 3 * d, **kinds), "proj": nn.Linear(d, d, **kinds)})}) for d in widths
        )


SWIN_B = [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
SWIN_T = [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
SWIN_S = [96] * 2 + [192] * 2 + [384] * 18 + [768] * 2
# list, widths, Σ rank of qkv, Σ rank of projection, parameters, uniform rank: reference/sr-lora.md 1.3
PUBLISHED = [
    ("vit-b-in21k", [768] * 12, 916, 700, 3_889_152, 70.3),
    ("vit-b-in21k-readme", [768] * 12, 916, 700, 3_889_152, 70.3),
    ("vit-b-dino", [768] * 12, 973, 543, 3_823_104, 69.1),
    ("vit-b-mae", [768] * 12, 728, 879, 3_586_560, 64.9),
    ("vit-l-in", [1024] * 24, 2107, 2112, 12_955_648, 87.9),
    ("vit-l-mae", [1024] * 24, 2049, 1991, 12_470_272, 84.6),
    ("swin-b", SWIN_B, None, None, 3_686_400, None),
    ("swin-t", SWIN_T, None, None, 1_064_064, None),
    ("swin-s", SWIN_S, None, None, 2_115_456, None),
]


@pytest.mark.parametrize(("name", "widths", "qkv", "proj", "parameters", "uniform"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_parameter_totals_of_the_published_lists(
    name: str, widths: list[int], qkv: int | None, proj: int | None, parameters: int, uniform: float | None
) -> None:
    plan = medlore.plan_ranks(Blocks(widths), ranks=f"medlore:rank-lists/{name}", granularity="fused")
    assert plan.parameters == parameters
    assert plan.sha256 is None
    if qkv is not None:
        assert [sum(c) for c in zip(*plan.nested_ranks(), strict=True)] == [qkv, proj]
        assert round(plan.uniform_rank, 1) == uniform


def test_all_published_lists_ship() -> None:
    assert set(shipped_rank_lists()) == {p[0] for p in PUBLISHED} | {"vit-l-dino"}
    code, readme = (
        json.loads((Path(medlore.__file__).parent / "assets" / "rank-lists" / f"{n}.json").read_text())["ranks"]
        for n in ("vit-b-in21k", "vit-b-in21k-readme")
    )
    differing = {(i + 1, code[i][0], readme[i][0]) for i in range(12) if code[i] != readme[i]}
    assert differing == {(4, 69, 70), (6, 85, 84), (8, 102, 101), (11, 99, 100)}
    assert len(medlore.plan_ranks(Blocks([1024] * 24), ranks="medlore:rank-lists/vit-l-dino").layers) == 72


@pytest.mark.parametrize(("rank", "parameters"), [(8, 442_368), (32, 1_769_472), (64, 3_538_944), (256, 14_155_776)])
def test_uniform_totals(rank: int, parameters: int) -> None:
    plan = medlore.plan_ranks(Blocks([768] * 12), rule=f"uniform:{rank}")
    assert plan.parameters == parameters == 55_296 * rank
    assert plan.uniform_rank == rank
    assert math.isclose(parameters / 85_798_656, {8: 0.0052, 32: 0.0206, 64: 0.0412, 256: 0.165}[rank], rel_tol=0.01)
