from __future__ import annotations

import pytest
import torch

from medlore.models.segmenter.unet3d import UNet3d


@pytest.fixture
def unet() -> UNet3d:
    return UNet3d(3, (4, 6, 8), blocks=2, strides=(1, 2, 2))


def test_maps_come_highest_resolution_first(unet: UNet3d) -> None:
    encoded, decoded = unet(torch.randn(2, 3, 8, 8, 4))
    assert [tuple(m.shape) for m in encoded] == [(2, 4, 8, 8, 4), (2, 6, 4, 4, 2), (2, 8, 2, 2, 1)]
    assert [tuple(m.shape) for m in decoded] == [(2, 4, 8, 8, 4), (2, 6, 4, 4, 2)]


def test_samples_of_a_batch_do_not_meet(unet: UNet3d) -> None:
    """No norm couples the batch: what expert separation rests on."""
    x = torch.randn(3, 3, 8, 8, 4)
    together = unet(x)[1][0]
    torch.testing.assert_close(together[1:2], unet(x[1:2])[1][0], atol=1e-5, rtol=1e-5)


def test_decoding_leaves_the_encoder_maps_to_the_caller(unet: UNet3d) -> None:
    encoded, _ = unet(torch.randn(1, 3, 8, 8, 4))
    assert len(encoded) == 3


def test_gradients_are_right(unet: UNet3d) -> None:
    """The in-place activation does not disturb autograd."""
    unet.double()
    x = torch.randn(1, 3, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: unet(v)[1][0].square().mean(), (x,), eps=1e-6, atol=1e-6)


def test_convolutions_start_as_he_proposed() -> None:
    unet = UNet3d(64, (64, 64), blocks=1, strides=(1, 2))
    weight = unet.encoder.stages[1][0].convs[0].conv.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (1 + 0.01**2) / (64 * 27)) ** 0.5, rel=0.02)
