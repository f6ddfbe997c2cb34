"""Mixed batches over tasks: how often a task is drawn, and which of its samples come next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medlore.errors import DataError, InputError

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class TaskBatch:
    """The samples of one task in a mixed batch.

    Attributes:
        task: name of the task.
        indices: (k,) positions in the task's own data.
    """

    task: str
    indices: np.ndarray


class TaskSampler:
    """Mixed batches in which every task's share is fixed in expectation and every sample of a task comes once per pass.

    The batch of step `s` depends on the seed and on `s` alone, so a run can go on from any step.

    Args:
        sizes: number of samples per task.
        batch_size: samples per mixed batch.
        power: a task's share is proportional to size ** power: 0 draws all tasks alike, 1 in proportion to their size.
        seed: seed of the order.

    Raises:
        DataError: a task has no samples; all such tasks are named.
        InputError: a batch size below 1.

    Source:
        Temperature sampling of multi-task learning (Arivazhagan et al. 2019, section 4.2); the stateless form is ours.
    """

    def __init__(self, sizes: Mapping[str, int], *, batch_size: int, power: float = 0.5, seed: int = 0) -> None:
        empty = [name for name, size in sizes.items() if size < 1]
        if empty or not sizes:
            raise DataError(
                "tasks", f"no training samples in {empty or 'any task'}", "at least one sample per task", "check their data", faults=empty
            )
        if batch_size < 1:
            raise InputError("batch_size", str(batch_size), "a whole number from 1", "raise it")
        self._names = list(sizes)
        self._sizes = dict(sizes)
        self._batch_size = batch_size
        self._seed = seed
        weights = np.array([sizes[n] for n in self._names], dtype=np.float64) ** power
        self._shares = weights / weights.sum()
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        self._latest = (0, np.zeros(len(self._names), dtype=np.int64))  # (step, samples drawn before it): a memory, never a state

    def share(self, task: str) -> float:
        """Expected part of a batch that belongs to a task."""
        return float(self._shares[self._names.index(task)])

    def batch(self, step: int) -> list[TaskBatch]:
        """The mixed batch of a step (from 0), grouped by task; tasks without a sample in it are left out."""
        before = self._drawn_before(step)
        counts = np.bincount(self._tasks_of_slots(step * self._batch_size, self._batch_size), minlength=len(self._names))
        self._latest = (step + 1, before + counts)
        parts = []
        for name, start, count in zip(self._names, before, counts, strict=True):
            if count:
                parts.append(TaskBatch(name, np.array([self._nth(name, int(start) + i) for i in range(int(count))])))
        return parts

    def __iter__(self) -> Iterator[list[TaskBatch]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1

    def _tasks_of_slots(self, first: int, count: int) -> np.ndarray:
        """Task numbers (count,) of the endless row of sample slots: a golden-ratio sequence cut at the shares spreads every task evenly."""
        place = np.mod(np.arange(first, first + count) * _GOLDEN + 0.5, 1.0)
        tasks: np.ndarray = np.minimum(np.searchsorted(np.cumsum(self._shares), place, side="right"), len(self._names) - 1)
        return tasks

    def _drawn_before(self, step: int) -> np.ndarray:
        """How many samples of each task the earlier steps drew."""
        known_step, known = self._latest
        if known_step > step:
            known_step, known = 0, np.zeros(len(self._names), dtype=np.int64)
        slots = self._tasks_of_slots(known_step * self._batch_size, (step - known_step) * self._batch_size)
        return known + np.bincount(slots, minlength=len(self._names))

    def _nth(self, task: str, position: int) -> int:
        """The sample at a position of the endless, reshuffled sequence of a task."""
        turn, place = divmod(position, self._sizes[task])
        key = (task, turn)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != task or k[1] == turn - 1}
            generator = np.random.default_rng([self._seed, self._names.index(task), turn])
            self._orders[key] = generator.permutation(self._sizes[task])
        return int(self._orders[key][place])
