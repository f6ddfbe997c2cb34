"""`--brain-mask FILE`: a brain that a user knows already; everything of the brain is looked for inside it.

In MR what lies outside becomes background before the network sees the image, as a skull stripping does it; in every modality the masks end
at the brain. The file has to lie on the image's own grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medlore.data.formats import existing_image
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.nifti_affine import AffineChoice
from medlore.errors import DataError, InputError
from medlore.models.segmenter.vocabulary import Vocabulary, default_vocabulary
from medlore.segmenting.labels import ModelFacts, Routes

if TYPE_CHECKING:
    from medlore.data.volumes.cases import Case
    from medlore.segmenting.settings import SegmentSettings

FLAG = "--brain-mask"
_SAME_MM = 1e-2
_REGION = "brain"


def read_brain_mask(path: str | Path, volume: Volume, *, affine_from: AffineChoice = "auto") -> Array:
    """The mask, Boolean x y z, on the image's grid: every voxel that is not 0.

    Raises:
        InputError: no such file.
        DataError: it cannot be read, lies on another grid, or holds no brain.
    """
    from medlore.data.volumes.preparation import read_volume  # with torch, which a plan does without

    where = f"{FLAG}: {existing_image(Path(path))}"
    mask = read_volume(path, affine_from=affine_from)
    faults = []
    if mask.shape != volume.shape:
        faults.append(f"{' x '.join(map(str, mask.shape))} voxels, the image has {' x '.join(map(str, volume.shape))}")
    elif (apart := _apart_mm(mask, volume)) > _SAME_MM:
        faults.append(f"corners up to {apart:.3g} mm away from those of the image")
    inside = np.asarray(np.nan_to_num(mask.array) != 0)
    if not inside.any():
        faults.append("no voxel that is not 0")
    if faults:
        fix = "resample it to the image (nearest neighbour), or leave the flag out"
        raise DataError(where, "; ".join(faults), f"a mask of the brain on the grid of {volume.path.name}", fix)
    return inside


def refuse_other_labels(facts: ModelFacts, routes: Routes) -> None:
    """What lies outside of the brain cannot be looked for inside it.

    Raises:
        InputError: a label of another region.
    """
    places = regions_of_labels(facts, routes)
    other = [label for label, region in places.items() if region not in (_REGION, None)]
    if other:
        fix = "segment them in a run of their own, without the flag"
        raise InputError(FLAG, f"labels outside of the brain: {', '.join(other)}", "labels of the brain alone", fix)


def refuse_flags_together(settings: SegmentSettings, cases: Sequence[Case]) -> None:
    """Flags that cannot go together, all of them at once.

    Raises:
        InputError: maps or a mask with the published rules, or one mask for several images.
    """
    faults = []
    if settings.published:
        given = {"--probabilities": settings.probabilities, FLAG: settings.brain_mask is not None}
        faults += [f"{flag}: not a part of the published rules" for flag, there in given.items() if there]
    if settings.brain_mask is not None and len(cases) > 1:
        faults.append(f"{FLAG}: one mask for {len(cases)} images")
    if settings.brain_mask is not None:
        existing_image(settings.brain_mask)
    if faults:
        came = faults[0] if len(faults) == 1 else f"{len(faults)} flags that do not go together"
        accepted = "--published for comparisons alone; one mask of a brain for one image"
        fix = "leave out --published or the other flag, or segment one image at a time"
        raise InputError("segment", came, accepted, fix, faults=faults[:0] if len(faults) == 1 else faults)


def regions_of_labels(facts: ModelFacts, routes: Routes, words: Vocabulary | None = None) -> dict[str, str | None]:
    """Label -> region that it lies in: as the model says, else as the vocabulary does; None where neither knows."""
    known = {e.label: e.region for e in (words or default_vocabulary()).entries(modality=routes.modality)}
    own = facts.label_regions
    return {label: own.get(f"{routes.modality}/{label}", known.get(label)) for label in routes.labels}


def inside_brain(volume: Volume, brain: Array, modality: str) -> Volume:
    """The image with background outside of the brain in MR; unchanged in other modalities.

    Background is 0, or the least value where values are negative.
    """
    if modality != "mri":
        return volume
    background = np.asarray(min(float(np.nanmin(volume.array)), 0.0)).astype(volume.array.dtype)
    return replace(volume, array=np.where(brain, volume.array, background))


def _apart_mm(mask: Volume, volume: Volume) -> float:
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)], float) * [*(n - 1 for n in volume.shape), 1]
    away = corners @ (np.asarray(mask.affine, float) - np.asarray(volume.affine, float)).T
    return float(np.linalg.norm(away[:, :3], axis=1).max())
