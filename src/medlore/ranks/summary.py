"""A plan in a few lines of text: ranks by block, totals, what was seen and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from medlore.ranks.places import Seen
from medlore.ranks.planned import PlannedLayer

_MOST_LINES = 32
_REASONS_SHOWN = 6


def short_table(layers: Sequence[PlannedLayer]) -> str:
    """Ranks of each block, one line per block and one column a part; layers outside blocks have a line each.

    Examples:
        >>> import torch, medlore
        >>> block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q", "k", "v", "o")})})
        >>> print(short_table(medlore.plan_ranks(block, rule="uniform:2").layers))
        block  q  v  o
        attn   2  2  2
    """
    parts = list(dict.fromkeys(layer.part for layer in layers))
    lines: dict[str, dict[str, list[str]]] = {}
    for layer in layers:
        lines.setdefault(layer.group or layer.name, {}).setdefault(layer.part, []).append(str(layer.rank))
    rows = [[name, *(" ".join(cells.get(part, ())) for part in parts)] for name, cells in lines.items()]
    if len(rows) > _MOST_LINES:
        rows = [*rows[: _MOST_LINES // 2], ["...", *[""] * len(parts)], *rows[-_MOST_LINES // 2 :]]
    return aligned([["block", *parts], *rows])


def totals_line(layers: Sequence[PlannedLayer], model_parameters: int) -> str:
    """Factor pairs and parameters, and their share of the model's where that is known (above 0)."""
    parameters = sum(layer.parameters for layer in layers)
    share = f", {100 * parameters / model_parameters:.2f} % of {model_parameters:,}" if model_parameters else ""
    return f"{len(layers)} factor pairs, {parameters:,} parameters{share}"


def coverage_lines(coverage: Sequence[Seen]) -> list[str]:
    """How many modules were seen and taken, and the reasons for the rest, each with its number and its first module."""
    lines = []
    for kind in ("attention", "mlp"):
        here = [s for s in coverage if s.kind == kind]
        if not here:
            continue
        counts = Counter(s.outcome for s in here)
        probed = sum(s.order == "probed" for s in here)
        named = sum(s.order == "by name" and s.outcome != "left out" for s in here)
        outcomes = [f"{counts[o]} {o}" for o in ("taken", "in part", "left out") if counts[o]]
        rows = [f"rows of {n} fused identified {how}" for n, how in ((probed, "by probing"), (named, "by name")) if n]
        what = "attention modules" if kind == "attention" else "MLPs"
        lines.append("; ".join([f"{len(here)} {what} seen: {', '.join(outcomes)}", *rows]))
    reasons: dict[str, list[str]] = {}
    for seen in coverage:
        if seen.why:
            reasons.setdefault(_kind_of(seen), []).append(seen.path)
    for reason, paths in list(reasons.items())[:_REASONS_SHOWN]:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"  {paths[0] or 'the module itself'}{more}: {reason}")
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"  and {len(reasons) - _REASONS_SHOWN} more reasons; --json and the plan file list every module")
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _kind_of(seen: Seen) -> str:
    """A reason without the name of the one module, so that equal ones are reported once."""
    return seen.why.replace(f"{seen.path}.", "").replace(f"{seen.path}:", "")
