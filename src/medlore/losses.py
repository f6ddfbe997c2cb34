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
        targets: (b,) class indices for `single`, (b, c) zeros and ones for `multi`.
        kind: which of the two.

    Returns:
        A scalar; both kinds are means, so that tasks of either kind weigh alike in a sum.
    """
    if kind == "single":
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


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

    Example:
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
