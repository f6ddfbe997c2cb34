"""Batches of patches: what is drawn at a step, made ahead of the training in a thread or in processes without changing a draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medlore.data.volumes.intensity import rule_of
from medlore.data.volumes.patches import PatchRules, draw_patch
from medlore.data.volumes.training_cache import CachedCase
from medlore.decomposing.segmenters.cohort import Cohort
from medlore.decomposing.segmenters.settings import BatchMode
from medlore.errors import StepError, UnknownNameError

_AHEAD = 3  # batches that wait ready
_ABSENT_SHARE = 0.15  # of patches of a region that a case is known not to show
EVERY_REGION = ""


@dataclass(frozen=True)
class Source:
    """A case together with one region of its labels: what one patch is drawn from."""

    case: CachedCase
    region: str
    labels: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Batch:
    """Patches and what is asked of them.

    Attributes:
        images: (b, 1, x, y, z) float32.
        targets: (b, q, x, y, z) Boolean; rows beyond a patch's own prompts are empty.
        rows: (b, q) rows of the prompt table.
        valid: (b, q), 0 where a prompt does not count.
        regions: b regions.
        names: b case names.
    """

    images: Tensor
    targets: Tensor
    rows: Tensor
    valid: Tensor
    regions: tuple[str, ...]
    names: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The tensors on a device."""
        images, targets, rows, valid = (t.to(device, non_blocking=True) for t in (self.images, self.targets, self.rows, self.valid))
        return Batch(images, targets, rows, valid, self.regions, self.names)


@dataclass(frozen=True)
class Dealer:
    """Deals batches: a pure function of the seed and the number of the batch.

    Attributes:
        sources: what can be drawn.
        rows: (modality, label) -> row of the prompt table.
        patch_size: x y z.
        max_prompts: of one patch.
        rules: of a patch.
        batch_size: patches a batch.
        mode: `mixed` regions, or one `region` a batch.
        seed: of all draws.
    """

    sources: Sequence[Source]
    rows: Mapping[tuple[str, str], int]
    patch_size: tuple[int, int, int]
    max_prompts: int
    rules: PatchRules
    batch_size: int
    mode: BatchMode
    seed: int

    def sources_of(self, number: int) -> list[Source]:
        """The sources of a batch."""
        rng = np.random.default_rng([self.seed, 1, number])
        weights = np.array([s.weight for s in self.sources])
        if self.mode == "region":
            region = self.sources[rng.choice(len(weights), p=weights / weights.sum())].region
            weights = np.where([s.region == region for s in self.sources], weights, 0.0)
        chosen = rng.choice(len(weights), size=self.batch_size, p=weights / weights.sum())
        return [self.sources[int(i)] for i in chosen]

    def batch(self, number: int) -> Batch:
        """The batch of that number.

        Raises:
            StepError: a patch could not be made; the case is named.
        """
        sources = self.sources_of(number)
        patches = []
        for slot, source in enumerate(sources):
            words = (self.seed, 2, number, slot)
            try:
                patches.append(
                    draw_patch(
                        source.case,
                        size=self.patch_size,
                        labels=source.labels,
                        max_prompts=self.max_prompts,
                        seed_words=words,
                        rules=self.rules,
                    )
                )
            except (ValueError, OSError, IndexError) as error:
                raise StepError(
                    source.case.name, f"no patch: {error}", "a readable cache", "delete the cache folder and run again"
                ) from error
        return self._collated(sources, patches)

    def _collated(self, sources: Sequence[Source], patches: Sequence[Any]) -> Batch:
        asked = [[(i, self.rows[key]) for i, label in enumerate(p.labels) if (key := (s.case.modality, label)) in self.rows]
                 for s, p in zip(sources, patches, strict=True)]  # fmt: skip
        count = max(1, *(len(a) for a in asked))
        targets = torch.zeros(len(patches), count, *self.patch_size, dtype=torch.bool)
        rows = torch.zeros(len(patches), count, dtype=torch.long)
        valid = torch.zeros(len(patches), count)
        for b, (patch, pairs) in enumerate(zip(patches, asked, strict=True)):
            if pairs:
                chosen = [i for i, _ in pairs]
                targets[b, : len(pairs)] = patch.targets[chosen]
                rows[b, : len(pairs)] = torch.tensor([row for _, row in pairs])
                valid[b, : len(pairs)] = 1.0 if patch.weight is None else patch.weight[chosen]
        images = torch.stack([p.image for p in patches])
        return Batch(images, targets, rows, valid, tuple(s.region for s in sources), tuple(s.case.name for s in sources))


def make_dealer(
    cohort: Cohort,
    *,
    patch_size: tuple[int, int, int],
    max_prompts: int,
    rules: PatchRules,
    batch_size: int,
    mode: BatchMode,
    seed: int,
    by_region: bool = True,
) -> Dealer:
    """A dealer of a cohort's training cases.

    A list is drawn by its weight; within it every case alike; of a case's regions each by its number of labels to the power 3/4, or,
    without `by_region`, all of them at once (a network without experts can be asked labels of several regions in one patch).
    """
    rows = {pair: prompt.row for pair, prompt in cohort.prompts.items()}
    return Dealer(sources_of(cohort, by_region=by_region), rows, patch_size, max_prompts, rules, batch_size, mode, seed)


def sources_of(cohort: Cohort, *, by_region: bool = True) -> list[Source]:
    """What patches are drawn from, and how often; without `by_region` a patch is asked labels of all regions."""
    sources = []
    for name, cases in cohort.parts["train"].items():
        for case in cases:
            chances = _chances(cohort, case) if by_region else {EVERY_REGION: 1.0}
            weight = cohort.weights[name] / len(cases) / sum(chances.values())
            for region, chance in chances.items():
                labels = cohort.labels_of(case, None if region == EVERY_REGION else region, absent=True)
                sources.append(Source(case, region, tuple(labels), weight * chance))
    return sources


def _chances(cohort: Cohort, case: CachedCase) -> dict[str, float]:
    """Region -> how often it is asked of a case: more for more labels, little where all of them are known to be absent."""
    there, known = cohort.regions_of(case), cohort.regions_of(case, absent=True)
    counts = {region: len(cohort.labels_of(case, region)) for region in there}
    return {region: counts[region] ** 0.75 if region in counts else _ABSENT_SHARE for region in known}


def region_shares(cohort: Cohort) -> dict[str, float]:
    """Region -> share of the patches that are drawn from it."""
    shares: dict[str, float] = {}
    for source in (sources := sources_of(cohort)):
        shares[source.region] = shares.get(source.region, 0.0) + source.weight
    return {region: weight / sum(s.weight for s in sources) for region, weight in shares.items()}


def make_rules(patches: Mapping[str, Any], synthesis: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> PatchRules:
    """Rules of a study from its plain values; nested rules (`warp`, `grey`) are mappings.

    Raises:
        InputError: a name that the rules do not know.
    """
    made: PatchRules = _rules(PatchRules, "patches", {**patches, "synthesis": synthesis, "intensity": rule_of(preprocessing)})
    return made


def _rules(kind: Any, where: str, values: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in known:
            raise UnknownNameError(where, name, known)
    made = {}
    for name, value in values.items():
        default = known[name].default_factory
        nested = default() if default is not MISSING else None
        if isinstance(value, Mapping) and is_dataclass(nested):
            made[name] = _rules(type(nested), f"{where}.{name}", value)
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def batches_ahead(dealer: Dealer, numbers: Sequence[int], *, workers: int = 0) -> Iterator[Batch]:
    """Batches of these numbers in their order, made ahead in a thread (workers 0) or in processes.

    Raises:
        StepError: a batch could not be made.
    """
    return _from_processes(dealer, numbers, workers) if workers else _from_thread(dealer, numbers)


def _from_thread(dealer: Dealer, numbers: Sequence[int]) -> Iterator[Batch]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="patches") as pool:
        waiting: list[Future[Batch]] = []
        try:
            for place in range(len(numbers)):
                while len(waiting) < _AHEAD and place + len(waiting) < len(numbers):
                    waiting.append(pool.submit(dealer.batch, numbers[place + len(waiting)]))
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _from_processes(dealer: Dealer, numbers: Sequence[int], workers: int) -> Iterator[Batch]:
    dealt = _Dealt(dealer, numbers)
    yield from DataLoader(dealt, batch_size=None, shuffle=False, num_workers=workers, prefetch_factor=_AHEAD)


class _Dealt(Dataset[Batch]):
    """A dealer's batches as torch's loader wants them."""

    def __init__(self, dealer: Dealer, numbers: Sequence[int]) -> None:
        self._dealer, self._numbers = dealer, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Batch:
        return self._dealer.batch(self._numbers[place])
