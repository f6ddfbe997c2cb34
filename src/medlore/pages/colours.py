"""The colours of labels, the same in pictures, pages and label tables."""

from __future__ import annotations

import colorsys


def label_colour(index: int) -> tuple[int, int, int]:
    """A colour for the label with value `index + 1`; neighbours differ.

    Example:
        >>> label_colour(0)
        (242, 61, 61)
    """
    hue = (index * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 if index % 2 == 0 else 0.55, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
