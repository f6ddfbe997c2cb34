"""Floor 2: decisions as data. Reads a model or a weights file, never changes it."""

from medlore.ranks.allocate import plan_ranks, uniform_plan
from medlore.ranks.plan import RankPlan
from medlore.ranks.planned import PlannedLayer

__all__ = ["PlannedLayer", "RankPlan", "plan_ranks", "uniform_plan"]
