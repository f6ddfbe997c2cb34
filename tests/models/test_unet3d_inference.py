"""The U-Net made ready for a processor gives what the U-Net gives."""

from __future__ import annotations

import pytest
import torch

from medlore.models.segmenter.network import Segmenter, SegmenterConfig, _pooled
from medlore.models.segmenter.unet3d import UNet3d
from medlore.models.segmenter.unet3d_inference import InferenceUNet3d, ready_for_cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this processor has no oneDNN")

SIZES = SegmenterConfig(
    (6, 8, 12), strides=(1, 2, 2), patch=8, query_width=24, heads=4, projection_width=16, mask_width=16, feedforward=32, decoder_layers=2
)


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Biases, scales and shifts that are not 0 and 1."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("strides", [(1, 2, 2), (1, 2, 4), (1, 3, 1)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_all_maps_are_those_of_the_unet(strides: tuple[int, ...], blocks: int) -> None:
    torch.manual_seed(0)
    unet = lively(UNet3d(3, (5, 8, 16), blocks=blocks, strides=strides))
    assert isinstance(unet, UNet3d)
    x = torch.randn(2, 1, 24, 24, 48).expand(-1, 3, -1, -1, -1)
    for ours, theirs in zip(InferenceUNet3d(unet, torch.float32)(x), unet(x), strict=True):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_segmenter_gives_the_same_logits_and_is_left_alone() -> None:
    torch.manual_seed(0)
    network = lively(Segmenter(SIZES))
    assert isinstance(network, Segmenter)
    x, queries = torch.randn(1, 3, 32, 16, 24), torch.randn(4, 24)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ready = ready_for_cpu(network)
    torch.testing.assert_close(ready(x, queries), network(x, queries), rtol=1e-4, atol=1e-4)
    assert isinstance(network.backbone, UNet3d)
    assert isinstance(ready.backbone, InferenceUNet3d)
    assert ready.transformer_decoder is network.transformer_decoder
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_over_blocks_do_not_depend_on_the_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, 8, 24).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    wanted = torch.nn.functional.adaptive_avg_pool3d(x.float(), (3, 4, 2))
    for layout in (x, last):
        torch.testing.assert_close(
            _pooled(layout, (3, 4, 2)).float(),
            wanted,
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
        )


def test_bfloat16_is_near() -> None:
    torch.manual_seed(0)
    unet = lively(UNet3d(3, (8, 16), blocks=2, strides=(1, 2)))
    assert isinstance(unet, UNet3d)
    x = torch.randn(1, 3, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as it is called; the U-Net must not be cast a second time
        ours = InferenceUNet3d(unet, torch.bfloat16)(x)[1][0]
    theirs = unet(x)[1][0]
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - theirs).abs().mean()) < 0.02
    assert float((ours.float() - theirs).abs().mean()) < 0.05 * float(theirs.abs().mean())


def test_other_types_run_in_the_network_itself() -> None:
    network = Segmenter(SIZES)
    assert ready_for_cpu(network, torch.float16) is network
