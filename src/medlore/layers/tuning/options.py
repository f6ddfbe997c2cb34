"""Options of single methods, with the values of their papers; each stands in the table of methods beside its method.

A field says its type, limits and one sentence of help; flags, settings and tables are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from medlore.errors import InputError

Support = Literal["lora", "vector", "scalar", "none"]

DEFAULT_PATH = "lora,lora,lora,vector,vector"
# A, B; then C, which has no scalar form; then D and E, which have no low-rank form
_SUPPORTS: tuple[tuple[Support, ...], ...] = (
    *(get_args(Support),) * 2,
    ("lora", "vector", "none"),
    *(("vector", "scalar", "none"),) * 2,
)


@dataclass(frozen=True)
class NoOptions:
    """Of methods that have none."""


@dataclass(frozen=True)
class AdapterSizes:
    """Inner width of an adapter, factor on its output, dropout on its inner activations."""

    bottleneck: int
    scale: float
    dropout: float


Bottleneck = Annotated[int, Field(ge=1, description="Inner width of adapters.")]
AdapterScale = Annotated[float, Field(gt=0, description="Factor on the output of an adapter.")]
AdapterDropout = Annotated[float, Field(ge=0, lt=1, description="Dropout on the inner activations of an adapter.")]


@dataclass(frozen=True)
class AdapterOptions:
    """Houlsby et al. 2019 find 64 best of 8, 64 and 256 with a fixed size."""

    bottleneck: Bottleneck = 64
    adapter_scale: AdapterScale = 1.0
    adapter_dropout: AdapterDropout = 0.0

    def sizes(self) -> AdapterSizes:
        """For the modules."""
        return AdapterSizes(self.bottleneck, self.adapter_scale, self.adapter_dropout)


@dataclass(frozen=True)
class AdaptFormerOptions(AdapterOptions):
    """AdaptFormer, section 4.1."""

    adapter_scale: AdapterScale = 0.1
    adapter_dropout: AdapterDropout = 0.1


@dataclass(frozen=True)
class RepAdapterOptions(AdapterOptions):
    """RepAdapter: 8, s = 1."""

    bottleneck: Bottleneck = 8
    adapter_dropout: AdapterDropout = 0.1


@dataclass(frozen=True)
class PromptOptions:
    """Of VPT."""

    prompt_length: Annotated[int, Field(ge=1, description="Prompt tokens of vpt.")] = 10


@dataclass(frozen=True)
class MiniPairOptions:
    """Of MELoRA."""

    mini_loras: Annotated[int, Field(ge=1, description="Pairs along the diagonal of a matrix.")] = 4


@dataclass(frozen=True)
class MaskedPairOptions:
    """Of CapaBoost."""

    tied_layers: Annotated[int, Field(ge=1, description="Masked copies of one pair.")] = 2
    mask_density: Annotated[float, Field(gt=0, le=1, description="Share of the entries that a mask keeps.")] = 0.5


@dataclass(frozen=True)
class PartialOptions:
    """Of tuning the last blocks."""

    last_blocks: Annotated[int, Field(ge=1, description="Blocks at the end that are trained.")] = 2


def supports_of(path: str) -> tuple[Support, Support, Support, Support, Support]:
    """The five words of a GLoRA path.

    Examples:
        >>> supports_of("lora,none,vector,scalar,none")
        ('lora', 'none', 'vector', 'scalar', 'none')

    Raises:
        InputError: not five words, or words that a support does not know; all are listed.
    """
    words = [word.strip() for word in path.split(",")]
    faults = [] if len(words) == 5 else [f"{len(words)} words"]
    faults += [
        f"{letter}: {word!r}, known are {', '.join(known)}"
        for letter, word, known in zip("ABCDE", words, _SUPPORTS, strict=False)
        if word not in known
    ]
    if faults:
        raise InputError("glora_path", repr(path), "five words for A, B, C, D, E", f"use {DEFAULT_PATH}", faults=faults)
    a, b, c, d, e = words
    return a, b, c, d, e  # type: ignore[return-value]


def _path(value: str) -> str:
    try:
        supports_of(value)
    except InputError as error:
        raise ValueError(f"five words for A, B, C, D, E: {'; '.join(error.faults)}") from error
    return value


@dataclass(frozen=True)
class GeneralizedOptions:
    """Of GLoRA."""

    glora_path: Annotated[str, AfterValidator(_path), Field(description="Form of the five supports A, B, C, D, E.")] = DEFAULT_PATH
