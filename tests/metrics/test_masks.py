"""Dice and surface Dice: closed forms, MONAI, and the empty-mask rule."""

from __future__ import annotations

import numpy as np
import pytest

from medlore.errors import InputError
from medlore.metrics.masks import dice, surface_areas, surface_dice


def box(*extent: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((40, 40, 30), bool)
    mask[tuple(slice(a, b) for a, b in extent)] = True
    return mask


TRUTH = box((10, 30), (10, 30), (10, 20))
CLOSED = {
    "identical": (TRUTH, 1.0, 1.0),
    "shifted by 1 along x": (np.roll(TRUTH, 1, 0), 0.95, 1.0),
    "shifted by 2 along x": (np.roll(TRUTH, 2, 0), 0.9, 0.6534973),
    "shifted by 1 along z": (np.roll(TRUTH, 1, 2), 0.9, 0.7504584),
    "smaller by 1": (box((11, 29), (11, 29), (11, 19)), 0.7864078, 0.6986794),
    "empty": (TRUTH & False, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_boxes_of_20_20_10_voxels_at_1_1_3_mm(name: str) -> None:
    pred, wanted, wanted_surface = CLOSED[name]
    assert dice(pred, TRUTH) == pytest.approx(wanted, abs=5e-8)
    assert surface_dice(pred, TRUTH, spacing_mm=(1, 1, 3), tolerance_mm=1) == pytest.approx(wanted_surface, abs=5e-8)
    assert surface_dice(TRUTH, pred, spacing_mm=(1, 1, 3), tolerance_mm=1) == pytest.approx(wanted_surface, abs=5e-8)


def test_empty_masks() -> None:
    nothing = TRUTH & False
    for measure in (dice, lambda a, b: surface_dice(a, b, spacing_mm=(1, 1, 3))):
        assert measure(nothing, nothing) == 1.0
        assert measure(TRUTH, nothing) == 0.0
        assert measure(nothing, TRUTH) == 0.0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 0.7, 3.0)])
def test_areas_are_monais_for_all_256_neighbourhoods(spacing) -> None:
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    theirs = create_table_neighbour_code_to_surface_area(spacing)[0].numpy().ravel()
    assert np.allclose(surface_areas(spacing), theirs, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_monai_agrees_on_ragged_masks(seed: int) -> None:
    import torch
    from monai.metrics import compute_dice, compute_surface_dice
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    pred, truth = (ndimage.gaussian_filter(rng.normal(size=(18, 16, 12)), 1.5) > 0.02 for _ in range(2))
    a, b = (torch.from_numpy(np.stack([~m, m]))[None].float() for m in (pred, truth))
    theirs = compute_surface_dice(a, b, [1.0], spacing=(0.9, 1.2, 2.5), use_subvoxels=True)
    assert surface_dice(pred, truth, spacing_mm=(0.9, 1.2, 2.5)) == pytest.approx(float(theirs), abs=1e-5)
    assert dice(pred, truth) == pytest.approx(float(compute_dice(a, b, include_background=False)), abs=1e-6)


def test_a_mask_at_the_edge_of_the_volume_has_its_whole_surface() -> None:
    whole = np.ones((4, 4, 4), bool)
    assert surface_dice(whole, np.pad(np.ones((3, 4, 4), bool), ((0, 1), (0, 0), (0, 0))), spacing_mm=(5, 5, 5)) < 0.9


def test_wrong_use() -> None:
    with pytest.raises(InputError, match="two masks on one grid"):
        dice(TRUTH, TRUTH[:-1])
    with pytest.raises(InputError, match="tolerance from 0"):
        surface_dice(TRUTH, TRUTH, spacing_mm=(1, 1, 1), tolerance_mm=-1)
