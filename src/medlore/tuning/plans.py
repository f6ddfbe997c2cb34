"""The ranks of a tuning run: a plan or a list from a file, stable ranks, or one rank."""

from __future__ import annotations

from collections.abc import Hashable

from medlore.models.backbones.reading import Backbone
from medlore.models.backbones.store import BackboneStore
from medlore.ranks.allocate import plan_ranks
from medlore.ranks.plan import RankPlan
from medlore.ranks.rule_table import RULES
from medlore.tuning.rank_tracking import RankTracking
from medlore.tuning.settings import FinetuneSettings


def plan_once(settings: FinetuneSettings, backbone: Backbone, backbones: BackboneStore, cut: Hashable = None) -> RankPlan | None:
    """`choose_plan`, asked once for a backbone and what it depends on; plans and lists from files are read anew.

    Args:
        settings: of the run.
        backbone: the one that `backbones` gave last.
        backbones: where the answer is kept.
        cut: where the backbone was cut since.
    """
    wanted = settings.allocation
    from_file = wanted.plan is not None or wanted.ranks is not None
    key = (settings.method, settings.training.seed, settings.method_options(), cut, *wanted.flat().values())
    store = BackboneStore() if from_file else backbones
    return store.once(backbone, key, lambda: choose_plan(settings, backbone))


def choose_plan(settings: FinetuneSettings, backbone: Backbone) -> RankPlan | None:
    """The ranks of a run: a plan or a list from a file, stable ranks, or one rank.

    `rank: equal` is the one rank whose factors have about as many parameters as those of the stable ranks.

    Raises:
        TargetError: a plan for other weights, or a model without such targets.
    """
    method, wanted = settings.way(), settings.allocation
    if method.rule is None:
        return None
    if wanted.plan is not None:
        return RankPlan.load(wanted.plan).for_model(backbone.model)
    alpha = wanted.alpha or method.alpha

    def planned(rule: str, scale: float = 1.0, budget: str | None = None) -> RankPlan:
        return plan_ranks(
            backbone.model,
            targets=wanted.targets,
            granularity=wanted.granularity,
            rule=rule,
            ranks=wanted.ranks if rule == "given" else None,
            scale=scale,
            budget=budget,
            alpha=alpha,
            seed=settings.training.seed,
        )

    if wanted.ranks is not None:
        return planned("given")
    rule = RULES[method.rule]
    if not rule.numbered:
        return planned(method.rule, wanted.scale, wanted.budget) if rule.measures else planned(method.rule)
    if wanted.rank == "equal":
        pairs = method.pairs(settings.method_options())  # that share the parameters of one
        return planned(f"uniform:{pairs * max(1, round(planned('stable-rank', wanted.scale, wanted.budget).uniform_rank))}")
    return planned(f"{method.rule}:{wanted.rank}")


def tracking_of(settings: FinetuneSettings, backbone: Backbone, plan: RankPlan | None) -> RankTracking | None:
    """Follows the planned layers; methods without a plan are followed on the same targets."""
    if not settings.run.track_stable_rank:
        return None
    followed = plan or plan_ranks(backbone.model, targets=settings.allocation.targets, rule="uniform:1")
    return RankTracking(backbone.model, [layer.name for layer in followed.layers])
