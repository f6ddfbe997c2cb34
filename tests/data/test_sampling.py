"""Mixed batches: full, fair, complete, and the same from any step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlore.data.images.sampling import TaskSampler
from medlore.errors import DataError, InputError


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 64), st.floats(0, 1), st.integers(0, 500))
def test_every_batch_is_full(sizes: list[int], batch_size: int, power: float, step: int) -> None:
    sampler = TaskSampler({f"t{i}": n for i, n in enumerate(sizes)}, batch_size=batch_size, power=power)
    parts = sampler.batch(step)
    assert sum(len(p.indices) for p in parts) == batch_size
    for part in parts:
        assert part.indices.min() >= 0
        assert part.indices.max() < sizes[int(part.task[1:])]


@pytest.mark.parametrize(("power", "share"), [(0.0, 0.5), (0.5, 10 / 11), (1.0, 100 / 101)])
def test_shares_hold_over_many_steps(power: float, share: float) -> None:
    sampler = TaskSampler({"big": 1000, "small": 10}, batch_size=7, power=power)
    assert sampler.share("big") == pytest.approx(share)
    drawn = sum(len(p.indices) for step in range(300) for p in sampler.batch(step) if p.task == "big")
    assert drawn == pytest.approx(share * 2100, abs=4)


def test_a_pass_sees_every_sample_once_and_the_next_in_another_order() -> None:
    sampler = TaskSampler({"a": 12, "b": 12}, batch_size=8, power=0.0, seed=3)
    seen = np.concatenate([p.indices for step in range(8) for p in sampler.batch(step) if p.task == "a"])
    assert sorted(seen[:12]) == list(range(12)) == sorted(seen[12:24])
    assert seen[:12].tolist() != seen[12:24].tolist()


def test_any_step_can_be_asked_for_first() -> None:
    sizes = {"a": 5, "b": 17}
    forward = TaskSampler(sizes, batch_size=6, seed=1)
    batches = [forward.batch(s) for s in range(20)]
    late = TaskSampler(sizes, batch_size=6, seed=1).batch(19)
    assert [(p.task, p.indices.tolist()) for p in late] == [(p.task, p.indices.tolist()) for p in batches[19]]
    other = TaskSampler(sizes, batch_size=6, seed=2).batch(19)
    assert [p.indices.tolist() for p in other] != [p.indices.tolist() for p in late]


def test_tasks_without_samples_are_all_named() -> None:
    with pytest.raises(DataError, match="no training samples") as caught:
        TaskSampler({"a": 0, "b": 3, "c": 0}, batch_size=4)
    assert caught.value.faults == ("a", "c")
    with pytest.raises(InputError, match="batch_size"):
        TaskSampler({"a": 1}, batch_size=0)
