"""From images to batches: one deterministic path for evaluation, one seeded path for training.

Images are decoded once, resized to the size of the model and kept as uint8 (`decode`); every batch is made from that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medlore.data.images.imageset import ImageItem
from medlore.data.images.pixels import Pixels, load_many
from medlore.data.images.words import Flip
from medlore.errors import InputError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What the model was trained to see.

    Args:
        image_size: side of the square input, in pixels; the aspect of the image is not kept (as in MedFMC and VTAB-1k).
        mean: of the three channels, for values 0 to 1.
        std: of the three channels, for values 0 to 1.
        interpolation: of the resize.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.image_size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError("preprocessing", f"{self}", "a size from 1, three means, three positive std", "correct the settings")
        if self.interpolation not in _FILTERS:
            raise InputError("interpolation", repr(self.interpolation), ", ".join(_FILTERS), "use one of them")


def resized(pixels: Pixels, size: int, interpolation: Interpolation = "bicubic") -> Pixels:
    """(h, w, 3) uint8 to (size, size, 3) uint8, antialiased."""
    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), _FILTERS[interpolation]))


def decode(items: Sequence[ImageItem], preprocessing: Preprocessing, *, workers: int = 2) -> Tensor:
    """All images at the size of the model, to be kept in memory.

    Args:
        items: the images.
        preprocessing: size and interpolation are used; nothing is normalised yet.
        workers: threads.

    Returns:
        (b, 3, s, s) uint8.

    Raises:
        DataError: images that cannot be read; all are named at once.
    """
    size = preprocessing.image_size
    if not items:
        return torch.zeros((0, 3, size, size), dtype=torch.uint8)
    loaded = load_many(items, after=lambda p: resized(p, size, preprocessing.interpolation), workers=workers)
    return torch.from_numpy(np.stack(loaded)).permute(0, 3, 1, 2).contiguous()  # b c h w


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(b, 3, s, s) uint8, or floats of 0 to 1, to the normalised input of the model, on the same device."""
    scaled = images.float().div_(255.0) if images.dtype == torch.uint8 else images
    mean = torch.tensor(preprocessing.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(1, 3, 1, 1)
    return (scaled - mean) / std


def eval_batch(items: Sequence[ImageItem], preprocessing: Preprocessing) -> Tensor:
    """(b, 3, s, s) float32: decoded, resized, normalised; no randomness."""
    return normalise(decode(items, preprocessing), preprocessing)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` images, `size` at a time; the last one may be shorter, and none is dropped.

    Examples:
        >>> [(part.start, part.stop) for part in batches(5, 2)]
        [(0, 2), (2, 4), (4, 5)]
    """
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class TrainAugmentation:
    """Random crop, flip, small rotation and light for a batch; a pure function of (seed, step).

    The same seed and step give the same output whatever was drawn before, so a resumed run sees what an unbroken one
    would have seen. The global random state is neither read nor changed.

    Args:
        preprocessing: the model's input; the output is normalised with it.
        seed: of all draws.
        crop: smallest and largest share of the area that a crop keeps; (1, 1) switches cropping off.
        aspect: smallest and largest width / height of a crop.
        flip: mirror with probability one half along the named axes. `none` by default: left and right carry meaning in
            a chest X-ray or a head scan. Switch it on for microscopy, endoscopy, skin and natural images.
        degrees: largest rotation either way.
        light: largest relative change of brightness and of contrast.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        seed: int = 0,
        crop: tuple[float, float] = (0.5, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: Flip = "none",
        degrees: float = 10.0,
        light: float = 0.1,
    ) -> None:
        if not 0 < crop[0] <= crop[1] <= 1 or not 0 < aspect[0] <= aspect[1]:
            raise InputError("augmentation", f"crop {crop}, aspect {aspect}", "0 < crop <= 1 and 0 < aspect, ascending", "correct them")
        if flip not in ("none", "horizontal", "vertical", "both"):
            raise InputError("flip", repr(flip), "none, horizontal, vertical, both", "use one of them")
        self.preprocessing, self.seed = preprocessing, seed
        self._stages = _stages(preprocessing.image_size, crop, aspect, flip, degrees, light)

    def __call__(self, images: Tensor, *, step: int) -> Tensor:
        """Augment one batch.

        Args:
            images: (b, 3, h, w) uint8, or floats of 0 to 1; any device.
            step: the number of the optimiser step; with the seed it fixes every draw.

        Returns:
            (b, 3, s, s) float32, normalised, on the same device.
        """
        batch = images.float().div_(255.0) if images.dtype == torch.uint8 else images.float()
        with torch.random.fork_rng(devices=[]), torch.no_grad():  # kornia draws from the CPU's global state
            torch.manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0]) >> 1)
            for stage in self._stages:
                batch = stage(batch)
        return normalise(batch.clamp_(0, 1), self.preprocessing)


def _stages(size: int, crop: tuple[float, float], aspect: tuple[float, float], flip: Flip, degrees: float, light: float) -> list[Any]:
    import kornia.augmentation as K

    stages: list[Any] = []
    if degrees > 0:
        stages.append(K.RandomAffine(degrees=degrees, p=1.0, padding_mode="border"))
    stages.append(K.RandomResizedCrop((size, size), scale=crop, ratio=aspect, p=1.0, cropping_mode="resample"))
    if flip in ("horizontal", "both"):
        stages.append(K.RandomHorizontalFlip(p=0.5))
    if flip in ("vertical", "both"):
        stages.append(K.RandomVerticalFlip(p=0.5))
    if light > 0:
        stages.append(K.RandomBrightness((1 - light, 1 + light), p=1.0))
        stages.append(K.RandomContrast((1 - light, 1 + light), p=1.0))
    return stages
