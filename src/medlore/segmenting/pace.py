"""How a pass over the windows goes on: which windows hold no body, and where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from medlore.data.volumes.geometry import Shape
from medlore.data.volumes.preparation import Prepared
from medlore.data.volumes.window_grid import Start
from medlore.data.volumes.windows import Rows

EMPTY_SHARE = 1e-4  # a window with fewer voxels of body than this share is skipped


class Emptiness:
    """Whether a window holds no body; counts those that do not."""

    def __init__(self, prepared: Prepared, roi_size: Shape) -> None:
        self.count = 0
        self._body, self._roi = prepared.body, roi_size

    def __call__(self, start: Start) -> bool:
        """Whether the window that begins there holds no body."""
        if self._body is None:
            return False
        part = self._body[tuple(slice(a, a + size) for a, size in zip(start, self._roi, strict=True))]
        empty = bool(np.count_nonzero(part) < EMPTY_SHARE * part.size)
        self.count += empty
        return empty


class Clock:
    """Seconds by section."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def section(self, name: str) -> Clock:
        """Seconds inside of `with` count for this section."""
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._start

    def timed(self, name: str, function: Callable[[Tensor], Rows]) -> Callable[[Tensor], Rows]:
        """A predictor whose calls count for a section."""

        def timed(windows: Tensor) -> Rows:
            with self.section(name):
                return function(windows)

        return timed
