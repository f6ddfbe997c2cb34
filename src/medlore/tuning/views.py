"""Gently changed views of each labelled image, from which the probe learns beside the image itself.

A few shots say little about which directions of the features matter; views say which ones a crop, a turn or the light changes, and a
penalised regression then leans on the others. On development sets this gains more than any tuning of the network did there
(docs/results/recipe-views.json). Changes as strong as those of training help less on small networks.

Source: the use of virtual examples, Niyogi, Girosi and Poggio, "Incorporating prior information in machine learning by creating virtual
examples", 1998; here in the space of frozen features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medlore.data.images.transforms import Preprocessing, TrainAugmentation
from medlore.data.images.words import Flip

CROP, DEGREES, LIGHT = (0.8, 1.0), 5.0, 0.05  # about half of what training changes
MOST_IMAGES = 500  # with more images, views gain little and cost much


@dataclass(frozen=True)
class View:
    """One way to look at images; the same image always gives the same view, whatever stands beside it.

    Attributes:
        number: from 1; another number, other draws.
        flip: axes along which images may be mirrored.
    """

    number: int
    flip: Flip = "none"

    def of(self, images: Tensor, preprocessing: Preprocessing) -> Tensor:
        """(b, 3, s, s) uint8 to the normalised input of the network, each image changed in its own way."""
        change = TrainAugmentation(preprocessing, seed=self.number, crop=CROP, flip=self.flip, degrees=DEGREES, light=LIGHT)
        return torch.cat([change(image[None], step=_number_of(image)) for image in images])


def views_of(count: int, images: int, flip: Flip = "none") -> tuple[View, ...]:
    """So many views of each image; none where there are images enough.

    Examples:
        >>> len(views_of(4, images=25)), len(views_of(4, images=5000))
        (4, 0)
    """
    return tuple(View(number, flip) for number in range(1, count + 1)) if images <= MOST_IMAGES else ()


def _number_of(image: Tensor) -> int:
    pixels = np.ascontiguousarray(image.cpu().numpy())
    return int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "little")
