"""Words that settings of 2D images are chosen from; no heavy package is needed to know them."""

from __future__ import annotations

from typing import Literal

Flip = Literal["none", "horizontal", "vertical", "both"]  # which mirror images are possible patients
