"""What few-shot tuning of a segmenter is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from medlore.runs.hardware import DeviceChoice
from medlore.runs.settings import Settings, known_name, setting

GROUP = "Segmenter: a pack and about five masks"
RATES = {"sr-lora": 2e-3, "lora": 2e-3, "full": 5e-4, "scratch": 1e-3}  # method -> learning rate where none is given


class FewShotSettings(Settings):
    """Few-shot tuning of a segmenter.

    `method`: `sr-lora` puts factors into every convolution, ranks by stable rank; `lora` takes the same number of parameters at one
    rank; `full` trains all weights; `scratch` all weights, drawn anew.
    """

    model: str = setting(..., "A pack, a published file or medlore:NAME.", group=GROUP, path=True)
    cases: Path = setting(
        ..., "Case list (jsonl) with masks; lines with `split: test` are evaluated and never used for training.", group=GROUP
    )
    method: str = setting("sr-lora", f"{', '.join(RATES)}.", group=GROUP)
    rank: int = setting(4, "The uniform rank; sr-lora has the same number of parameters.", group=GROUP, ge=1)
    scaling: float = setting(1.0, "Scaling of the product of the factors.", group=GROUP, gt=0)
    region: str | None = setting(None, "Region whose expert is tuned; default the region in vocabulary and pack.", group=GROUP)
    steps: int = setting(300, "Optimiser steps.", group=GROUP, ge=1)
    batch_size: int = setting(1, "Patches per step.", group=GROUP, ge=1)
    learning_rate: float | None = setting(None, "Peak learning rate; default the method's.", group=GROUP, gt=0)
    patch_size: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt] = setting(
        (64, 64, 64), "Size of the training patches; multiples of the network's patch.", group=GROUP
    )
    max_prompts: int = setting(8, "Largest number of prompts per patch.", group=GROUP, ge=1)
    patches: dict[str, Any] = setting({}, "How patches are drawn and augmented; see PatchRules.", group=GROUP, flags=())
    weights: Literal["fp16", "fp32"] = setting("fp16", "Number type in which the new pack is stored.", group=GROUP, decides=False)
    seed: int = setting(0, "Seed of factors, patches and augmentation.", group=GROUP, ge=0, lt=2**32)
    device: DeviceChoice = setting("auto", "Device to run on.", group=GROUP, decides=False)
    precision: Literal["fp32", "bf16"] = setting("fp32", "Numeric precision of the training.", group=GROUP)

    @pydantic.field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: object) -> object:
        return known_name(value, RATES)

    @pydantic.field_validator("patches")
    @classmethod
    def _patches(cls, values: dict[str, Any]) -> dict[str, Any]:
        from medlore.decomposing.segmenters.rule_settings import checked_patches

        return checked_patches(values) if values else values
