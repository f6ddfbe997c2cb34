"""With which mean, deviation and resampling a checkpoint wants its images: its own word first, then its family's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medlore.errors import CheckpointError
from medlore.files import read_json

Family = Literal["vit", "swin", "dinov2", "clip", "resnet", "shufflenet"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Triple = tuple[float, float, float]

_HALF = (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Mean and standard deviation with which the published checkpoints of a family were trained; used only when the checkpoint
# itself says nothing, and the report says so.
FAMILY_STATISTICS: dict[Family, tuple[Triple, Triple]] = {
    "vit": (_HALF, _HALF), "swin": _IMAGENET, "dinov2": _IMAGENET, "clip": _CLIP, "resnet": _IMAGENET,
    "shufflenet": (_HALF, _HALF),
}  # fmt: skip
_PUBLISHED = "published statistics of"
_PILLOW_MODES: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel of images in [0, 1], the resampling, and who said so."""

    mean: Triple
    std: Triple
    interpolation: Interpolation
    origin: str

    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know: nothing, unless the statistics are an assumption."""
        if not self.origin.startswith(_PUBLISHED):
            return ()
        values = "; ".join(f"{word} {' '.join(f'{v:g}' for v in triple)}" for word, triple in (("mean", self.mean), ("std", self.std)))
        return (f"nothing is stored about how images were normalised: {self.origin} assumed ({values}); --mean and --std say otherwise",)


def read_statistics(folder: Path | None, name: str, family: Family) -> Statistics:
    """The statistics in `preprocessor_config.json` of a folder (or, without one, of a hub name); else the family's.

    Raises:
        CheckpointError: the file is there, but its numbers are not three.
    """
    stated = _preprocessor(folder, name)
    if "image_mean" not in stated or "image_std" not in stated:
        mean, std = FAMILY_STATISTICS[family]
        return Statistics(mean, std, "bicubic", f"{_PUBLISHED} {family}")
    where = f"{name}, preprocessor_config.json"
    interpolation = _PILLOW_MODES.get(int(stated.get("resample", 3)), "bicubic")
    return Statistics(_triple(stated["image_mean"], where), _triple(stated["image_std"], where), interpolation, "checkpoint")


def _preprocessor(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is not None:
        file = folder / "preprocessor_config.json"
    else:
        from transformers.utils import cached_file

        found = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        if found is None:
            return {}
        file = Path(found)
    loaded = read_json(file) if file.is_file() else {}
    return loaded if isinstance(loaded, dict) else {}


def _triple(values: Any, where: str) -> Triple:
    numbers = [float(v) for v in values] if isinstance(values, list) and values else []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise CheckpointError(where, f"{values!r}", "three numbers, one a channel", "mend image_mean and image_std")
    return numbers[0], numbers[1], numbers[2]
