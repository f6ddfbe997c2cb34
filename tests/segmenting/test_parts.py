"""Stray parts: small ones go, pairs stay, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medlore.data.volumes.preparation import PackedMasks
from medlore.models.segmenter.manifest import preprocessing_faults
from medlore.segmenting.parts import large_parts, without_stray_parts


def pair_and_crumbs() -> np.ndarray:
    mask = np.zeros((20, 18, 33), bool)
    mask[2:6, 3:9, 9:17] = True  # 192 voxels
    mask[12:16, 3:9, 12:18] = True  # 144
    mask[8:10, 14:17, 25:30] = True  # 30
    mask[19, 17, 32] = True
    return mask


def test_small_parts_go_and_the_given_masks_stay() -> None:
    mask = pair_and_crumbs()
    packed = PackedMasks(mask.shape, 2)
    packed.set_planes(1, 0, (slice(0, 18), slice(0, 33)), mask)
    kept, index = without_stray_parts(packed, 1, 0.5)
    expected = mask.copy()
    expected[8:10, 14:17, 25:30] = expected[19, 17, 32] = False
    np.testing.assert_array_equal(kept.whole(index), expected)
    assert kept.counts[index] == 336
    np.testing.assert_array_equal(packed.whole(1), mask)
    assert without_stray_parts(packed, 0, 0.5) == (packed, 0)  # an empty mask


@pytest.mark.parametrize(("share", "parts"), [(1.0, 1), (0.75, 2), (0.15, 3), (0.001, 4)])
def test_the_share_counts_from_the_largest(share: float, parts: int) -> None:
    assert ndimage.label(large_parts(pair_and_crumbs(), share))[1] == parts


def test_a_manifest_with_strange_parts_is_refused() -> None:
    assert not preprocessing_faults({"parts": {"mri": {"hippocampus": 0.5}}}, "preprocessing")
    for strange in ([], {"mri": 0.5}, {"mri": {"hippocampus": 0}}, {"mri": {"hippocampus": 1.5}}, {"mri": {"hippocampus": "half"}}):
        assert "preprocessing.parts" in preprocessing_faults({"parts": strange}, "preprocessing")[0]
