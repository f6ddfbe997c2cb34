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

    Example:
        >>> rule_of({"intensity": {"ct": {"clip": [-200, 300]}}}).ct_range_hu
        (-200.0, 300.0)
    """
    told = preprocessing.get("intensity", {})
    low, high = told.get("ct", {}).get("clip", CT_RANGE_HU)
    first, last = told.get("other", {}).get("clip_percentiles", PERCENTILES)
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


def hounsfield_offset(array: Array) -> tuple[float, str | None]:
    """What to add to a CT so that it is in HU, and a note where something was odd.

    Stored unsigned, with the intercept lost, a CT has air at 0 and soft tissue near 1024: then -1024.
    """
    sample = array[::3, ::3, ::3] if array.size > 1 << 20 else array
    low, high = float(array.min()), float(array.max())
    if low < 0:
        return 0.0, None
    tissue = float(np.mean((sample > 850) & (sample < 1250)))
    air = float(np.mean(sample < 300))
    if high > 1250 and tissue > 0.05 and air > 0.005:
        return -1024.0, "CT without negative values and with soft tissue near 1024: 1024 was subtracted"
    return 0.0, f"CT values lie in {low:g} to {high:g}: these are not Hounsfield units, so do not trust the result"


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
