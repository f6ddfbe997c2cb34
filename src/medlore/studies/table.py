"""Cells -> numbers of a study: means over draws, paired differences, wins, means over sets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from medlore.metrics.draws import DrawMean, mean_difference, mean_of_draws
from medlore.metrics.mean_ranks import mean_ranks

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One contender on one set at one number of shots.

    Attributes:
        method: name of the contender.
        score: mean over draws, of means over seeds.
        difference: the reference minus this one, draw by draw; None for the reference, or without a draw that both have.
        wins: draws on which the reference was better, then equal, then worse; None where there is no difference.
        trained_parameters: with the head.
        factor_parameters: of the low-rank factors; None for methods without.
        seconds: median of one training.
        peak_memory_bytes: largest.
        over_probe: this one minus the logistic regression with the same labels, draw by draw; None where no cell names it.
    """

    method: str
    score: DrawMean
    difference: DrawMean | None
    wins: tuple[int, int, int] | None
    trained_parameters: int
    factor_parameters: int | None
    seconds: float
    peak_memory_bytes: int | None
    over_probe: DrawMean | None = None


@dataclass(frozen=True)
class SetTable:
    """All contenders on one set at one number of shots.

    Attributes:
        data: name of the set.
        shots: labelled images per class, or `all`.
        measure: name of the score.
        majority: of a constant answer; None where it is not defined.
        test_images: that judge.
        rows: in the order of the study.
    """

    data: str
    shots: int | str
    measure: str
    majority: float | None
    test_images: int
    rows: tuple[Row, ...]

    def as_values(self) -> dict[str, Any]:
        """Plain values for `report.json`."""
        return asdict(self)


def tables_of(records: Sequence[Record], *, methods: Sequence[str], reference: str) -> list[SetTable]:
    """Tables of the cells that are done, in the order in which sets and shots first appear.

    A score that is not defined leaves the means and the differences. A draw counts once: its seeds are averaged first.
    """
    usable = [r for r in records if r["state"] == "done" and r["score"] is not None]
    places = list(dict.fromkeys((r["data"], r["shots"]) for r in usable))
    return [_table([r for r in usable if (r["data"], r["shots"]) == place], methods, reference) for place in places]


def _table(own: Sequence[Record], methods: Sequence[str], reference: str) -> SetTable:
    scores = {name: _by_draw([r for r in own if r["method"] == name]) for name in methods}
    rows = [_row(name, [r for r in own if r["method"] == name], scores, reference) for name in methods if scores[name]]
    first = own[0]
    return SetTable(first["data"], first["shots"], first["measure"], first["majority"], first["images"]["test"], tuple(rows))


def _by_draw(own: Sequence[Record], what: str = "score") -> dict[int, float]:
    draws: dict[int, list[float]] = {}
    for record in own:
        draws.setdefault(record["draw"], []).append(float(record[what]))
    return {draw: statistics.fmean(values) for draw, values in sorted(draws.items())}


def _row(name: str, own: Sequence[Record], scores: Mapping[str, Mapping[int, float]], reference: str) -> Row:
    best, mine = scores.get(reference, {}), scores[name]
    shared = sorted(mine.keys() & best.keys()) if name != reference else []
    pairs = [(best[d], mine[d]) for d in shared]
    difference = mean_difference([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
    wins = (sum(a > b for a, b in pairs), sum(a == b for a, b in pairs), sum(a < b for a, b in pairs)) if pairs else None
    memory = [r["peak_memory_bytes"] for r in own if r.get("peak_memory_bytes")]
    return Row(
        name,
        mean_of_draws(list(mine.values())),
        difference,
        wins,
        own[0]["trained_parameters"],
        own[0]["factor_parameters"],
        round(statistics.median(r["training_seconds"] for r in own), 2),
        max(memory, default=None),
        _over_probe(own),
    )


def _over_probe(own: Sequence[Record]) -> DrawMean | None:
    beside = [record for record in own if record.get("probe") is not None]
    mine, theirs = _by_draw(beside), _by_draw(beside, "probe")
    return mean_difference(list(mine.values()), list(theirs.values())) if mine else None


def means_over_sets(tables: Sequence[SetTable], groups: Mapping[str, str | None], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Mean over all sets and mean of the group means, by method and shots; only of methods that all sets of those shots have.

    Args:
        tables: of all sets.
        groups: set -> group; without any group there is no mean of groups.
        methods: names of the contenders.
    """
    found = []
    for shots in dict.fromkeys(table.shots for table in tables):
        own = [table for table in tables if table.shots == shots]
        for name in methods:
            means = {table.data: row.score.mean for table in own for row in table.rows if row.method == name}
            if len(own) < 2 or len(means) < len(own):
                continue
            by_group: dict[str, list[float]] = {}
            for data, mean in means.items():
                by_group.setdefault(groups.get(data) or "", []).append(mean)
            of_groups = None if "" in by_group else statistics.fmean(statistics.fmean(values) for values in by_group.values())
            entry: dict[str, Any] = {"shots": shots, "method": name, "sets": len(means), "mean_of_sets": statistics.fmean(means.values())}
            found.append(entry | {"groups": None if "" in by_group else len(by_group), "mean_of_groups": of_groups})
    return found


def ranks_of(records: Sequence[Record], methods: Sequence[str]) -> dict[str, Any] | None:
    """Mean ranks of the methods over all draws of all sets and shots; None with fewer than two draws that all methods have.

    A draw that lacks a method is left out, and counted: without it the others would be placed among fewer.
    """
    usable = [r for r in records if r["state"] == "done" and r["score"] is not None]
    blocks: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for record in usable:
        block = blocks.setdefault((record["data"], record["shots"], record["draw"]), {})
        block.setdefault(record["method"], []).append(float(record["score"]))
    whole = [block for block in blocks.values() if block.keys() >= set(methods)]
    if len(whole) < 2 or len(methods) < 2:
        return None
    found = mean_ranks([[statistics.fmean(block[name]) for name in methods] for block in whole])
    places = dict(zip(methods, found.ranks, strict=True))
    return {
        "ranks": dict(sorted(places.items(), key=lambda item: item[1])),
        "critical_difference": found.critical_difference,
        "probability": found.probability,
        "draws": found.blocks,
        "draws_left_out": len(blocks) - len(whole),
    }
