"""Segmentation in the demo: the ICBM152 head that nilearn carries, by text prompts, beside k-means of its grey values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medlore.assets import PREFIX, asset_path
from medlore.data.volumes.geometry import Array
from medlore.data.volumes.nifti import read_nifti
from medlore.demo.settings import SHIPPED
from medlore.demo.tissue_baseline import best_dice, kmeans_classes
from medlore.errors import DataError, UnknownNameError
from medlore.extras import require
from medlore.files import existing_file
from medlore.metrics.masks import dice

if TYPE_CHECKING:
    from medlore.segmenting.model import SegmentingModel
    from medlore.segmenting.segmentation import Segmentation

FOLDER = "template"

PROMPTS = (
    "grey matter", "white matter", "brain ventricle", "hippocampus", "thalamus", "caudate nucleus", "putamen", "pallidum", "amygdala",
    "brainstem", "cerebellum",
)  # fmt: skip
_MAPS = {"grey matter": "GM_MNI152_FILE_PATH", "white matter": "WM_MNI152_FILE_PATH"}


def why_left_out(segmenter: str) -> str | None:
    """Why there is nothing to segment with: the shipped pack is not in this installation. None where there is one.

    Raises:
        InputError: another pack was asked for, and it is not there.
    """
    if not segmenter.startswith(PREFIX):
        if not Path(segmenter).is_dir():
            existing_file(segmenter, where="--segmenter")
        return None
    try:
        asset_path(segmenter)
    except UnknownNameError:
        if segmenter != SHIPPED:
            raise
        return f"{SHIPPED} is not part of this installation, so nothing was segmented; give a pack of your own with --segmenter"
    return None


def template_file(name: str = "MNI152_FILE_PATH") -> Path:
    """The ICBM152 2009a T1 template at 1 mm (skull-stripped), or a tissue map of it, as nilearn carries it.

    Raises:
        DataError: this nilearn has no such file.
    """
    require("nilearn", "the head of the demo")
    from nilearn.datasets import struct

    path = getattr(struct, name, None)
    if path is None or not Path(path).is_file():
        raise DataError("nilearn", f"carries no {name}", "nilearn with the ICBM152 template", "pip install --force-reinstall nilearn")
    return Path(path)


def segment_template(
    segmenter: str, out: Path, *, prompts: tuple[str, ...] = PROMPTS, say: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Segment the template on its own grid, write the folder of the case, and measure what can be measured.

    Args:
        segmenter: a pack with prompts of the brain.
        out: the case is written to `out/template`.
        prompts: labels; those that the pack has no prompt for are left out and named.
        say: hears of what begins and of what is done.

    Returns:
        For the report: pack, image, a row a label (volume, Dice against the tissue map, Dice of k-means), seconds.

    Raises:
        DataError: the pack knows none of the prompts.
    """
    from medlore.segmenting.cohort import load_model
    from medlore.segmenting.outputs import fault_of, write_outputs
    from medlore.segmenting.settings import SegmentSettings

    started = time.perf_counter()
    image = template_file()
    model = load_model(SegmentSettings(model=segmenter, out=out, image=image, device="cpu"))
    labels, unknown = _known(model, prompts)
    volume = read_nifti(image)
    say(f"segmenting the ICBM152 template ({' x '.join(map(str, volume.shape))} voxels) by {len(labels)} prompts")
    result = model.segment(volume, labels, "mri")
    about = {"image": image.name, "model": {"name": model.bundle.name, "sha256": model.bundle.sha256}, "precision": model.precision}
    record = write_outputs(out / FOLDER, result, about=about)
    if (fault := fault_of(record, out / FOLDER)) is not None:
        raise fault
    rows = _rows(record["labels"], result, volume.array)
    seconds = round(time.perf_counter() - started, 1)
    say(f"  {len(rows)} labels, {result.windows} windows  ({seconds:.0f} s)")
    return {
        "segmenter": segmenter,
        "model": about["model"],
        "precision": model.precision,
        "image": "ICBM152 2009a T1 template, 1 mm, skull-stripped (from nilearn)",
        "truth": "nilearn's tissue maps above 0.5 (cortical and deep grey matter are one class in them)",
        "without_prompt": unknown,
        "labels": rows,
        "folder": FOLDER,
        "seconds": seconds,
    }


def tissue_truth(label: str) -> Array | None:
    """Where nilearn's tissue map of the template is above one half; None for labels without a map."""
    if label not in _MAPS:
        return None
    values = read_nifti(template_file(_MAPS[label])).array
    return np.asarray(values > values.max() / 2)


def _known(model: SegmentingModel, prompts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    keys = model.facts.prompts
    labels = [label for label in prompts if keys is None or f"mri/{label}" in keys]
    if not labels:
        raise DataError(model.facts.name, "no prompt for any part of the brain", f"one of {', '.join(prompts)}", "give another pack")
    return labels, [label for label in prompts if label not in labels]


def _rows(found: list[Mapping[str, Any]], result: Segmentation, image: Array) -> list[dict[str, Any]]:
    classes = kmeans_classes(image, image > 0)
    rows = []
    for entry in found:
        label, truth = str(entry["label"]), tissue_truth(str(entry["label"]))
        rows.append(
            {
                "label": label,
                "volume_ml": round(float(entry["volume_ml"]), 2),
                "dice": None if truth is None else round(dice(result.mask(label), truth), 4),
                "kmeans_dice": None if truth is None else round(best_dice(classes, truth), 4),
            }
        )
    return rows
