"""The images that `medlore:vit-mini` is distilled on: 64 x 64, from sets whose terms allow weights to be shipped.

Nothing of a set that `maintenance.frozen_features` reports on, or that chooses between students, is among them. Volumes give slices,
label maps of heads give synthetic MR slices of random contrast, a CT gives slices and sums along its rays.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from maintenance.labelled_sets import CHEST_CLASS, is_development_class, is_held_out, square

Sample = tuple[NDArray[np.uint8], str]  # an image, and its class; "" where it has none
Slice = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pool:
    """Images to distil on.

    Attributes:
        images: n s s 3, uint8.
        labels: n, index of the class, -1 where there is none.
        classes: class names.
        counts: images by source.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    counts: dict[str, int]


def read_pool(folder: Path, counts: dict[str, int], *, size: int, seed: int = 0) -> Pool:
    """At most `counts[source]` images of each source of `SOURCES`, drawn by `seed`.

    Args:
        folder: the data folder.
        counts: how many images of each source.
        size: side in pixels.
        seed: of every choice.
    """
    images: list[NDArray[np.uint8]] = []
    names: list[str] = []
    found = {}
    for source, most in counts.items():
        before = len(images)
        for image, label in SOURCES[source](folder, most, size, np.random.default_rng([seed, *source.encode()])):
            images.append(image)
            names.append(label)
        found[source] = len(images) - before
    classes = tuple(sorted(set(names) - {""}))
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    return Pool(np.stack(images), np.array([index[name] for name in names]), classes, found)


def _natural(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """Tiny-ImageNet: the training part of the classes that are not kept for development."""
    yield from _labelled(
        folder / "tiny_imagenet_180.zip",
        "wnid",
        most,
        size,
        random,
        lambda r: r["split"] == "train" and not is_development_class(r["wnid"]),
    )


def _mednist(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """MedNIST without chest X-rays, whose source is reported on, and without its development part."""
    yield from _labelled(
        folder / "mednist.zip", "label", most, size, random, lambda r: r["label"] != CHEST_CLASS and not is_held_out(r["file"])
    )


def _labelled(path: Path, column: str, most: int, size: int, random: np.random.Generator, keep: Any) -> Iterator[Sample]:
    with zipfile.ZipFile(path) as archive:
        rows = [row for row in csv.DictReader(io.StringIO(archive.read("labels.csv").decode("utf-8"))) if keep(row)]
        by_class: dict[str, list[dict[str, str]]] = {}
        for i in random.permutation(len(rows)):
            by_class.setdefault(rows[i][column], []).append(rows[i])
        each = -(-most // len(by_class))
        for label in sorted(by_class):
            for row in by_class[label][:each]:
                yield square(Image.open(io.BytesIO(archive.read(row["file"]))), size), f"{path.stem}:{row[column]}"


def _tissue(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """Random squares of stained tissue."""
    with zipfile.ZipFile(folder / "camelyon17_he_unlabelled.zip") as archive:
        patches = [Image.open(io.BytesIO(archive.read(n))).convert("RGB") for n in sorted(archive.namelist()) if n.endswith(".jpg")]
    for i in range(most):
        patch = patches[i % len(patches)]
        side = int(random.integers(size, min(patch.size) + 1))
        left, top = (int(random.integers(0, edge - side + 1)) for edge in patch.size)
        yield square(patch.crop((left, top, left + side, top + side)), size), ""


def _hippocampus(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """Slices of MR boxes around the hippocampus."""
    files = sorted((folder / "hippocampus" / "images").glob("*.nii.gz"))
    for i in range(most):
        volume = _volume(files[i % len(files)])
        yield _picture(_slice(volume, random, 0.25), size, random), ""


def _torso(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """Slices of a CT in random windows and squares, and sums along its rays, which look like radiographs."""
    volume = _volume(folder / "totalseg" / "example_ct.nii.gz")
    for i in range(most):
        if i % 2:
            low = float(random.uniform(-1000, 0))
            cut = np.clip(_slice(volume, random, 0.1), low, low + float(random.uniform(250, 1500)))
        else:
            dense = np.clip(volume + 1000, 0, 2200) * (1 + random.uniform(0, 2) * (volume > 200))
            turned = ndimage.rotate(dense, float(random.uniform(-20, 20)), axes=(0, 1), reshape=False, order=1)
            cut = turned.sum(int(random.integers(0, 2)))
        yield _picture(_square_of(cut, random, 0.6), size, random), ""


def _heads(folder: Path, most: int, size: int, random: np.random.Generator) -> Iterator[Sample]:
    """Synthetic MR slices: a grey value for every label of a real head, a smooth field, blur and noise."""
    maps = [_volume(path).astype(np.int16) for path in sorted((folder / "synthseg").glob("training_seg_*.nii.gz"))]
    labels = max(int(m.max()) for m in maps) + 1
    for i in range(most):
        cut = _slice(maps[i % len(maps)], random, 0.2)
        grey = random.uniform(0, 1, size=labels)
        grey[0] = 0.0
        bare = random.random() < 0.3  # without skull and skin
        picture = np.where((cut >= _FIRST_OUTSIDE_BRAIN) & bare, 0.0, grey[cut])
        picture += random.normal(size=cut.shape) * random.uniform(0, 0.06) * (cut > 0)
        picture = ndimage.gaussian_filter(picture, float(random.uniform(0.5, 1.8)))
        coarse = ndimage.zoom(random.normal(size=(4, 4)), [n / 4 for n in cut.shape], order=3)
        picture = picture * np.exp(float(random.uniform(0, 0.3)) * coarse) + np.abs(random.normal(size=cut.shape)) * random.uniform(0, 0.03)
        rows, columns = (np.flatnonzero((cut > 0).any(axis)) for axis in (1, 0))
        if len(rows) and len(columns):
            picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        yield _picture(picture, size, random), ""


_FIRST_OUTSIDE_BRAIN = 500  # the label maps number skin, skull and eyes from here


def _volume(path: Path) -> NDArray[np.float32]:
    import nibabel

    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def _slice(volume: NDArray[Any], random: np.random.Generator, margin: float) -> NDArray[Any]:
    """A slice along a random axis, the outer `margin` of it left out."""
    axis = int(random.integers(0, 3))
    place = int(random.uniform(margin, 1 - margin) * volume.shape[axis])
    return np.moveaxis(volume, axis, 0)[place]  # np.take would copy the volume


def _square_of(cut: NDArray[Any], random: np.random.Generator, least: float) -> NDArray[Any]:
    """A random square with at least `least` of the shorter side."""
    side = int(random.uniform(least, 1) * min(cut.shape))
    top, left = (int(random.integers(0, edge - side + 1)) for edge in cut.shape)
    return cut[top : top + side, left : left + side]


def _picture(cut: NDArray[Any], size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Grey values between two percentiles as an image, upright, turned or mirrored as chance has it."""
    low, high = np.percentile(cut, [0.5, float(random.uniform(98, 100))])
    scaled = np.clip((cut - low) / max(float(high - low), 1e-6), 0, 1) ** float(random.uniform(0.7, 1.4))
    turned = np.rot90(scaled, int(random.integers(0, 4)))
    return square(Image.fromarray((turned * 255).astype(np.uint8)), size)


SOURCES = {
    "natural": _natural,
    "mednist": _mednist,
    "tissue": _tissue,
    "hippocampus": _hippocampus,
    "torso": _torso,
    "heads": _heads,
}
