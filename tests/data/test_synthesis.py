"""Heads drawn from label maps: exact labels, any contrast, the same image for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medlore.data.volumes.augmentation import blur_matrix
from medlore.data.volumes.synthesis import (
    TABLE,
    SynthesisRules,
    draw_contrast,
    majority_of_tissues,
    strip_raggedly,
    strip_skull,
    synthesise,
)

Codes = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def head() -> Codes:
    """Shells from the middle out: white matter (two sides), grey matter (two sides), fluid, bone, soft tissue, skin, air."""
    at = np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij"))
    radius = np.linalg.norm(at, axis=0)
    codes = np.select([radius < 9, radius < 12, radius < 14, radius < 15, radius < 17, radius < 18], [2, 3, 24, 515, 507, 511], 0)
    right = at[0] > 0
    codes[right & (codes == 2)] = 41
    codes[right & (codes == 3)] = 42
    return codes.astype(np.uint16)


def only(family: str) -> SynthesisRules:
    chances = {"t1_like": 0.0, "t2_like": 0.0, "flair_like": 0.0}
    return SynthesisRules(**chances | {f"{family}_like": 1.0})


def test_the_same_generator_gives_the_same_image(head: Codes) -> None:
    one, two, other = (synthesise(head, np.random.default_rng(seed), SynthesisRules()) for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.allclose(one, other)
    assert one.dtype == np.float32
    assert one.shape == head.shape
    assert np.isfinite(one).all()
    assert one.min() >= 0


@pytest.mark.parametrize(("family", "order"), [("t1", "fgw"), ("t2", "wgf"), ("flair", "fwg")])
def test_families_have_the_contrast_of_their_sequence(head: Codes, family: str, order: str) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        contrast = draw_contrast(rng, only(family))
        image = synthesise(head, rng, only(family), contrast=contrast)
        means = {"f": image[head == 24].mean(), "g": image[np.isin(head, [3, 42])].mean(), "w": image[np.isin(head, [2, 41])].mean()}
        assert contrast.family == family
        assert means[order[0]] < means[order[2]]
        table = {"f": contrast.mean[24], "g": contrast.mean[3], "w": contrast.mean[2]}
        assert table[order[0]] < table[order[2]]


def test_left_and_right_share_their_grey_values() -> None:
    for seed in range(20):
        contrast = draw_contrast(np.random.default_rng(seed), SynthesisRules())
        for right, left in ((41, 2), (42, 3), (53, 17), (60, 28)):
            assert contrast.mean[right] == contrast.mean[left]
            assert contrast.deviation[right] == contrast.deviation[left]


def test_contrasts_differ_widely() -> None:
    ratios = []
    for seed in range(200):
        mean = draw_contrast(np.random.default_rng(seed), SynthesisRules()).mean
        ratios.append((mean[3] + 5) / (mean[2] + 5))
    assert np.mean(np.array(ratios) > 1) > 0.15
    assert np.mean(np.array(ratios) < 1) > 0.4
    assert max(ratios) > 2


@pytest.mark.parametrize("seed", range(8))
def test_stripping_leaves_the_brain_whole(head: Codes, seed: int) -> None:
    stripped = strip_skull(head, np.random.default_rng(seed))
    brain = np.isin(head, [2, 3, 41, 42])
    assert np.array_equal(stripped[brain], head[brain])
    assert stripped.dtype == head.dtype
    far = np.linalg.norm(np.argwhere(stripped) - 19.5, axis=1).max()  # the brain ends at 12
    assert far < 17.5
    assert np.array_equal(stripped[stripped > 0], head[stripped > 0])


def test_stripping_is_clean_more_often_than_not(head: Codes) -> None:
    left_over = [(strip_skull(head, np.random.default_rng(seed)) >= 500).any() for seed in range(40)]
    assert 0.05 < np.mean(left_over) < 0.5


def test_fluid_around_the_spinal_cord_goes_with_the_cord(head: Codes) -> None:
    codes = head.copy()
    codes[18:22, 18:22, :6] = 512
    codes[15:18, 18:22, :6] = 24
    for seed in range(20):
        stripped = strip_skull(codes, np.random.default_rng(seed))
        assert not (stripped[15:18, 18:22, :3] == 24).any()
        assert (stripped[head == 2] == 2).all()


def test_a_patch_without_brain_is_not_stripped() -> None:
    codes = np.full((10, 10, 10), 507, np.uint16)
    assert strip_skull(codes, np.random.default_rng(0)) is codes


def test_air_is_dark_unless_it_is_drawn_otherwise(head: Codes) -> None:
    dark = []
    for seed in range(15):
        image = synthesise(head, np.random.default_rng(seed), SynthesisRules(noise=0))
        dark.append(np.percentile(image[head == 0], 20) < np.median(image[head > 0]))
    assert np.mean(dark) > 0.9


def test_air_is_exactly_zero_where_it_was_cleared(head: Codes) -> None:
    clear = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        contrast = draw_contrast(rng, SynthesisRules())
        keep = head == 2
        image = synthesise(head, rng, SynthesisRules(), contrast=contrast, keep=keep if seed % 2 else None)
        if seed % 2:
            assert not image[~keep].any()
            assert image[keep].any()
        else:
            assert (image[head == 0] == 0).all() == (not contrast.noisy_air)
            clear += not contrast.noisy_air
    assert 0 < clear < 6


def test_codes_beyond_the_table_are_refused_by_numpy_not_wrapped(head: Codes) -> None:
    with pytest.raises(IndexError):
        synthesise(np.full((6, 6, 6), TABLE, np.uint16), np.random.default_rng(0), SynthesisRules())


def test_labels_follow_what_a_scanner_can_tell() -> None:
    """A sulcus of one voxel between two banks of cortex is lost in a blurred image, and stays in a sharp one."""
    codes = np.full((24, 24, 24), 3, np.uint16)
    codes[:, :8] = 42
    codes[12] = 24
    codes[:, :, :4] = 17
    sharp, blurred = ([blur_matrix(24, sigma)] * 3 for sigma in (0.35, 1.5))
    assert (majority_of_tissues(codes, sharp) == 24).sum() == (codes == 24).sum()
    lost = majority_of_tissues(codes, blurred)
    assert not (lost == 24).any()
    assert np.array_equal(lost == 17, codes == 17)
    assert set(np.unique(lost)) == {3, 17, 42}
    assert (lost[:, :7, 4:] == 42).all()  # sides stay apart
    assert (lost[:, 9:, 4:] == 3).all()
    only = np.full((4, 4, 4), 42, np.uint16)
    assert majority_of_tissues(only, [None] * 3) is only


def test_a_ragged_stripping_cuts_and_leaves_over(head: Codes) -> None:
    """As the coarse mask of a first pass does: nearly all of the brain stays, some cortex goes, some of what lies outside stays."""
    brain = (head > 0) & (head < 500) & (head != 24)
    kept = [strip_raggedly(head, np.random.default_rng(seed), voxel_mm=1.0) for seed in range(24)]
    shares = np.array([(k > 0)[brain].mean() for k in kept])
    assert shares.min() > 0.6
    assert shares.mean() > 0.9
    assert (shares < 1).any()
    assert any(((k > 0) & ~brain).any() for k in kept)
    assert all(np.array_equal(k[k > 0], head[k > 0]) for k in kept)
    outside = np.where(brain, 0, head).astype(head.dtype)
    assert strip_raggedly(outside, np.random.default_rng(0), voxel_mm=1.0) is outside
