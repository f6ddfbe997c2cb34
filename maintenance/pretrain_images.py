"""Images for supervised pre-training: labelled zips as one uint8 tensor, and augmentation on batches of tensors.

All randomness comes in through a generator. Nothing is remembered between batches, which is what makes a resumed run
equal to an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from medlore.errors import DataError
from medlore.files import existing_file


@dataclass(frozen=True)
class LabelledImages:
    """Square colour images in memory with one class each.

    Attributes:
        images: n 3 h w, uint8.
        labels: n, int64, indices into `classes`.
        classes: class names, prefixed by the name of their file.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def read_labelled_zips(paths: Sequence[Path], *, image_size: int, skip_classes: Sequence[str] = ()) -> dict[str, LabelledImages]:
    """The training and validation parts of several archives, over one joint list of classes.

    Each archive holds images and a `labels.csv` with the columns `file`, `label` (or `wnid`) and optionally `split`
    (`train` or `val`). Without that column every tenth image of a class is validation.

    Args:
        paths: the archives.
        image_size: side in pixels; other sizes are resized.
        skip_classes: labels to leave out.

    Returns:
        `train` and `val`.

    Raises:
        InputError: an archive is missing.
        DataError: an archive or an image in it cannot be read.
    """
    images: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    labels: dict[str, list[int]] = {"train": [], "val": []}
    classes: list[str] = []
    for path in paths:
        rows = [row for row in _label_rows(path) if row[1] not in skip_classes]
        names = sorted({label for _, label, _ in rows})
        first = len(classes)
        classes += [f"{path.stem}:{name}" for name in names]
        with zipfile.ZipFile(path) as archive:
            for file, label, split in rows:
                images[split].append(_decode(archive, file, path, image_size))
                labels[split].append(first + names.index(label))
    return {
        split: LabelledImages(torch.from_numpy(np.stack(images[split])), torch.tensor(labels[split]), tuple(classes)) for split in images
    }


def _label_rows(path: Path) -> list[tuple[str, str, str]]:
    """(file, label, split) of every image that an archive lists."""
    try:
        with zipfile.ZipFile(existing_file(path)) as archive:
            table = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode("utf-8"))))
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"not a labelled archive ({error})", "a zip of images with labels.csv", "name another file") from error
    rows, seen = [], dict[str, int]()
    for row in table:
        label = row.get("label") or row["wnid"]
        seen[label] = seen.get(label, -1) + 1
        rows.append((row["file"], label, row.get("split") or ("val" if seen[label] % 10 == 9 else "train")))
    return rows


def _decode(archive: zipfile.ZipFile, file: str, path: Path, size: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(archive.read(file))).convert("RGB")
    except (KeyError, UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path}: {file}", f"unreadable ({error})", "an image", "pack the archive again") from error
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def balanced_order(labels: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` image indices: classes drawn by weight, images of a class in shuffled rounds without repeats inside a round.

    Args:
        labels: n, class of each image.
        weights: c, relative frequency of each class.
        count: how many indices.
        generator: source of randomness.
    """
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    order = torch.empty(count, dtype=torch.long)
    for index in range(len(weights)):
        places = (drawn == index).nonzero().flatten()
        members = (labels == index).nonzero().flatten()
        rounds = math.ceil(len(places) / len(members))
        shuffled = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
        if shuffled:
            order[places] = torch.cat(shuffled)[: len(places)]
    return order


def augment(images: Tensor, generator: torch.Generator, *, smallest_area: float, colour: float, grey: float) -> Tensor:
    """Random crop with aspect, flip, colour, and greying, each drawn per image.

    Args:
        images: b 3 h w in 0 to 1.
        generator: source of randomness.
        smallest_area: smallest share of the image that a crop keeps.
        colour: strength of the changes of brightness, contrast and saturation; 0 switches them off.
        grey: share of images that lose their colour.

    Returns:
        b 3 h w in 0 to 1.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    area, aspect = uniform(smallest_area, 1.0), torch.exp(uniform(-0.28, 0.28))  # aspect between 3/4 and 4/3
    width = (area * aspect).sqrt().clamp(max=1.0)
    height = (area / aspect).sqrt().clamp(max=1.0)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    images = torch.nn.functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def factor() -> Tensor:
        return uniform(1 - colour, 1 + colour).view(-1, 1, 1, 1)

    luma = _luma(images)
    keep = torch.where(uniform(0, 1) < grey, 0.0, 1.0).view(-1, 1, 1, 1)
    images = luma + (images - luma) * factor() * keep
    mean = luma.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * factor() + mean * factor()).clamp(0, 1)


def _luma(images: Tensor) -> Tensor:
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def mix(images: Tensor, targets: Tensor, generator: torch.Generator, *, share: float) -> tuple[Tensor, Tensor]:
    """Mixup and CutMix in equal parts on a share of the batches.

    Args:
        images: b c h w.
        targets: b k, class probabilities.
        generator: source of randomness.
        share: share of batches that are mixed.
    """
    dice = torch.rand(4, generator=generator).tolist()
    if dice[0] >= share:
        return images, targets
    partner = torch.randperm(len(images), generator=generator)
    kept = 0.5 + 0.5 * dice[1]
    if dice[2] < 0.5:
        return kept * images + (1 - kept) * images[partner], kept * targets + (1 - kept) * targets[partner]
    side = images.shape[-1]
    edge = round(side * math.sqrt(1 - kept))
    top, left = (int(v * (side - edge + 1)) for v in torch.rand(2, generator=generator).tolist())
    images = images.clone()
    images[:, :, top : top + edge, left : left + edge] = images[partner][:, :, top : top + edge, left : left + edge]
    kept = 1 - edge**2 / side**2
    return images, kept * targets + (1 - kept) * targets[partner]
