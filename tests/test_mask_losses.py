"""Losses of segmentation against closed forms and against MONAI's."""

from __future__ import annotations

import math

import pytest
import torch

from medlore.decomposing.segmenters.batches import Batch
from medlore.decomposing.segmenters.settings import SegmenterLossSettings
from medlore.decomposing.segmenters.training import loss_terms
from medlore.losses import DEEP_WEIGHTS, deep_mask_loss, mask_distillation, mask_loss, nearest_mask

VALID = torch.ones(1, 1)


def mask(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, 1, 1, -1)


def test_cross_entropy_and_dice_are_the_closed_forms() -> None:
    # p = 3/4, 1/4 for the mask 1, 0: cross-entropy log(4/3); Dice 1 - 2 * 3/4 / (9/16 + 1/16 + 1)
    logits, target = mask(math.log(3), -math.log(3)), mask(1, 0).bool()
    bce, dice = math.log(4 / 3), 1 - 1.5 / 1.625
    assert mask_loss(logits, target, VALID, dice=0.0).item() == pytest.approx(bce, rel=1e-6)
    assert mask_loss(logits, target, VALID, bce=0.0, smooth=0.0).item() == pytest.approx(dice, rel=1e-6)
    assert mask_loss(logits, target, VALID, bce=2.0, dice=3.0, smooth=0.0).item() == pytest.approx(2 * bce + 3 * dice, rel=1e-6)


@pytest.mark.full  # MONAI takes seconds to import
def test_both_terms_are_monais() -> None:
    from monai.losses.dice import DiceLoss

    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 3, 4, 5, 6) > 0.6
    dice = DiceLoss(sigmoid=True, squared_pred=True, smooth_nr=1e-5, smooth_dr=1e-5)(logits, target.float())
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(mask_loss(logits, target, torch.ones(2, 3)), dice + bce)


def test_a_pair_that_does_not_count_takes_no_part_even_if_it_is_not_finite() -> None:
    logits = torch.cat([mask(1.0, -2.0), mask(math.inf, math.nan)], dim=1).requires_grad_()
    target = torch.cat([mask(1, 0), mask(1, 1)], dim=1).bool()
    alone = mask_loss(logits[:, :1], target[:, :1], VALID)
    torch.testing.assert_close(mask_loss(logits, target, torch.tensor([[1.0, 0.0]])), alone)
    assert mask_loss(logits[:, :1], target[:, :1], torch.zeros(1, 1)).item() == 0


def test_pairs_weigh_as_they_are_reported() -> None:
    logits, target = torch.cat([mask(2.0, 2.0), mask(-1.0, -1.0)], dim=1), torch.ones(1, 2, 1, 1, 2, dtype=torch.bool)
    one, other = (mask_loss(logits[:, i : i + 1], target[:, :1], VALID) for i in (0, 1))
    torch.testing.assert_close(mask_loss(logits, target, torch.tensor([[3.0, 1.0]])), (3 * one + other) / 4)


def test_an_empty_mask_is_defined() -> None:
    assert mask_loss(mask(-40.0, -40.0), mask(0, 0).bool(), VALID).item() == pytest.approx(0, abs=1e-6)


def test_deep_supervision_weighs_levels_eight_four_two_one() -> None:
    torch.manual_seed(1)
    target = torch.rand(1, 2, 8, 8, 8) > 0.5
    levels = [torch.randn(1, 2, side, side, side) for side in (8, 4, 2, 1)]
    valid = torch.ones(1, 2)
    each = [mask_loss(z, target[:, :, :: 8 // s, :: 8 // s, :: 8 // s], valid) for z, s in zip(levels, (8, 4, 2, 1), strict=True)]
    torch.testing.assert_close(deep_mask_loss(levels, target, valid), (8 * each[0] + 4 * each[1] + 2 * each[2] + each[3]) / 15)
    torch.testing.assert_close(deep_mask_loss(levels[:2], target, valid), (2 * each[0] + each[1]) / 3)
    assert sum(DEEP_WEIGHTS) == pytest.approx(1)


def test_masks_are_brought_down_by_nearest_neighbour() -> None:
    target = torch.zeros(1, 1, 6, 4, 4, dtype=torch.bool)
    target[0, 0, 2, 0, 0] = True
    low = nearest_mask(target, (3, 2, 2))
    assert low.dtype == torch.bool
    assert low.nonzero().tolist() == [[0, 0, 1, 0, 0]]
    assert torch.equal(nearest_mask(target, (4, 4, 4)), torch.nn.functional.interpolate(target.float(), (4, 4, 4)).bool())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_voxel_distillation_is_t_squared_kl_of_two_coins(temperature: float) -> None:
    student, teacher = mask(1.5, -0.5, 4.0), mask(-2.0, 0.25, 3.0)
    p, q = torch.sigmoid(teacher / temperature), torch.sigmoid(student / temperature)
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * temperature**2
    torch.testing.assert_close(mask_distillation(student, teacher, VALID, temperature=temperature), by_hand)
    assert mask_distillation(teacher, teacher, VALID).item() == 0


def test_logits_of_sixteen_bits_are_computed_in_thirty_two() -> None:
    logits, target = torch.randn(1, 1, 8, 8, 8).bfloat16(), torch.rand(1, 1, 8, 8, 8) > 0.5
    torch.testing.assert_close(mask_loss(logits, target, VALID), mask_loss(logits.float(), target, VALID), rtol=0, atol=0)


def test_no_gradient_reaches_the_teacher_and_one_reaches_the_student() -> None:
    student, teacher = (mask(1.0, 2.0).requires_grad_() for _ in range(2))
    mask_distillation(student, teacher + 1, VALID).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().max() > 0


def test_the_terms_are_weighed_as_the_study_says() -> None:
    batch = Batch(torch.zeros(1, 1, 1, 1, 2), mask(1, 0).bool(), torch.zeros(1, 1).long(), VALID, ("brain",), ("case",))
    logits, taught = mask(0.5, -0.5), mask(2.0, 1.0)
    terms = loss_terms([logits], batch, SegmenterLossSettings(bce=0.5, dice=2.0, distillation=0.3, temperature=2.0), taught)
    torch.testing.assert_close(terms["masks"], mask_loss(logits, batch.targets, VALID, bce=0.5, dice=2.0))
    torch.testing.assert_close(terms["distillation"], 0.3 * mask_distillation(logits, taught, VALID, temperature=2.0))
    assert terms.keys() == {"masks", "distillation"}
    assert loss_terms([logits], batch, SegmenterLossSettings()).keys() == {"masks"}
