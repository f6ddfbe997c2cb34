"""Random networks of many families: the plan holds q, v and output projection of every attention, or says what it left out.

The judge knows names and cuts from the families' own source (`architectures`) and takes every stable rank from a float64 SVD.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from torch import nn

import medlore
from ranks.architectures import CASES, Case, Matrix


def truth(case: Case, model: nn.Module) -> dict[str, dict[str, Matrix]]:
    """Path of an attention -> part -> its matrix, out x in."""
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    found: dict[str, dict[str, Matrix]] = {}
    for (q, v, o), split in ((case.places, case.split), *case.also):
        for name in weights:
            match = re.fullmatch(rf"(?:(.*)\.)?{re.escape(q)}\.weight", name)
            stem = f"{match[1]}." if match and match[1] else ""
            if match is None or not {f"{stem}{place}.weight" for place in (v, o)} <= set(weights):
                continue
            parts = {part: weights[f"{stem}{place}.weight"] for part, place in (("q", q), ("v", v))}
            cut = {part: w if split is None else split(w, part) for part, w in parts.items()}
            out = weights[f"{stem}{o}.weight"]
            found[match[1] or ""] = cut | {"o": out.T if transposed_storage(model, f"{stem}{o}") else out}
    return found


def transposed_storage(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


def stable_rank(matrix: Matrix) -> float:
    s = np.linalg.svd(matrix, compute_uv=False)
    return float((s**2).sum() / s[0] ** 2)


def identity(case: Case) -> str:
    number = sum(c.model == case.model for c in CASES[: CASES.index(case)])
    return case.model + (f"-{number + 1}" if number else "")


MARKED = [pytest.param(c, id=identity(c), marks=() if c.fast else pytest.mark.full) for c in CASES]


@pytest.mark.case("output_projection_missed")
@pytest.mark.parametrize("case", MARKED)
def test_a_plan_is_q_v_and_output_of_every_attention_or_says_why_not(case: Case) -> None:
    model = case.build()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    plan = medlore.plan_ranks(model)
    wanted = truth(case, model)
    assert wanted, "the judge itself finds nothing: its names are wrong"
    left_out = {s.path for s in plan.coverage if s.outcome == "left out"}
    missing = {path for path in wanted if not any(covers(path, layer.group) for layer in plan.layers)}
    assert {path for path in missing if not any(covers(path, other) for other in left_out)} == set()
    assert not missing or case.notes
    for words in case.notes:
        assert any(words in s.why for s in plan.coverage if s.outcome == "left out")
    for layer in plan.layers:
        path = next(p for p in wanted if covers(p, layer.group))
        exact = stable_rank(wanted[path][layer.part])
        assert layer.shape == wanted[path][layer.part].shape
        assert layer.stable_rank == pytest.approx(exact, rel=2e-2)
        assert layer.lower * (1 - 1e-9) <= exact <= layer.upper * (1 + 1e-9)  # type: ignore[operator]
        assert layer.rank == round(exact)
    parts = [(layer.group, layer.part) for layer in plan.layers]
    assert sorted(part for _, part in parts) == sorted(["q", "v", "o"] * (len(wanted) - len(missing)))
    assert all(bool((before[n] == p).all()) for n, p in model.state_dict().items()), "the network was changed by being looked at"


def covers(path: str, group: str) -> bool:
    """Whether the attention that the judge calls `path` is the one that the plan calls `group`."""
    return group == path or group.startswith(f"{path}." if path else "")


def test_at_least_sixty_configurations_are_tried() -> None:
    assert len(CASES) >= 60
    assert len({case.model for case in CASES}) >= 60
