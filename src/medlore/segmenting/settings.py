"""What a run of `medlore segment` is asked to do, and which part of it decides the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pydantic

from medlore.runs.settings import DeviceChoice, Settings


class SegmentSettings(Settings):
    """What a run of `medlore segment` is asked to do.

    Either `cases` (a jsonl, a folder of volumes, or one DICOM series) or `image` is given; a folder or image needs
    `labels`, and `modality` unless it is DICOM.
    """

    model: str
    out: Path
    cases: Path | None = None
    image: Path | None = None
    labels: tuple[str, ...] = ()
    modality: str | None = None
    region: str | None = None
    expert_by: Literal["label", "dataset"] = "label"
    allow_unknown: bool = False
    orientation_code: str | None = None
    affine_from: Literal["auto", "sform", "qform"] = "auto"
    device: DeviceChoice = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    memory: str | None = None
    roi_size: tuple[int, int, int] | None = None
    overlap: float | None = pydantic.Field(default=None, ge=0, lt=1)
    sw_batch_size: int = pydantic.Field(default=1, ge=1)
    max_queries: int = pydantic.Field(default=256, ge=1)
    published: bool = False
    grid: Literal["original", "processed"] = "original"
    resample: Literal["probability", "nearest"] = "probability"
    redraw_tissues: bool = True
    overlap_rule: Literal["small-over-large", "given"] = "small-over-large"
    image_copy: bool = True
    picture: bool = True
    dicom_seg: bool = False
    resume: bool = True
    engine: Literal["local", "ray"] = "local"
    workers: int = pydantic.Field(default=1, ge=1)
    prompt_embeddings: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    lora_alpha: float | None = None


# Counts up when the same image, model and settings give other masks, so that older results are not taken over.
RULES_VERSION = 2

# What changes the masks; a finished case is skipped only if all of it is unchanged.
DECISIVE = (
    "region", "expert_by", "allow_unknown", "affine_from", "precision", "roi_size", "overlap", "published", "grid", "resample",
    "redraw_tissues", "overlap_rule", "lora_alpha", "dicom_seg",
)  # fmt: skip
