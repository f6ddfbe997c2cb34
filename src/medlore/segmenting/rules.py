"""Windows and grid of a run: what the model was trained with, unless something else is asked for (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from medlore.data.volumes.geometry import spacing_for
from medlore.errors import InputError
from medlore.segmenting.labels import ModelFacts
from medlore.segmenting.plan import WindowRules


def window_rules(
    facts: ModelFacts,
    modality: str,
    *,
    roi_size: Sequence[int] | None = None,
    overlap: float | None = None,
    sw_batch_size: int = 1,
    orientation_code: str | None = None,
    half: bool = False,
    published: bool = False,
) -> WindowRules:
    """Windows and grid: what the model was trained with, unless something else is asked for.

    Raises:
        InputError: windows that the network cannot take.
        DataError: no spacing for the modality.
    """
    preprocessing = facts.preprocessing
    x, y, z = (int(v) for v in (roi_size or preprocessing.get("roi_size", (288, 288, 96))))
    if any(side < 1 or side % facts.patch for side in (x, y, z)):
        near = ",".join(str(max(round(side / facts.patch), 1) * facts.patch) for side in (x, y, z))
        raise InputError("--roi-size", f"{x},{y},{z}", f"multiples of {facts.patch}, as {facts.name} needs them", f"give {near}")
    return WindowRules(
        roi_size=(x, y, z),
        overlap=float(overlap if overlap is not None else preprocessing.get("overlap", 0.5)),
        spacing_mm=spacing_for(preprocessing.get("spacing_mm", (1.0, 1.0, 3.0)), modality, where="preprocessing: spacing_mm"),
        orientation_code=orientation_code or str(preprocessing.get("orientation", "RAS")),
        sw_batch_size=sw_batch_size,
        bytes_per_number=2 if half else 4,
        published=published,
    )
