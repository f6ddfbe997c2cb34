"""What a run of `medlore segment` is asked to do, and which part of it decides the masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from medlore.runs.hardware import DeviceChoice, Precision
from medlore.runs.settings import Settings, known_name, setting
from medlore.segmenting.expectations import CheckLevel
from medlore.segmenting.mask_formats import MASK_FORMATS

# Counts up when the same image, model and settings give other masks, so that older results are not taken over.
RULES_VERSION = 3

_CASES, _LABELS, _GEOMETRY, _NETWORK, _MASKS = "Cases", "Labels and experts", "Geometry", "Network", "Masks"
_CHECKS = "Checks and maps"
_HARDWARE, _PUBLISHED, _RUN = "Hardware", "Published files", "Run"


def _label_words(given: Mapping[str, Any]) -> list[str]:
    """Labels that can be asked for, with underscores for blanks: those of the pack on the line, else of the vocabulary."""
    from medlore.segmenting.labels import known_labels

    return [label.replace(" ", "_") for label in known_labels(given.get("model"), given.get("modality"))]


class SegmentSettings(Settings):
    """What a run of `medlore segment` is asked to do.

    Either `cases` (a jsonl, a folder of volumes, or one DICOM series) or `image` is given; a folder or image needs
    `labels`, and `modality` unless it is DICOM. A finished case is skipped only if everything that decides its masks is unchanged.
    """

    cases: Path | None = setting(
        None, "A jsonl of cases, a folder of volumes, or one DICOM series (folder or zip).", argument="CASES", decides=False
    )
    model: str = setting(..., "A pack, a published .pth file, or a shipped pack (medlore:NAME).", group=_CASES, path=True, decides=False)
    out: Path = setting(..., "Folder for the results: one folder per image, and report.json.", group=_CASES, decides=False)
    image: Path | None = setting(None, "One image instead of a list of cases.", group=_CASES, decides=False)

    series: str | None = setting(None, "UID, or its end, of the DICOM series, where there are several.", group=_CASES, decides=False)
    frame: int | None = setting(None, "Which volume of a 4D image, from 0.", group=_CASES, ge=0, decides=False)

    labels: tuple[str, ...] = setting(
        (), "Comma-separated names, the name of a region, or all.", group=_LABELS, decides=False, words=_label_words
    )
    modality: str | None = setting(None, "ct, mri (also t1, t2, flair, dwi ...), pet or us.", group=_LABELS, decides=False)
    region: str | None = setting(None, "Use this region's expert for every label.", group=_LABELS)
    expert_by: Literal["label", "dataset"] = setting(
        "label", "label: the expert of each label's region; dataset: by data set, as in LoRKD.", group=_LABELS
    )
    allow_unknown: bool = setting(False, "Accept labels that the vocabulary does not know.", group=_LABELS)

    orientation_code: str | None = setting(
        None, "Orientation in which the network sees the volume, e.g. ASR.", group=_GEOMETRY, flags=("--orientation",), decides=False
    )
    affine_from: Literal["auto", "sform", "qform"] = setting(
        "auto", "Which NIfTI matrix to use if sform and qform disagree.", group=_GEOMETRY, flags=("--affine",)
    )
    grid: Literal["original", "processed"] = setting("original", "original: the image's grid; processed: the network's.", group=_GEOMETRY)
    resample: Literal["probability", "nearest"] = setting("probability", "How masks return to the image's grid.", group=_GEOMETRY)

    roi_size: tuple[int, int, int] | None = setting(None, "Size of the windows, e.g. 96,96,32; default the model's own.", group=_NETWORK)
    overlap: float | None = setting(None, "Overlap of neighbouring windows as a fraction; 0.5 as published.", group=_NETWORK, ge=0, lt=1)
    sw_batch_size: int = setting(1, "Windows per batch.", group=_NETWORK, ge=1, decides=False)
    max_queries: int = setting(256, "Prompts decoded together.", group=_NETWORK, ge=1, decides=False)
    published: bool = setting(False, "Follow the published inference exactly, for comparisons.", group=_NETWORK)

    redraw_tissues: bool = setting(True, "Redraw the borders of tissues by grey values, if the model names tissues.", group=_MASKS)
    overlap_rule: Literal["small-over-large", "given"] = setting(
        "small-over-large", "Which label keeps a voxel of the label map where two overlap; given: the later one.", group=_MASKS
    )
    image_copy: bool = setting(True, "Write image.nii.gz beside the masks.", group=_MASKS, decides=False)
    picture: bool = setting(True, "Write quality_control.png.", group=_MASKS, decides=False)
    format: tuple[str, ...] = setting(
        ("nifti",),
        f"Comma-separated formats of the masks: {', '.join(MASK_FORMATS)}.",
        group=_MASKS,
        decides=False,
        words=lambda _: MASK_FORMATS,
    )
    dicom_reference: Path | None = setting(
        None, "The DICOM series that the image was converted from, for dicom-seg and rtstruct.", group=_MASKS, decides=False
    )
    names: Literal["plain", "safe"] = setting(
        "plain", "File names: plain, as the label; safe: without blanks and brackets, for shells.", group=_MASKS, decides=False
    )
    binary: bool = setting(False, "Write union.nii.gz too: all labels in one mask.", group=_MASKS, decides=False)
    crop_output: float | None = setting(
        None, "Write only the box around all labels, with so many mm on each side.", group=_MASKS, ge=0, decides=False
    )
    dicom_seg: bool = setting(False, "Earlier word for adding dicom-seg to --format.", group=_MASKS)

    check: CheckLevel = setting(
        "quick", "How closely masks are checked; thorough: also in shifted windows and mirrored, at three times the time.", group=_CHECKS
    )
    uncertainty: bool = setting(False, "Write uncertainty.nii.gz: the entropy of every voxel, in bits.", group=_CHECKS)
    probabilities: bool = setting(False, "Write probabilities/LABEL.nii.gz: the network's probability of each label.", group=_CHECKS)
    brain_mask: Path | None = setting(
        None, "A mask of the brain on the image's grid; everything of the brain is looked for inside it.", group=_MASKS, decides=False
    )

    device: DeviceChoice = setting("auto", "Device to run on.", group=_HARDWARE, decides=False)
    precision: Precision = setting("auto", "Numeric precision; auto uses half precision where the hardware supports it.", group=_HARDWARE)
    memory: str | None = setting(None, "Memory limit, e.g. 6GiB; default four fifths of the free memory.", group=_HARDWARE, decides=False)

    prompt_embeddings: Path | None = setting(None, "A table of prompts for a published file.", group=_PUBLISHED, decides=False)
    text: Path | None = setting(None, "The published text encoder, for prompts outside a table.", group=_PUBLISHED, decides=False)
    tokenizer: Path | None = setting(None, "Wordpiece list of the text encoder.", group=_PUBLISHED, decides=False)
    lora_alpha: float | None = setting(None, "Alpha of a published file with equal ranks.", group=_PUBLISHED)

    shard: str | None = setting(
        None, "Part i of n of the cases, e.g. 2/8; `medlore collect OUT` puts the parts together.", group=_RUN, decides=False
    )
    resume: bool = setting(True, "Skip cases that are finished with the same input and settings.", group=_RUN, decides=False)
    engine: Literal["local", "ray"] = setting("local", "Local processes, or Ray.", group=_RUN, decides=False)
    workers: int = setting(1, "Cases processed at the same time; each worker loads its own model.", group=_RUN, ge=1, decides=False)

    @pydantic.field_validator("format", mode="after")
    @classmethod
    def _known_formats(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"no format; known are {', '.join(MASK_FORMATS)}")
        return tuple(dict.fromkeys(known_name(name, MASK_FORMATS) for name in names))

    @pydantic.field_validator("shard", mode="after")
    @classmethod
    def _one_of_its_shards(cls, shard: str | None) -> str | None:
        found = None if shard is None else re.fullmatch(r"0*([1-9]\d{0,5})/0*([1-9]\d{0,5})", shard.strip())
        if shard is not None and (found is None or int(found[1]) > int(found[2])):
            raise ValueError(f"got {shard!r}; a part is i/n with i from 1 to n, such as 2/8")
        return None if found is None else f"{found[1]}/{found[2]}"

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of all formats that are asked for."""
        return (*self.format, *(("dicom-seg",) if self.dicom_seg and "dicom-seg" not in self.format else ()))


class MaskEvaluationSettings(Settings):
    """Which masks are measured against which."""

    pred: Path = setting(..., "Folder of predicted masks.", group="Masks")
    truth: Path = setting(..., "Case list (jsonl) with the true masks.", group="Masks")
    tolerance_mm: float = setting(1.0, "Tolerance of the surface Dice in mm.", group="Masks", flags=("--tolerance",), ge=0)
