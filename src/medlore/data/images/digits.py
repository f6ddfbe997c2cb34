"""Handwritten digits that come with scikit-learn: a set of images without a download."""

from __future__ import annotations

import numpy as np

from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.splits import hold_out
from medlore.errors import DataError
from medlore.extras import require


def digits(test_images: int, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's handwritten digits (UCI test part, 1,797 images of 8x8 pixels): a pool to draw from and a test set.

    Args:
        test_images: about how many images judge.
        seed: of the split.

    Raises:
        DataError: more test images than there are.
    """
    require("sklearn", "the digits")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.round(loaded.images * (255 / 16)).astype(np.uint8)  # b 8 8, brightness 0 to 16
    if not 0 < test_images < len(images):
        raise DataError("digits", f"{test_images} test images", f"less than {len(images)}", "use fewer")
    everything = from_arrays(images, loaded.target, classes=[str(k) for k in range(10)], name="digits", source="scikit-learn digits")
    return hold_out(everything, test_images / len(images), seed=seed)
