"""Methods that add modules to the network: which there are, how each is built again from its description, how it is taken up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pydantic
from torch import nn

from medlore.layers.tuning.adapters import (
    RepAdapter,
    fold_repadapters,
    install_adapters,
    install_adaptformer,
    install_repadapters,
)
from medlore.layers.tuning.attach import attached, fold
from medlore.layers.tuning.generalized import install_generalized
from medlore.layers.tuning.options import TuningOptions
from medlore.layers.tuning.prompts import install_prompts
from medlore.layers.tuning.scale_shift import install_scale_shift

ModuleKind = Literal["adapter", "adaptformer", "repadapter", "vpt-shallow", "vpt-deep", "ssf", "glora"]


@dataclass(frozen=True)
class AddedModules:
    """All that is needed to add the same modules to the same backbone again; their weights come from a file.

    Attributes:
        kind: the method.
        options: its sizes.
        ranks: layer -> rank, for methods with low-rank supports.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    kind: ModuleKind
    options: TuningOptions = field(default_factory=TuningOptions)
    ranks: dict[str, int] = field(default_factory=dict)


_Build = Callable[[nn.Module, AddedModules, str], None]
_BUILD: dict[ModuleKind, _Build] = {
    "adapter": lambda model, added, head: install_adapters(model, added.options),
    "adaptformer": lambda model, added, head: install_adaptformer(model, added.options),
    "repadapter": lambda model, added, head: install_repadapters(model, added.options),
    "vpt-shallow": lambda model, added, head: install_prompts(model, added.options, deep=False),
    "vpt-deep": lambda model, added, head: install_prompts(model, added.options, deep=True),
    "ssf": lambda model, added, head: install_scale_shift(model, added.options, head),
    "glora": lambda model, added, head: install_generalized(model, added.options, added.ranks),
}


def add_modules(model: nn.Module, added: AddedModules, head: str) -> None:
    """Add what `added` describes; every new parameter trains.

    Args:
        model: a backbone without additions.
        added: what is added.
        head: module name of its head, to which nothing is added.

    Raises:
        TargetError: the network is not built as the method needs it.
        InputError: sizes that do not fit it.
    """
    _BUILD[added.kind](model, added, head)


def absorb(model: nn.Module) -> nn.Module:
    """Take up into the weights what can be taken up: SSF, GLoRA, RepAdapter and factor pairs leave a plain network.

    Adapters with an activation between their layers, and prompts, stay and go on acting.
    """
    if any(isinstance(extra, RepAdapter) for _, _, extra in attached(model)):
        fold_repadapters(model)
    return fold(model)
