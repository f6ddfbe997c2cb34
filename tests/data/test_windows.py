"""Windows: the published grid and weights, and a band that gives what whole arrays give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medlore.data.volumes.window_grid import WindowGrid
from medlore.data.volumes.windows import gaussian, normalised_weights, published_weights, sliding_windows
from medlore.errors import InputError, StepError

PUBLISHED = (288, 288, 96)


@pytest.mark.parametrize(
    ("shape", "count"),
    [((100, 100, 40), 1), (PUBLISHED, 1), ((289, 288, 97), 4), ((400, 350, 200), 16), ((512, 512, 144), 18), ((433, 300, 145), 18)],
)
def test_window_counts_of_the_published_inference(shape, count) -> None:
    assert len(WindowGrid(shape, PUBLISHED).windows()) == count


def test_window_starts_of_the_published_inference() -> None:
    grid = WindowGrid((400, 350, 200), PUBLISHED)
    assert [grid.starts(axis) for axis in range(3)] == [[0, 112], [0, 62], [0, 48, 96, 104]]
    assert len(WindowGrid((450, 373, 101), PUBLISHED).windows()) == 3 * 2 * 2


def test_gaussian_of_the_published_inference() -> None:
    weights = published_weights(PUBLISHED)
    assert weights.dtype == torch.float16
    assert weights.max() == 10
    assert float(weights[144, 144, 0]) == pytest.approx(0.0033550, abs=1e-7)
    assert float(weights[0, 144, 48]) == pytest.approx(0.0033550, abs=1e-7)
    assert float(weights[100, 120, 30]) == pytest.approx(1.2314453, abs=1e-7)
    assert float(weights.double().sum()) == pytest.approx(2_448_918.58, rel=1e-6)
    assert int((weights == weights.min()).sum()) == 72_125


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_weights_add_up_to_one_in_every_voxel(overlap: float) -> None:
    grid = WindowGrid((29, 8, 5), (8, 8, 8), overlap)
    for axis in range(3):
        total = torch.zeros(max(grid.shape[axis], 8))
        for start, weights in normalised_weights(grid, axis).items():
            total[start : start + 8] += weights
        assert torch.allclose(total[: grid.shape[axis]], torch.ones(grid.shape[axis]), atol=1e-6)


def whole(volume: torch.Tensor, predictor, grid: WindowGrid, **options) -> torch.Tensor:
    slabs = []
    for slab in sliding_windows(volume, predictor, grid, **options):
        assert slab.start == sum(s.shape[1] for s in slabs)
        slabs.append(slab.probability.float().clone())
    return torch.cat(slabs, dim=1)


def restated(volume: torch.Tensor, predictor, grid: WindowGrid, labels: int, weights: torch.Tensor) -> torch.Tensor:
    """Two arrays of labels x voxels, as published."""
    size = [max(n, r) for n, r in zip(grid.shape, grid.roi_size, strict=True)]
    padded = torch.zeros(1, *size)
    padded[:, : grid.shape[0], : grid.shape[1], : grid.shape[2]] = volume
    sums, totals = torch.zeros(labels, *size), torch.zeros(labels, *size)
    for x, y, z in grid.windows():
        box = (slice(None), slice(x, x + grid.roi_size[0]), slice(y, y + grid.roi_size[1]), slice(z, z + grid.roi_size[2]))
        sums[box] += torch.sigmoid(predictor(padded[box][None])[0]) * weights
        totals[box] += weights
    return (sums / totals)[:, : grid.shape[0], : grid.shape[1], : grid.shape[2]]


def position_dependent(windows: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(-1, 1, windows.shape[2])[:, None, None]
    return torch.cat([windows + ramp, 0.5 - windows * ramp, windows * 0 - ramp], dim=1)


@pytest.mark.parametrize("shape", [(23, 17, 9), (8, 30, 8), (5, 4, 20), (40, 8, 8)])
def test_published_band_equals_whole_arrays_bit_by_bit(shape) -> None:
    volume, grid = torch.randn(1, *shape), WindowGrid(shape, (8, 8, 8))
    ours = whole(volume, position_dependent, grid, labels=3, published=True)
    theirs = restated(volume, position_dependent, grid, 3, published_weights((8, 8, 8)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(23, 17, 9), (5, 4, 20)])
def test_fast_band_is_within_half_precision_of_exact_weights(shape) -> None:
    volume, grid = torch.randn(1, *shape), WindowGrid(shape, (8, 8, 8))
    x, y, z = (gaussian(8).float() for _ in range(3))
    theirs = restated(volume, position_dependent, grid, 3, x[:, None, None] * y[:, None] * z)
    fast = whole(volume, position_dependent, grid, labels=3)
    assert (fast - theirs).abs().max() < 2e-3
    exact = whole(volume, position_dependent, grid, labels=3, accumulate=torch.float32)
    assert (exact - theirs).abs().max() < 1e-5


def test_batches_and_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, grid = torch.randn(1, 23, 17, 9), WindowGrid((23, 17, 9), (8, 8, 8))
    plain = whole(volume, position_dependent, grid, labels=3, accumulate=torch.float32)
    assert torch.equal(plain, whole(volume, position_dependent, grid, labels=3, sw_batch_size=4, accumulate=torch.float32))

    def by_rows(windows: torch.Tensor):
        logits = position_dependent(windows)
        return lambda index, first, last: logits[index, :, first:last]

    monkeypatch.setattr("medlore.data.volumes.windows._BLOCK", 200)
    assert torch.equal(plain, whole(volume, by_rows, grid, labels=3, sw_batch_size=2, accumulate=torch.float32))


def test_monai_agrees() -> None:
    from monai.inferers import sliding_window_inference

    volume, grid = torch.randn(1, 21, 18, 12), WindowGrid((21, 18, 12), (8, 8, 8))

    def probabilities(windows: torch.Tensor) -> torch.Tensor:
        return position_dependent(windows).sigmoid()

    theirs = sliding_window_inference(volume[None], (8, 8, 8), 1, probabilities, overlap=0.5, mode="gaussian", sigma_scale=0.125)[0]
    ours = whole(volume, position_dependent, grid, labels=3, accumulate=torch.float32)
    # MONAI centres its Gaussian half a voxel lower; away from edges both blend the same predictions
    assert (ours - theirs).abs().mean() < 0.03
    constant = sliding_window_inference(volume[None], (8, 8, 8), 1, lambda w: w.sigmoid(), overlap=0.5, mode="gaussian")[0]
    assert torch.allclose(constant, whole(volume, lambda w: w, grid, labels=1, accumulate=torch.float32), atol=1e-5)


def test_skipped_windows_count_as_nothing_and_cost_no_call() -> None:
    volume, grid = torch.zeros(1, 32, 8, 8), WindowGrid((32, 8, 8), (8, 8, 8), 0.0)
    calls = []

    def ones(windows: torch.Tensor) -> torch.Tensor:
        calls.append(len(windows))
        return windows + 100

    result = whole(volume, ones, grid, labels=1, skip=lambda start: start[0] >= 16)
    assert sum(calls) == 2
    assert torch.equal(result[0, :, 0, 0] > 0.5, torch.arange(32) < 16)
    whole(volume, ones, grid, labels=1, skip=lambda start: True, published=True)
    assert sum(calls) == 2 + 4  # the published rules skip nothing


def test_small_volumes_are_padded_with_air_and_cut_back() -> None:
    seen = []

    def remember(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows)
        return windows

    result = whole(torch.ones(1, 5, 4, 3), remember, WindowGrid((5, 4, 3), (8, 8, 8)), labels=1, padding_value=-2.5)
    assert result.shape == (1, 5, 4, 3)
    assert seen[0].shape == (1, 1, 8, 8, 8)
    assert seen[0][0, 0, 5:].unique().tolist() == [-2.5]
    assert seen[0][0, 0, :5, :4, :3].unique().tolist() == [1.0]


def test_progress_ends_at_the_number_of_windows() -> None:
    seen: list[int] = []
    whole(torch.zeros(1, 20, 8, 8), lambda w: w, WindowGrid((20, 8, 8), (8, 8, 8)), labels=1, on_window=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 4


def test_the_band_does_not_grow_with_the_volume() -> None:
    from medlore.data.volumes.windows import _Band

    sizes = [_Band(WindowGrid((length, 8, 8), (8, 8, 8)), 2, torch.float16, "cpu").sums.numel() for length in (16, 160, 1600)]
    assert sizes[0] == sizes[1] == sizes[2] == 2 * 8 * 8 * 8


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_out_of_range_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match="--overlap"):
        WindowGrid((8, 8, 8), (4, 4, 4), overlap)


def test_starts_cover_every_voxel() -> None:
    for size in (1, 7, 8, 9, 15, 16, 17, 100):
        for overlap in (0, 0.3, 0.5, 0.9):
            starts = WindowGrid((size, 8, 8), (8, 8, 8), overlap).starts(0)
            covered = np.zeros(max(size, 8), bool)
            for start in starts:
                covered[start : start + 8] = True
            assert covered[:size].all()
            assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_answer(published: bool, value: float) -> None:
    """NaN is above no threshold: without this the mask would be empty and the case done. Infinity alone is a sure voxel."""
    grid = WindowGrid((8, 8, 8), (4, 4, 4))

    def predictor(windows: torch.Tensor) -> torch.Tensor:
        logits = windows * 0.0
        logits[..., 1, 1, 1] = value
        return logits

    def run() -> None:
        for _ in sliding_windows(torch.zeros(1, 8, 8, 8), predictor, grid, labels=1, published=published):
            pass

    if value == float("inf"):
        run()
    else:
        with pytest.raises(StepError, match="not finite"):
            run()


def test_half_precision_is_one_rounding_of_the_exact_gaussian() -> None:
    size = (31, 17, 9)
    exact = np.ones(size) * 10.0
    for axis, n in enumerate(size):
        profile = np.exp(-0.5 * ((np.arange(n) - n // 2) / (0.125 * n)) ** 2)
        exact = exact * profile.reshape([-1 if a == axis else 1 for a in range(3)])
    wanted = exact.astype(np.float16)
    wanted[wanted == 0] = wanted[wanted > 0].min()
    assert np.array_equal(published_weights(size).numpy(), wanted)


def test_finished_rows_are_held_once() -> None:
    """A check for NaN that makes maps of its own took 1.7 times the band beside it, which no memory plan counted."""
    from torch.profiler import ProfilerActivity, profile

    from medlore.data.volumes.windows import _Band

    band = _Band(WindowGrid((32, 32, 32), (16, 32, 32)), 8, torch.float16, "cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        band.finish(16)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in found.events())
    assert 0.99 * band.sums.nbytes < taken < 1.1 * band.sums.nbytes
