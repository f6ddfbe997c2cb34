"""Grey values by modality: what a network of the SAT family expects, as a record that can be undone.

CT is clipped to [-500, 1000] HU, everything else to its 0.5 and 99.5 percentiles; then mean and standard deviation of the
foreground box are taken out. What counts as body (for the crop and for skipping windows) is stated here too.

Source: the loading rules that the SAT and LoRKD files were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from medlore.data.volumes.geometry import Array, Crop, bounding_box
from medlore.errors import DataError

Modality = Literal["ct", "mri", "pet", "us"]

CT_RANGE_HU = (-500.0, 1000.0)
PERCENTILES = (0.5, 99.5)
BODY_HU = -500.0  # what is denser than lung; air, and the air around a patient, is not
_BELOW_AIR_HU = -1100.0  # nothing that is measured lies below; air is -1000
_WRAPPED, _LARGEST_HU = 60000.0, 40000.0  # negative numbers as unsigned ones of 16 bits; metal on an extended scale
_NO_MEASURE = 1e15
BODY_SHARE = 0.05  # other modalities: above the dark end by this share of the range


@dataclass(frozen=True)
class Intensity:
    """How grey values became network input: `clip(value, low, high)`, minus `mean`, over `deviation`.

    Args:
        low: lower clip.
        high: upper clip.
        mean: of the clipped foreground.
        deviation: population standard deviation of the clipped foreground.
        body: values above this count as body.
    """

    low: float
    high: float
    mean: float
    deviation: float
    body: float

    def apply(self, array: Array) -> Array:
        """Normalised float32; in place where the array is float32."""
        array = np.asarray(array, np.float32)
        np.clip(array, np.float32(self.low), np.float32(self.high), out=array)
        array -= np.float32(self.mean)
        array /= np.float32(self.deviation)
        return array

    def undo(self, array: Array) -> Array:
        """The clipped grey values again."""
        return np.asarray(array * np.float32(self.deviation) + np.float32(self.mean))

    @property
    def air(self) -> float:
        """What the darkest value becomes; windows that stick out of the volume are padded with it."""
        return (self.low - self.mean) / self.deviation

    def record(self) -> dict[str, float]:
        """Plain numbers for `case.json`."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class IntensityRule:
    """The constants of a training: where values are clipped, and above which value the statistics' box starts."""

    ct_range_hu: tuple[float, float] = CT_RANGE_HU
    percentiles: tuple[float, float] = PERCENTILES
    foreground_above: float = 0.0


PUBLISHED_RULE = IntensityRule()


def rule_of(preprocessing: Mapping[str, Any]) -> IntensityRule:
    """The constants that a pack's `preprocessing` names; those it leaves out are the published ones.

    Examples:
        >>> rule_of({"intensity": {"ct": {"clip": [-200, 300]}}}).ct_range_hu
        (-200.0, 300.0)
    """
    settings = preprocessing.get("intensity", {})
    low, high = settings.get("ct", {}).get("clip", CT_RANGE_HU)
    first, last = settings.get("other", {}).get("clip_percentiles", PERCENTILES)
    above = float(preprocessing.get("foreground_above", 0.0))
    return IntensityRule((float(low), float(high)), (float(first), float(last)), above)


def intensity_of(foreground: Array, modality: Modality, *, where: str, rule: IntensityRule = PUBLISHED_RULE) -> Intensity:
    """The intensity rule of a modality, with the numbers of one volume's foreground box.

    Args:
        foreground: x y z grey values of the box over which the network's training took its statistics.
        modality: which rule.
        where: name of the volume, for the error.
        rule: the constants of the training.

    Raises:
        DataError: all values are equal once clipped.
    """
    if modality == "ct":
        low, high = rule.ct_range_hu
        body = BODY_HU
    else:
        low, high = (float(v) for v in np.percentile(foreground, rule.percentiles))
        body = low + BODY_SHARE * (high - low)
    mean, deviation = _moments(foreground, low, high)
    if not deviation > 1e-6 * max(abs(low), abs(high), 1e-6):
        span = f"all values lie at {mean:.4g} once clipped to {low:.4g} to {high:.4g}"
        raise DataError(where, span, "an image with something in it", "check modality, slope and intercept of the file")
    return Intensity(low, high, mean, deviation, body)


def published_foreground(array: Array, above: float = 0.0) -> Crop | None:
    """The box that the published loading takes: around all values above 0 (for CT above 0 HU)."""
    return bounding_box(array > above)


def body_box(array: Array, modality: Modality) -> Crop | None:
    """The box around the body: CT denser than lung; else above the 0.5 percentile (0 in most images: the published rule)."""
    if modality == "ct":
        return bounding_box(array > BODY_HU)
    sample = array[::2, ::2, ::2] if array.size > 1 << 21 else array
    return bounding_box(array > np.percentile(sample, PERCENTILES[0]))


def finite_values(array: Array, *, where: str) -> tuple[Array, str | None]:
    """The array without NaN and infinite voxels (they become the smallest finite value), and a note if there were any.

    Raises:
        DataError: no voxel is finite, or all are equal.
    """
    note = None
    if array.dtype.kind == "f":
        good = np.isfinite(array)
        if not good.all():
            count = int(array.size - np.count_nonzero(good))
            if count == array.size:
                raise DataError(where, "no voxel is a finite number", "an image", "export it again")
            array = np.where(good, array, array[good].min())
            note = f"{count:,} voxels that were not finite were set to the smallest finite value"
    if array.size and array.min() == array.max():
        raise DataError(where, f"an empty volume: every voxel is {array.flat[0]}", "an image with something in it", "check the file")
    return array, note


def hounsfield(array: Array) -> tuple[Array, float, tuple[str, ...]]:
    """A CT whose values can be taken for HU once the offset is added: (array, offset, what was odd).

    Three things happen to a CT on its way through converters: negative numbers are stored unsigned and come back 65,536 too
    high; the intercept is lost, so that air lies at 0 and soft tissue near 1024; the scanner's padding outside its circle
    (-2000, -3024, ...) lies below all air. The first and second are undone and said; padding counts as air.
    """
    notes: list[str] = []
    array, note = _signed_again(array)
    notes += [note] if note else []
    sample = array[::3, ::3, ::3] if array.size > 1 << 20 else array
    low, high = float(array.min()), float(array.max())
    padding = low < _BELOW_AIR_HU
    inside = sample[sample >= _BELOW_AIR_HU] if padding else sample
    if _lost_its_intercept(sample, inside, low, high):
        notes.append("a CT without its intercept (air at 0, soft tissue near 1024): 1024 was subtracted")
        if low < 0:
            array = np.maximum(array, 0)  # air, the padding included
        return array, -1024.0, tuple(notes)
    if padding:
        share = float(np.mean(sample < _BELOW_AIR_HU))
        notes.append(f"{share:.1%} of the voxels lie below {_BELOW_AIR_HU:g} HU, down to {low:g}: padding, which counts as air")
    if low >= 0 or (padding and (not inside.size or float(inside.min()) >= 0)):
        notes.append(f"CT values lie in {max(low, 0):g} to {high:g}: these are not Hounsfield units, so do not trust the result")
    return array, 0.0, tuple(notes)


def _lost_its_intercept(sample: Array, inside: Array, low: float, high: float) -> bool:
    """Whether air lies at 0 and soft tissue near 1024, padding left out."""
    if not inside.size or high <= 1250:
        return False
    air_in_hu = float(np.mean((inside > _BELOW_AIR_HU) & (inside < -200)))
    if low < 0 and (_BELOW_AIR_HU <= low < -200 or air_in_hu > 1e-3):
        return False
    tissue = float(np.mean((inside > 850) & (inside < 1250)))
    return tissue > 0.05 and float(np.mean(sample < 300)) > 0.005


def _signed_again(array: Array) -> tuple[Array, str | None]:
    """Values just below 65,536, far from all others, are negative ones that were stored unsigned."""
    if float(array.max()) < _WRAPPED or float(array.max()) >= 65536:
        return array, None
    high = array >= _WRAPPED
    rest = array[~high]
    if rest.size and float(rest.max()) > _LARGEST_HU:
        return array, None
    count = int(np.count_nonzero(high))
    note = f"{count:,} voxels near 65,536 are negative values that were stored unsigned: 65,536 was subtracted from them"
    wide = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    wide[high] -= 65536
    return wide, note


def saturated(array: Array) -> str | None:
    """A note where voxels hold the end of their type, or a number that no scanner measures: saturated, or marked as missing."""
    if array.dtype.kind == "f":
        count = int(np.count_nonzero(np.abs(array) >= _NO_MEASURE))
        return f"{count:,} voxels hold numbers of {_NO_MEASURE:g} and more, which no scanner measures" if count else None
    if array.dtype.itemsize < 2:
        return None
    limits = np.iinfo(array.dtype)
    for value, which in ((limits.max, "largest"), (limits.min, "smallest")):
        count = int(np.count_nonzero(array == value)) if value else 0
        if count > 1:
            return f"{count:,} voxels hold {value}, the {which} number of their type: saturated, or a mark for something missing"
    return None


def _moments(array: Array, low: float, high: float) -> tuple[float, float]:
    """Mean and population standard deviation of the clipped values, plane by plane in float64 (no copy of the whole)."""
    slowest = int(np.argmax([abs(s) for s in array.strides]))
    planes = np.moveaxis(array, slowest, 0)
    # Near the mean, so that the difference of squares keeps its digits.
    centre = np.clip(planes[len(planes) // 2], low, high).mean(dtype=np.float64)
    total = squares = 0.0
    for plane in planes:
        values = (np.clip(plane, low, high) - centre).ravel(order="K")
        total += float(values.sum())
        squares += float(values @ values)
    mean = total / array.size
    return float(centre + mean), float(np.sqrt(max(squares / array.size - mean**2, 0.0)))
