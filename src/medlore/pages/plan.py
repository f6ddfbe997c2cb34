"""A rank plan as pieces of a page."""

from __future__ import annotations

import tempfile
from pathlib import Path

from medlore.pages import Facts, Picture, Piece, Table
from medlore.pages.pieces import Cell


def plan_pieces(path: Path) -> list[Piece]:
    """Picture, totals and table of a rank plan.

    Raises:
        DataError: not a rank plan.
    """
    from medlore.inspecting.ranks import draw_profile
    from medlore.ranks.plan import RankPlan

    plan = RankPlan.load(path)
    with tempfile.TemporaryDirectory() as folder:
        picture = Picture.from_file(draw_profile(plan, Path(folder) / "ranks.png"), "Ranks by depth")
    rows = [
        (x.name, x.part, f"{x.shape[0]} × {x.shape[1]}", x.stable_rank, x.rank, float(x.alpha), x.parameters, x.decided_by)
        for x in plan.layers
    ]
    columns = ("layer", "part", "shape", "stable rank", "rank", "alpha", "parameters", "decided by")
    facts: dict[str, Cell] = {
        "rule": plan.rule,
        "factor pairs": len(rows),
        "parameters": plan.parameters,
        "one rank with the same parameters": plan.uniform_rank,
    }
    return [Facts(facts), picture, Table(columns, rows, f"All {len(rows)} factor pairs", folded=True)]
