"""With which mean, deviation and resampling a checkpoint wants its images: its own word first, then its family's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medlore.errors import CheckpointError
from medlore.files import read_json
from medlore.models.backbones.families import Family, Triple

Interpolation = Literal["nearest", "bilinear", "bicubic"]

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
        mean, std = family.statistics
        return Statistics(mean, std, "bicubic", f"{_PUBLISHED} {family.name}")
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
    loaded = read_json(file) if file.is_file() else _timm_preprocessor(file.parent)
    return loaded if isinstance(loaded, dict) else {}


def _timm_preprocessor(folder: Path) -> dict[str, Any]:
    """What timm states in the `config.json` of its own folders, in transformers' words."""
    file = folder / "config.json"
    loaded = read_json(file) if file.is_file() else {}
    stated = loaded.get("pretrained_cfg") if isinstance(loaded, dict) else None
    if not isinstance(stated, dict) or "mean" not in stated or "std" not in stated:
        return {}
    modes = {str(name): number for number, name in _PILLOW_MODES.items()}
    return {"image_mean": stated["mean"], "image_std": stated["std"], "resample": modes.get(str(stated.get("interpolation")), 3)}


def _triple(values: Any, where: str) -> Triple:
    numbers = [float(v) for v in values] if isinstance(values, list) and values else []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise CheckpointError(where, f"{values!r}", "three numbers, one a channel", "correct image_mean and image_std")
    return numbers[0], numbers[1], numbers[2]
