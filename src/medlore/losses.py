"""Losses of training and distillation.

Axis letters: b batch, c classes, d width, q prompt, x y z space.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TaskKind = Literal["single", "multi"]


def task_loss(logits: Tensor, targets: Tensor, kind: TaskKind) -> Tensor:
    """Cross-entropy of a single-label task, mean binary cross-entropy of a multi-label one.

    Args:
        logits: (b, c).
        targets: (b,) class indices for `single`, (b, c) for `multi`: 1, 0, or NaN where a label is not known and takes no part.
        kind: which of the two.

    Returns:
        A scalar; both kinds are means, so that tasks of either kind weigh alike in a sum.
    """
    if kind == "single":
        return F.cross_entropy(logits, targets)
    known = (~targets.isnan()).to(logits.dtype)
    # The mean over all labels, of which the unknown ones are 0, times all over known: to the bit the plain mean where all are known.
    mean = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num().to(logits.dtype), weight=known)
    return mean * (known.numel() / known.sum(dtype=torch.float32).clamp_min(1))


def logit_distillation(student: Tensor, teacher: Tensor, kind: TaskKind, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of softened outputs, mean over the batch.

    The factor T² keeps the gradient's size when the temperature changes. For `multi` every class is a Bernoulli variable of
    its own and the mean runs over classes too.

    Args:
        student: logits (b, c).
        teacher: logits (b, c); no gradient reaches them.
        kind: softmax (`single`) or independent sigmoids (`multi`).
        temperature: T > 0.

    Source:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; LoRKD, CVPR 2024, its
        distillation term; the Bernoulli form is ours, for outputs that do not compete.

    Examples:
        >>> z = torch.tensor([[2.0, -1.0]])
        >>> float(logit_distillation(z, z, "single", 4.0))
        0.0
    """
    student, teacher = student / temperature, teacher.detach() / temperature
    if kind == "single":
        divergence = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="batchmean", log_target=True)
    else:
        divergence = bernoulli_divergence(student, teacher).mean()
    return temperature**2 * divergence


def bernoulli_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(σ(teacher) ‖ σ(student)) for every entry, from logits, without overflow.

    Source:
        p log(p/q) + (1-p) log((1-p)/(1-q)) written with log σ; ours.
    """
    chance = torch.sigmoid(teacher)
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return chance * yes + (1 - chance) * no


def feature_distillation(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean 1 - cosine between the student's projected features and the teacher's.

    Args:
        projected: (b, d), the student's features after a *trained* projection to the teacher's width.
        teacher: (b, d); no gradient reaches them.

    Source:
        The term of LoRKD's classification recipe whose official projection stays random; the cosine form is ours, so that
        the weight does not depend on the scale of the teacher's features.
    """
    return 1 - F.cosine_similarity(projected, teacher.detach(), dim=-1).mean()


DEEP_WEIGHTS = (8 / 15, 4 / 15, 2 / 15, 1 / 15)  # full resolution, 1/2, 1/4, 1/8


def mask_loss(logits: Tensor, targets: Tensor, valid: Tensor, *, bce: float = 1.0, dice: float = 1.0, smooth: float = 1e-5) -> Tensor:
    """Binary cross-entropy plus soft Dice with squared denominators, a mean over the valid pairs of sample and prompt.

    For one pair with probabilities p and mask y over n voxels: `-1/n Σ [y log p + (1-y) log(1-p)]` and
    `1 - (2 Σ p y + smooth) / (Σ p² + Σ y + smooth)`.

    Args:
        logits: (b, q, x, y, z); any float type, computed in 32 bits.
        targets: the same shape, Boolean.
        valid: (b, q), above 0 where a prompt counts; its values weigh the pairs.
        bce: weight of the cross-entropy.
        dice: weight of the Dice term.
        smooth: keeps an empty mask defined.

    Returns:
        A scalar; 0 where no pair is valid.

    Source:
        Milletari et al., "V-Net", 2016, for squared denominators; the sum of both terms per prompt is SAT's and LoRKD's.

    Examples:
        >>> y = torch.tensor([[[[[True, False]]]]])
        >>> round(float(mask_loss(torch.zeros(1, 1, 1, 1, 2), y, torch.ones(1, 1), smooth=0.0)), 4)  # log 2 + 1 - 1 / 1.5
        1.0265
    """
    z, y = logits.float().flatten(2), targets.flatten(2).float()
    total = z.new_zeros(z.shape[:2])
    if bce > 0:
        total = total + bce * (F.softplus(z).mean(-1) - (z * y).mean(-1))
    if dice > 0:
        chance = z.sigmoid()
        common, squares = (chance * y).sum(-1), chance.square().sum(-1)
        total = total + dice * (1 - (2 * common + smooth) / (squares + y.sum(-1) + smooth))
    return _mean_of_valid(total, valid)


def deep_mask_loss(levels: list[Tensor], targets: Tensor, valid: Tensor, *, bce: float = 1.0, dice: float = 1.0) -> Tensor:
    """`mask_loss` at full, 1/2, 1/4, 1/8 resolution, weighed 8 : 4 : 2 : 1; masks are brought down by nearest neighbour.

    Args:
        levels: logits (b, q, ...) from the highest resolution down; one level alone is `mask_loss` itself.
        targets: (b, q, x, y, z) Boolean, at full resolution.
        valid: (b, q).
        bce: weight of the cross-entropy.
        dice: weight of the Dice term.

    Source:
        SAT's training (weights 8/15 to 1/15); with fewer levels the weights are rescaled to sum to 1.
    """
    weights = DEEP_WEIGHTS[: len(levels)]
    losses = [w * mask_loss(z, nearest_mask(targets, z.shape[2:]), valid, bce=bce, dice=dice) for w, z in zip(weights, levels, strict=True)]
    return torch.stack(losses).sum() / sum(weights)


def nearest_mask(targets: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Masks (b, q, x, y, z) on a coarser grid of that shape, by nearest neighbour (each cell takes its first voxel)."""
    if tuple(shape) == tuple(targets.shape[2:]):
        return targets
    if all(full % low == 0 for full, low in zip(targets.shape[2:], shape, strict=True)):
        steps = [full // low for full, low in zip(targets.shape[2:], shape, strict=True)]
        return targets[:, :, :: steps[0], :: steps[1], :: steps[2]]
    return F.interpolate(targets.to(torch.uint8), size=tuple(shape), mode="nearest").bool()


def mask_distillation(student: Tensor, teacher: Tensor, valid: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student) of every voxel's Bernoulli distribution, mean over voxels and valid pairs.

    Args:
        student: logits (b, q, x, y, z).
        teacher: the same shape; no gradient reaches them.
        valid: (b, q).
        temperature: T > 0, divides both logits.

    Source:
        LoRKD (arXiv 2409.19540), the pixel term of its segmentation loss, which is left open there for outputs that overlap;
        one Bernoulli variable a prompt and voxel is ours.
    """
    z, t = student.float() / temperature, teacher.detach().float() / temperature
    return temperature**2 * _mean_of_valid(bernoulli_divergence(z, t).flatten(2).mean(-1), valid)


def _mean_of_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Weighted mean (b, q) -> scalar; an invalid pair takes no part, whatever its value."""
    counted = torch.where(valid > 0, values * valid, torch.zeros_like(values))
    return counted.sum() / valid.sum().clamp_min(torch.finfo(torch.float32).tiny)
