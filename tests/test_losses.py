"""Losses against written-out formulas, and their gradients where they matter."""

from __future__ import annotations

import math

import pytest
import torch

from medlore.losses import bernoulli_divergence, feature_distillation, logit_distillation, task_loss


def test_task_losses_are_the_textbook_ones() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    by_hand = -sum(math.log(math.exp(logits[b, c]) / sum(math.exp(v) for v in logits[b].tolist())) for b, c in ((0, 0), (1, 1))) / 2
    assert task_loss(logits, torch.tensor([0, 1]), "single").item() == pytest.approx(by_hand, rel=1e-6)
    targets = torch.tensor([[1, 0, 0], [0, 1, 1]])
    p = torch.sigmoid(logits)
    by_hand_multi = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert torch.allclose(task_loss(logits, targets, "multi"), by_hand_multi)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_t_squared_kl_per_sample(temperature: float) -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    assert torch.allclose(logit_distillation(student, teacher, "single", temperature), temperature**2 * (p * (p / q).log()).sum(-1).mean())
    p, q = torch.sigmoid(teacher / temperature), torch.sigmoid(student / temperature)
    bernoulli = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert torch.allclose(logit_distillation(student, teacher, "multi", temperature), temperature**2 * bernoulli)


def test_divergence_is_zero_at_equality_positive_elsewhere_and_never_overflows() -> None:
    z = torch.tensor([-100.0, -1.0, 0.0, 80.0])
    assert torch.equal(bernoulli_divergence(z, z), torch.zeros(4))
    far = bernoulli_divergence(-z, z)
    assert torch.isfinite(far).all()
    assert (far >= 0).all()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (logit_distillation(student, teacher, "single", 2.0) + logit_distillation(student, teacher, "multi", 2.0)).backward()
    feature_distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_feature_distillation_ignores_scale() -> None:
    f = torch.randn(4, 8)
    assert feature_distillation(3 * f, f).item() == pytest.approx(0, abs=1e-6)
    assert feature_distillation(-f, f).item() == pytest.approx(2, abs=1e-6)
