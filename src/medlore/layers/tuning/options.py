"""What a user may choose about the methods of this folder, with the values of their papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import pydantic

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
class TuningOptions:
    """Sizes of what is added. None takes the method's own default.

    Attributes:
        bottleneck: inner width of an adapter.
        adapter_scale: factor on its output.
        adapter_dropout: probability on its inner activations while training.
        prompt_length: prompt tokens (VPT).
        glora_path: form of the five supports A, B, C, D, E of GLoRA.
        mini_loras: pairs along the diagonal (MELoRA).
        tied_layers: masked copies of one pair (CapaBoost).
        mask_density: share of the entries that a mask keeps (CapaBoost).
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    bottleneck: int | None = None
    adapter_scale: float | None = None
    adapter_dropout: float | None = None
    prompt_length: int = 10
    glora_path: str = DEFAULT_PATH
    mini_loras: int = 4
    tied_layers: int = 2
    mask_density: float = 0.5


@dataclass(frozen=True)
class AdapterSizes:
    """What one kind of adapter has when the user says nothing."""

    bottleneck: int
    scale: float
    dropout: float

    def chosen(self, options: TuningOptions) -> AdapterSizes:
        """These values, with those that were chosen in their place."""
        return AdapterSizes(
            self.bottleneck if options.bottleneck is None else options.bottleneck,
            self.scale if options.adapter_scale is None else options.adapter_scale,
            self.dropout if options.adapter_dropout is None else options.adapter_dropout,
        )


# Houlsby et al. 2019 find 64 best of 8, 64 and 256 with a fixed size; AdaptFormer (section 4.1): 64, s = 0.1; RepAdapter: 8, s = 1
ADAPTER_SIZES: dict[str, AdapterSizes] = {
    "adapter": AdapterSizes(64, 1.0, 0.0),
    "adaptformer": AdapterSizes(64, 0.1, 0.1),
    "repadapter": AdapterSizes(8, 1.0, 0.1),
}


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
        raise InputError("glora_path", repr(path), "five words for A, B, C, D, E", f"take {DEFAULT_PATH}", faults=faults)
    a, b, c, d, e = words
    return a, b, c, d, e  # type: ignore[return-value]
