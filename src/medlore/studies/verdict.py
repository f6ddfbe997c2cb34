"""The last sentence of a study: on each set, what its best method has over the constant answer and over the probe, and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from medlore.metrics.draws import DrawMean, mean_difference
from medlore.studies.table import Record, SetTable

PROBE = "linear-probe"


def verdict_of_study(tables: Sequence[SetTable], records: Sequence[Record], methods: Mapping[str, str]) -> str:
    """One sentence a table.

    Args:
        tables: of the cells that are done.
        records: of the cells.
        methods: name of each contender -> its method.
    """
    return " ".join(_of_table(table, records, methods) for table in tables)


def _of_table(table: SetTable, records: Sequence[Record], methods: Mapping[str, str]) -> str:
    best = max(table.rows, key=lambda row: row.score.mean)
    lead = f"{table.data}, {table.shots} shots: {best.method} is highest with {best.score.mean:.3f}, {_over(table, best.score)}"
    probe = next((row.method for row in table.rows if methods.get(row.method) == PROBE), None)
    if probe is None:
        return f"{lead}; {_against('its probe', best.over_probe)}."
    if probe == best.method:
        return f"{lead}; no method is above this probe."
    difference = _difference(table, records, best.method, probe)
    return f"{lead}; {_against(probe, difference)}."


def _against(probe: str, difference: DrawMean | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return f"too few draws to compare it with {probe}"
    size = f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f} over draws)"
    word = "better" if difference.low > 0 else "worse" if difference.high < 0 else "not told apart"
    return f"against {probe} {size}: {word}"


def _over(table: SetTable, score: DrawMean) -> str:
    if table.majority is None:
        return "with no constant answer to compare it with"
    if score.low is None:
        return f"where a constant answer has {table.majority:.3f}"
    if score.low > table.majority:
        return f"better than a constant answer ({table.majority:.3f})"
    return f"which these draws cannot tell from a constant answer ({table.majority:.3f})"


def _difference(table: SetTable, records: Sequence[Record], one: str, other: str) -> DrawMean | None:
    """The one minus the other on the draws that both have, seeds averaged."""

    def by_draw(name: str) -> dict[int, float]:
        draws: dict[int, list[float]] = {}
        for record in records:
            own: Any = record.get("score")
            if (record["data"], record["shots"], record["method"]) == (table.data, table.shots, name) and own is not None:
                draws.setdefault(record["draw"], []).append(float(own))
        return {draw: statistics.fmean(values) for draw, values in draws.items()}

    mine, theirs = by_draw(one), by_draw(other)
    shared = sorted(mine.keys() & theirs.keys())
    return mean_difference([mine[d] for d in shared], [theirs[d] for d in shared]) if shared else None
