"""Names of rank rules in a study: whatever `ranks.rule_table.RULES` has for experts, and the variants that are named after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import pydantic

from medlore.ranks.rule_table import RULES

_PREFIX = "experts-"


def _accepted() -> list[str]:
    return [name for name, rule in RULES.items() if rule.experts is not None]


def _known_rule(name: str) -> str:
    if name not in _accepted():
        raise ValueError(f"no rank rule for experts; accepted are {', '.join(_accepted())}")
    return name


ExpertRule = Annotated[str, pydantic.AfterValidator(_known_rule)]


def rule_of_variant(variant: str) -> str | None:
    """The rule of `experts-RULE`; None for another variant.

    Example:
        >>> rule_of_variant("experts-uniform"), rule_of_variant("experts")
        ('uniform', None)
    """
    return variant.removeprefix(_PREFIX) if variant.startswith(_PREFIX) else None


def one_of_variants(*own: str) -> Callable[[str], str]:
    """A validator of names of variants: those of a study's kind, and `experts-RULE` for every rule."""

    def check(name: str) -> str:
        accepted = [*own, *(f"{_PREFIX}{rule}" for rule in _accepted())]
        if name not in accepted:
            raise ValueError(f"no such variant; accepted are {', '.join(accepted)}")
        return name

    return check
