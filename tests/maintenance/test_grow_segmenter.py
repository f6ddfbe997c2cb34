"""A grown network answers as the small one does, and its new channels can learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from maintenance.grow_segmenter import grown

from medlore.errors import InputError
from medlore.models.segmenter.network import Segmenter, SegmenterConfig

SMALL = SegmenterConfig(
    (4, 6, 8), strides=(1, 2, 2), query_width=12, projection_width=8, mask_width=8, image_channels=1, patch=4, decoder_layers=1, heads=2,
    feedforward=16, mask_activation="none",
)  # fmt: skip
WIDE = replace(SMALL, features=(4, 10, 16), deep_widths=(8,))


def shuffled(seed: int) -> Segmenter:
    """A network whose every number is drawn, norms and biases too."""
    torch.manual_seed(seed)
    network = Segmenter(SMALL, dropout=0.0).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def test_a_grown_network_gives_the_same_logits() -> None:
    small = shuffled(0)
    large = grown(small, WIDE).eval()
    image, queries = torch.randn(2, 1, 16, 12, 8), torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(large(image, queries), small(image, queries), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in large.parameters()) > 2 * sum(p.numel() for p in small.parameters())


def test_what_is_new_has_a_gradient_from_the_first_step_on() -> None:
    large = grown(shuffled(1), WIDE)
    large(torch.randn(1, 1, 16, 12, 8), torch.randn(3, 12)).square().mean().backward()
    outgoing = large.backbone.encoder.stages[2][0].convs[0].conv.weight.grad[:8, 6:]  # from new channels of stage 1 to old ones of stage 2
    assert outgoing is not None
    assert outgoing.abs().max() > 0


@pytest.mark.parametrize("features", [(5, 10, 16), (4, 10), (4, 5, 16)])
def test_sizes_that_cannot_hold_the_small_network_are_refused(features: tuple[int, ...]) -> None:
    config = replace(SMALL, features=features, strides=(1, 2, 2)[: len(features)])
    with pytest.raises(InputError, match="features"):
        grown(shuffled(2), config)
