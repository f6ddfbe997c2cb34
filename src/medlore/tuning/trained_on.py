"""Which images a tuned model has seen: hashes of their pixels beside it, so that nobody is judged on them unawares."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medlore.data.images.imageset import ImageSet
from medlore.data.images.transforms import Preprocessing, batches, decode
from medlore.files import write_text

TRAINED_FILE = "trained_on.txt"
_BATCH = 256


def pixel_hashes(images: ImageSet, preprocessing: Preprocessing) -> list[str]:
    """A hash of each image as the network sees it: the same in whatever file or archive it lies."""
    found: list[str] = []
    for part in batches(len(images), _BATCH):
        pixels = decode(images.items[part], preprocessing)
        found += [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:24] for image in pixels]
    return found


def write_trained_on(folder: Path, images: ImageSet, preprocessing: Preprocessing) -> Path:
    """One line an image, sorted: which images trained a model, and not in which order."""
    return write_text(folder / TRAINED_FILE, "\n".join(sorted(set(pixel_hashes(images, preprocessing)))) + "\n")


def seen_in_training(folder: Path, images: ImageSet, preprocessing: Preprocessing) -> int | None:
    """How many of `images` the model in `folder` was trained on; None for a model of an earlier version, which does not say."""
    file = folder / TRAINED_FILE
    if not file.is_file():
        return None
    known = set(file.read_text(encoding="utf-8", errors="replace").split())
    return sum(name in known for name in pixel_hashes(images, preprocessing))
