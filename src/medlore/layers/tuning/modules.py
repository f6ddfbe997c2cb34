"""What a method has added to a network: its description in `medlore.json`, and how it is taken up into the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pydantic
from torch import nn

from medlore.layers.tuning.adapters import RepAdapter, fold_repadapters
from medlore.layers.tuning.attach import attached, fold


@dataclass(frozen=True)
class AddedModules:
    """All that is needed to add the same modules to the same backbone again; their weights come from a file.

    Attributes:
        kind: the method.
        options: its own options by name.
        ranks: layer -> rank, for methods with low-rank supports.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


def absorb(model: nn.Module) -> nn.Module:
    """Take up into the weights what can be taken up: SSF, GLoRA, RepAdapter and factor pairs leave a plain network.

    Adapters with an activation between their layers, and prompts, stay and go on acting.
    """
    if any(isinstance(extra, RepAdapter) for _, _, extra in attached(model)):
        fold_repadapters(model)
    return fold(model)
