"""Windowed inference in bounded memory, over any callable, in MONAI's words.

Windows run through the volume with x outermost. Their weighted predictions are summed in one band of `roi_size[0]` rows;
as soon as no later window can reach a row it is finished and handed out as a `Slab`, so memory does not grow with the
length of the volume. The grid of windows is a product of three lists of starts, so with a separable window function the
sum of all weights is a product too: each window is multiplied by weights that already add up to 1, and neither a weight
map nor a division is needed.

Source: ours; window grid and Gaussian as in the published SAT and LoRKD inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.window_grid import Start, WindowGrid
from medlore.errors import StepError

Rows = Callable[[int, int, int], Tensor]
Predictor = Callable[[Tensor], Tensor | Rows]
"""Windows (b c x y z) -> logits (b q x y z), or a function (b, x0, x1) -> logits (q rows y z), so that they never exist whole."""

_BLOCK = 1 << 20  # logits that are worked on at a time: small enough for the caches, large enough to keep two cores busy
_BLOCK_LABELS = 16  # more labels make a block larger, not its planes fewer: they are blended one by one


class Slab(NamedTuple):
    """Finished rows: probabilities (q, rows, y, z) from row `start` on. Valid until the next slab is asked for."""

    start: int
    probability: Tensor


def gaussian(size: int, *, sigma_share: float = 0.125) -> Tensor:
    """Gaussian along one axis, 1 at `size // 2`, with a standard deviation of `sigma_share * size` voxels; float64."""
    at = torch.arange(size, dtype=torch.float64)
    return torch.exp(-0.5 * ((at - size // 2) / (sigma_share * size)) ** 2)


def published_weights(roi_size: Sequence[int]) -> Tensor:
    """The window function of the published inference: peak 10, in half precision, its zeros lifted to the smallest non-zero value.

    Returns:
        x y z, float16.
    """
    x, y, z = (gaussian(size) for size in roi_size)
    exact = 10.0 * x[:, None, None] * y[None, :, None] * z[None, None, :]
    weights = torch.from_numpy(exact.numpy().astype(np.float16))  # one rounding; torch goes by way of float32 and rounds twice
    return weights.masked_fill_(weights == 0, weights[weights > 0].min())


def normalised_weights(grid: WindowGrid, axis: int) -> dict[int, Tensor]:
    """For each start on an axis the window's Gaussian divided by the sum of all windows' Gaussians: float32, sums to 1 in every voxel."""
    roi = grid.roi_size[axis]
    profile = gaussian(roi)
    total = torch.zeros(max(grid.shape[axis], roi), dtype=torch.float64)
    for start in grid.starts(axis):
        total[start : start + roi] += profile
    return {start: (profile / total[start : start + roi]).float() for start in grid.starts(axis)}


def sliding_windows(  # noqa: PLR0913 - MONAI's function has as many
    volume: Tensor,
    predictor: Predictor,
    grid: WindowGrid,
    *,
    labels: int,
    sw_batch_size: int = 1,
    padding_value: float = 0.0,
    skip: Callable[[Start], bool] | None = None,
    published: bool = False,
    accumulate: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    on_window: Callable[[int], None] | None = None,
) -> Iterator[Slab]:
    """Blended probabilities of a whole volume, handed out in finished slabs of rows.

    Args:
        volume: c x y z, any strides; windows are copied out of it.
        predictor: windows on `device` -> logits of `labels` labels; a window's sides are those of the grid.
        grid: where the windows lie.
        labels: number of labels.
        sw_batch_size: windows in one call of the predictor.
        padding_value: what stands beyond the end of a small volume (the normalised value of air).
        skip: whether a window holds nothing and counts as probability 0; ignored with `published`.
        published: float32 sums divided by a float32 weight band, with `published_weights`; nothing is skipped.
        accumulate: type of the band of sums (not with `published`).
        device: where the windows are predicted and blended.
        on_window: called with the number of windows done, after each batch.

    Yields:
        Slabs that cover the volume once, in the order of x.

    Examples:
        >>> volume = torch.zeros(1, 5, 4, 4)
        >>> grid = WindowGrid((5, 4, 4), (4, 4, 4))
        >>> [(slab.start, len(slab.probability[0])) for slab in sliding_windows(volume, lambda w: w * 0, grid, labels=1)]
        [(0, 1), (1, 4)]
    """
    band: _Band = _PublishedBand(grid, labels, device) if published else _Band(grid, labels, accumulate, device)
    starts = grid.starts(0)
    done = 0
    for index, (x, group) in enumerate(groupby(grid.windows(), key=lambda window: window[0])):
        windows = list(group)
        wanted = windows if published or skip is None else [w for w in windows if not skip(w)]
        for first in range(0, len(wanted), sw_batch_size):
            batch = wanted[first : first + sw_batch_size]
            pixels = torch.stack([_cut(volume, window, grid.roi_size, padding_value) for window in batch]).to(device)
            band.add(batch, predictor(pixels))
            if on_window is not None:
                on_window(done + first + len(batch))
        done += len(windows)
        if on_window is not None:
            on_window(done)
        stop = starts[index + 1] if index + 1 < len(starts) else grid.shape[0]
        if stop > x:
            yield Slab(x, band.finish(stop - x))


def _cut(volume: Tensor, start: Start, roi_size: Sequence[int], padding_value: float) -> Tensor:
    """One window, contiguous; what lies beyond the volume is padded."""
    piece = volume[(slice(None), *(slice(a, a + size) for a, size in zip(start, roi_size, strict=True)))]
    if tuple(piece.shape[1:]) == tuple(roi_size):
        return piece.contiguous()
    whole = piece.new_full((piece.shape[0], *roi_size), padding_value)
    whole[(slice(None), *(slice(0, size) for size in piece.shape[1:]))] = piece
    return whole


class _Band:
    """The open rows: sums of normalised weights times probabilities."""

    def __init__(self, grid: WindowGrid, labels: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.sums = torch.zeros((labels, grid.roi_size[0], grid.shape[1], grid.shape[2]), dtype=dtype, device=device)
        self._extent = [min(size, roi) for size, roi in zip(grid.shape, grid.roi_size, strict=True)]
        self._weights = [{start: w.to(device) for start, w in normalised_weights(grid, axis).items()} for axis in range(3)]

    def add(self, windows: Sequence[Start], logits: Tensor | Rows) -> None:
        """Blend the predictions of a batch of windows; the part of a window that sticks out of the volume is dropped."""
        nx, ny, nz = self._extent
        step = max(1, _BLOCK // (min(len(self.sums), _BLOCK_LABELS) * ny * nz))
        for index, (x, y, z) in enumerate(windows):
            target = self.sums[:, :, y : y + ny, z : z + nz]
            weights = self._window_weights((x, y, z))
            for first in range(0, nx, step):
                last = min(first + step, nx)
                block = logits[index, :, first:last] if isinstance(logits, Tensor) else logits(index, first, last)
                self._blend(target[:, first:last], block[..., :ny, :nz], weights(first, last))

    def finish(self, rows: int) -> Tensor:
        """The first `rows` rows, finished; the band moves on."""
        finished = _all_finite(self.sums[:, :rows].clone())
        _move_on(self.sums, rows)
        return finished

    def _window_weights(self, start: Start) -> Callable[[int, int], Tensor]:
        x, y, z = (self._weights[axis][start[axis]][: self._extent[axis]] for axis in range(3))
        plane = y[:, None] * z[None, :]
        return lambda first, last: x[first:last, None, None] * plane

    def _blend(self, target: Tensor, logits: Tensor, weights: Tensor) -> None:
        weights = weights.to(target.dtype)
        for sums, label in zip(target, logits, strict=True):  # label by label, so that all three stay in the cache
            sums.addcmul_(label.sigmoid().to(sums.dtype), weights)


class _PublishedBand(_Band):
    """The same with the published arithmetic: float32 sums and a float32 weight band, divided at the end."""

    def __init__(self, grid: WindowGrid, labels: int, device: torch.device | str) -> None:
        super().__init__(grid, labels, torch.float32, device)
        self._window = published_weights(grid.roi_size).to(device)
        self._totals = torch.zeros(self.sums.shape[1:], device=device)

    def add(self, windows: Sequence[Start], logits: Tensor | Rows) -> None:
        """Blend a batch of windows and count their weights."""
        super().add(windows, logits)
        nx, ny, nz = self._extent
        for _, y, z in windows:
            self._totals[:nx, y : y + ny, z : z + nz] += self._window[:nx, :ny, :nz]

    def finish(self, rows: int) -> Tensor:
        """The first `rows` rows, finished; the band moves on."""
        finished = _all_finite(self.sums[:, :rows] / self._totals[:rows])
        _move_on(self.sums, rows)
        _move_on(self._totals[None], rows)
        return finished

    def _window_weights(self, start: Start) -> Callable[[int, int], Tensor]:
        _, ny, nz = self._extent
        return lambda first, last: self._window[first:last, :ny, :nz]

    def _blend(self, target: Tensor, logits: Tensor, weights: Tensor) -> None:
        target += logits.sigmoid() * weights  # the type of the logits is that of the network, as published


def _all_finite(probability: Tensor) -> Tensor:
    """NaN is above no threshold: it would end as an empty mask that looks like an answer.

    The extremes tell it, since NaN spreads to them: `isfinite` of the whole needs twice the memory of the rows again.
    """
    if not bool(torch.isfinite(torch.stack(torch.aminmax(probability))).all()):
        raise StepError(
            "the network's answer",
            "values that are not finite (NaN or infinity)",
            "finite logits in every voxel",
            "check the weights and the intensities of the image; if half precision was asked for, try --precision fp32",
        )
    return probability


def _move_on(band: Tensor, rows: int) -> None:
    """Shift a band (q rows y z) by `rows`; what comes in is zero."""
    kept = band.shape[1] - rows
    for first in range(0, kept, rows):  # in steps no longer than the shift, so that source and target never overlap
        count = min(rows, kept - first)
        band[:, first : first + count] = band[:, first + rows : first + rows + count]
    band[:, max(kept, 0) :] = 0
