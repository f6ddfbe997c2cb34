"""What `medlore evaluate` and `medlore predict` are asked to do with a tuned model."""

from __future__ import annotations

from pathlib import Path

from medlore.data.images.imageset import Task
from medlore.data.images.missing_labels import HELP, MissingLabels
from medlore.data.images.reading import Format
from medlore.runs.hardware import DeviceChoice, Precision
from medlore.runs.settings import Settings, setting

_RUN_OR_ADAPTER = "RUN_OR_ADAPTER"
_TUNED = "Folder of `medlore finetune`, or the adapter in it."
_MOVED = "Where the backbone lies now, if it was moved."


class EvaluateSettings(Settings):
    """What is measured on which images."""

    tuned: Path = setting(..., _TUNED, argument=_RUN_OR_ADAPTER)
    data: Path = setting(..., "Labelled images, in any format of `medlore finetune`.", group="Images")
    format: Format = setting("auto", "Format of --data, if auto detects the wrong one.", group="Images")
    split: str | None = setting(None, "Part of --data; default its test part, or the whole set if it has no parts.", group="Images")
    images: Path | None = setting(None, "Folder of the images, if they are not beside the list.", group="Images")
    task: Task | None = setting(None, "single or multi, if a table could be both.", group="Images")
    group_pattern: str | None = setting(None, "Regular expression for file names whose group captures the patient ID.", group="Images")
    missing_labels: MissingLabels = setting("fault", HELP, group="Images")
    model: str | None = setting(None, _MOVED, group="Model", path=True)
    device: DeviceChoice = setting("auto", "Device to run on.", group="Model", decides=False)
    precision: Precision = setting("auto", "Numeric precision; auto: float32 on CPU, bfloat16 (else float16) on CUDA.", group="Model")
    bootstrap: int = setting(1000, "Resamples for the intervals; 0 for none.", group="Images", ge=0)
    seed: int = setting(0, "Seed of the resamples.", group="Images", ge=0)


class PredictSettings(Settings):
    """How images are scored; one bad image stops everything before it starts unless `keep_going`."""

    model: str | None = setting(None, _MOVED, path=True)
    device: DeviceChoice = setting("auto", "Device to run on.", decides=False)
    precision: Precision = setting("auto", "Numeric precision; auto: float32 on CPU, bfloat16 (else float16) on CUDA.")
    keep_going: bool = setting(False, "Leave out images that cannot be read; the exit status is then 1.")
    medfmc: str | None = setting(
        None, "Also write the challenge's file: chest, colon or endo with the shots, e.g. endo:5.", pattern=r"^(chest|colon|endo):(1|5|10)$"
    )
