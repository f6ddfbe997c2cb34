"""From stable ranks to integers: alpha rules, budgets, lists of given ranks."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medlore.assets import asset_path
from medlore.errors import DataError, InputError, TargetError, UnknownNameError
from medlore.files import existing_file
from medlore.ranks.places import Target

LIST_SCHEMA = "medlore/rank-list/1"
LISTS_PREFIX = "medlore:rank-lists/"
_PEFT_ALPHA = 8.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class AlphaRule:
    """How alpha follows from the rank; PEFT multiplies an update by alpha / rank, with rsLoRA by alpha / √rank.

    ========== ================ ===================
    kind       alpha            scaling
    ========== ================ ===================
    rank       factor · rank    factor
    rslora     factor           factor / √rank
    constant   factor           factor / rank
    ========== ================ ===================
    """

    kind: Literal["rank", "rslora", "constant"]
    factor: float

    def alpha(self, rank: int) -> float:
        """The alpha of one target."""
        return self.factor * rank if self.kind == "rank" else self.factor

    def scaling(self, alpha: float, rank: int) -> float:
        """What the product of the factors is multiplied with."""
        return alpha / math.sqrt(rank) if self.kind == "rslora" else alpha / rank

    def __str__(self) -> str:
        return f"{self.factor:g}" if self.kind == "constant" else f"{self.kind}*{self.factor:g}"


def alpha_rule(text: str | float) -> AlphaRule:
    """Read `rank`, `rank*2`, `rslora`, `rslora*16`, or a number.

    Examples:
        >>> alpha_rule("rank*2").alpha(8), alpha_rule(1).scaling(1.0, 4)
        (16.0, 0.25)
    """
    kind, star, number = str(text).strip().partition("*")
    default = {"rank": 1.0, "rslora": _PEFT_ALPHA}
    try:
        factor = default.get(kind, math.nan) if not star else float(number)
        rule = AlphaRule(kind, factor) if kind in default else AlphaRule("constant", float(str(text)))  # type: ignore[arg-type]
    except ValueError:
        rule = AlphaRule("constant", math.nan)
    if not (math.isfinite(rule.factor) and rule.factor > 0):
        raise InputError("alpha", f"{text!r}", "rank, rank*C, rslora, rslora*C, or a number C, with C > 0", "use rank for a scaling of 1")
    return rule


@dataclass(frozen=True)
class Budget:
    """How many parameters the factor pairs may have together."""

    parameters: int
    text: str


def read_budget(text: str | float, targets: Sequence[Target], *, model_parameters: int) -> Budget:
    """Read `250000`, `0.5M`, `2%` (of all parameters of the source), or `uniform:8` (as many as rank 8 everywhere).

    Raises:
        InputError: none of these, or less than rank 1 everywhere costs.
    """
    spelled = str(text).strip().lower()
    if match := re.fullmatch(r"uniform:(\d+)", spelled):
        parameters = sum(_cost(t) * min(int(match[1]), *t.shape) for t in targets)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", spelled):
        parameters = int(float(match[1]) / 100 * model_parameters)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmg]?)", spelled):
        parameters = int(float(match[1]) * _UNITS[match[2]])
    else:
        raise InputError("--budget", f"{text!r}", "parameters (250000, 0.5M), a share (2%), or uniform:K", "give for example --budget 2%")
    return Budget(parameters, spelled)


def share_budget(
    stable_ranks: Sequence[float], targets: Sequence[Target], budget: Budget, *, min_rank: int, max_rank: int | None
) -> list[int]:
    """Integer ranks in proportion to the stable ranks, together as close below the budget as the largest remainders allow.

    One factor scales all ranks, so that with bounds kept (`min_rank`, `max_rank` and the smaller side of each matrix) the
    parameters meet the budget; the whole parts are taken, then one more where the cut-off part is largest and still fits.

    Raises:
        InputError: the budget lies below what `min_rank` everywhere costs.
    """
    costs = [_cost(t) for t in targets]
    bounds = [rank_bounds(t, min_rank, max_rank) for t in targets]
    least, most = (sum(c * b[i] for c, b in zip(costs, bounds, strict=True)) for i in (0, 1))
    if budget.parameters < least:
        raise InputError(
            "--budget", f"{budget.text} is {budget.parameters} parameters", f"at least {least} (rank {min_rank} everywhere)", "give more"
        )
    if budget.parameters >= most:
        return [b[1] for b in bounds]
    wishes = _scaled_to(stable_ranks, costs, bounds, budget.parameters)
    ranks = [math.floor(w + 1e-9) for w in wishes]
    left = budget.parameters - sum(c * r for c, r in zip(costs, ranks, strict=True))
    for i in sorted(range(len(ranks)), key=lambda i: (ranks[i] - wishes[i], i)):
        if ranks[i] < bounds[i][1] and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


def rank_bounds(target: Target, min_rank: int, max_rank: int | None) -> tuple[int, int]:
    """Smallest and largest rank of one target: never more than the smaller side of its matrix."""
    top = min(target.shape) if max_rank is None else min(max_rank, *target.shape)
    return min(min_rank, top), top


def given_ranks(ranks: str | Path | Sequence[Any] | Mapping[str, int], targets: Sequence[Target]) -> list[int]:
    """One rank for each target, from a file, a shipped list, a nested list of pairs, or a mapping of names.

    A nested list holds `[rank of q and v, rank of the output projection]` for each block in depth order, with or without a
    further level for stages; triples `[q, v, output]` are accepted too. A mapping gives ranks by name, or by
    `name:part` inside a fused matrix.

    Raises:
        DataError: the file holds something else.
        TargetError: blocks or names do not fit the targets; all of them are listed.
    """
    where = "--ranks" if not isinstance(ranks, str | Path) else str(ranks)
    content = _read_list(ranks) if isinstance(ranks, str | Path) else ranks
    if isinstance(content, Mapping):  # noqa: SIM108 - one line would be too long to read
        chosen = _by_name(content, targets, where)
    else:
        chosen = _by_block(_innermost(content, where), targets, where)
    faults = [
        f"{t.name} ({t.part}): rank {r} is outside 1..{min(t.shape)}"
        for t, r in zip(targets, chosen, strict=True)
        if not 1 <= r <= min(t.shape)
    ]
    if faults:
        raise TargetError(where, f"{len(faults)} ranks do not fit", "ranks from 1 to the smaller side", "correct the list", faults=faults)
    return chosen


def shipped_rank_lists() -> list[str]:
    """Names of the published lists that ship with the package, each to be given as `medlore:rank-lists/NAME`."""
    return sorted(p.stem for p in asset_path("rank-lists").glob("*.json"))


def _cost(target: Target) -> int:
    return target.experts * sum(target.shape)


def _scaled_to(values: Sequence[float], costs: Sequence[int], bounds: Sequence[tuple[int, int]], parameters: int) -> list[float]:
    """`values` times the one factor at which the bounded sum of costs is `parameters`; found by bisection."""

    def at(factor: float) -> list[float]:
        return [min(max(v * factor, low), high) for v, (low, high) in zip(values, bounds, strict=True)]

    low, high = 0.0, max(b[1] / v for b, v in zip(bounds, values, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        if sum(c * w for c, w in zip(costs, at(middle), strict=True)) > parameters:
            high = middle
        else:
            low = middle
    return at(low)


def _read_list(path: str | Path) -> Any:
    label = str(path)
    if label.startswith(LISTS_PREFIX):
        name = label.removeprefix(LISTS_PREFIX)
        if name not in shipped_rank_lists():
            raise UnknownNameError("--ranks", name, shipped_rank_lists())
        path = asset_path("rank-lists") / f"{name}.json"
    text = existing_file(path, where="--ranks").read_text(encoding="utf-8", errors="replace")
    bare = re.sub(r"^\s*\w+\s*=\s*", "", text)  # `lora_ranks = [[9, 10], ...]`, as it stands in a configuration
    try:
        content = json.loads(bare)
    except (ValueError, RecursionError):
        try:
            content = ast.literal_eval(bare.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(label, "neither JSON nor a list", "[[9, 10], [25, 35], ...] or a plan", "correct the file") from error
    if isinstance(content, dict) and isinstance(content.get("ranks"), list | dict):
        return content["ranks"]
    return content


def _by_name(content: Mapping[str, Any], targets: Sequence[Target], where: str) -> list[int]:
    known = {name for t in targets for name in (t.name, f"{t.name}:{t.part}")}
    faults = [f"{name!r} names no target" for name in content if name not in known]
    chosen = []
    for t in targets:
        rank = content.get(f"{t.name}:{t.part}", content.get(t.name))
        if isinstance(rank, bool) or not isinstance(rank, int):
            faults.append(f"{t.name} ({t.part}): " + ("no rank given" if rank is None else f"rank {rank!r} is no whole number"))
        else:
            chosen.append(rank)
    if faults:
        raise TargetError(where, f"{len(faults)} names do not fit", "one whole rank for each target", "correct the list", faults=faults)
    return chosen


def _innermost(content: Any, where: str) -> list[list[int]]:
    """The innermost lists of whole numbers, in order."""
    if not isinstance(content, list | tuple):
        raise DataError(where, f"holds {content!r:.40}", "nested lists of whole numbers", "write [[9, 10], [25, 35], ...]")
    if content and all(isinstance(item, int) and not isinstance(item, bool) for item in content):
        return [list(content)]
    return [inner for item in content for inner in _innermost(item, where)]


def _by_block(rows: list[list[int]], targets: Sequence[Target], where: str) -> list[int]:
    groups = list(dict.fromkeys(t.group for t in targets))
    strange = sorted({t.part for t in targets} - {"q", "k", "v", "o"})
    faults = [f"block {i}: {row} is neither a pair nor a triple" for i, row in enumerate(rows) if len(row) not in (2, 3)]
    if strange:
        faults.append(f"targets of kind {', '.join(strange)}: a list of blocks gives ranks to q, k, v and o only")
    if len(rows) != len(groups):
        faults.append(f"{len(rows)} blocks in the list, {len(groups)} in the model")
    if faults:
        raise TargetError(where, "the list does not fit the model", f"{len(groups)} pairs", "give the list of this model", faults=faults)
    position = {"q": 0, "k": 0, "v": -2, "o": -1}
    by_group = dict(zip(groups, rows, strict=True))
    return [by_group[t.group][position[t.part]] for t in targets]
