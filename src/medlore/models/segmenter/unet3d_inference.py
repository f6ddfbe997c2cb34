"""The 3D U-Net made ready for a processor: the same weights and results, in the layout and precision in which it runs fastest.

Channels come last in memory, every convolution goes to oneDNN (PyTorch takes a slower one for small windows), instance
normalisation is group normalisation with one channel a group, and the transposed convolution, whose kernel is its stride, is
one matrix product that writes straight into the map that it is joined with. Nothing here can be trained.

Source: ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.unet3d import NEGATIVE_SLOPE, ConvBlock, ConvStack, UNet3d

_LAYOUT = torch.channels_last_3d


def ready_for_cpu(network: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """A copy for inference on this processor; where it has no oneDNN, the network itself.

    Everything but the U-Net is shared with `network`, which is left as it is.

    Args:
        network: on the CPU.
        dtype: of the U-Net: float32, or bfloat16 on a processor that multiplies it.
    """
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return network
    ready = copy.copy(network)
    ready._modules = {**network._modules, "backbone": InferenceUNet3d(network.backbone, dtype)}
    return ready


class InferenceUNet3d(nn.Module):
    """A copy of a U-Net's weights, laid out for inference; results are those of the U-Net up to rounding.

    Args:
        unet: is not changed.
        dtype: in which it computes; windows are converted.
    """

    def __init__(self, unet: UNet3d, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = _Encoder(unet, dtype)
        self.decoder = _Decoder(unet, dtype)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(b, inputs, h, w, d) -> (encoder maps, decoder maps), both highest resolution first."""
        encoded = self.encoder(x)
        return encoded, self.decoder(list(encoded))


class _Block(nn.Module):
    """Convolution, instance normalisation, leaky ReLU."""

    def __init__(self, block: ConvBlock, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm = block.conv, block.norm
        self._stride = tuple(int(s) for s in conv.stride)
        self._eps = norm.eps
        self._weight = conv.weight.detach().to(dtype).contiguous(memory_format=_LAYOUT)
        self._bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self._scale, self._shift = norm.weight.detach().float(), norm.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.mkldnn_convolution(x, self._weight, self._bias, (1, 1, 1), self._stride, (1, 1, 1), 1)
        return F.leaky_relu_(F.group_norm(y, y.shape[1], self._scale, self._shift, self._eps), NEGATIVE_SLOPE)


def _blocks(stacks: Iterable[ConvStack], dtype: torch.dtype) -> list[list[_Block]]:
    return [[_Block(cast("ConvBlock", block), dtype) for block in stack.convs] for stack in stacks]


class _Encoder(nn.Module):
    def __init__(self, unet: UNet3d, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        stacks = [cast("ConvStack", stage[0]) for stage in cast("Iterable[nn.Sequential]", unet.encoder.stages)]
        self._stages = _blocks(stacks, dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        with torch.autocast("cpu", enabled=False):
            x = x.to(self._dtype).contiguous(memory_format=_LAYOUT)
            for stage in self._stages:
                for block in stage:
                    x = block(x)
                maps.append(x)
        return maps


class _Decoder(nn.Module):
    def __init__(self, unet: UNet3d, dtype: torch.dtype) -> None:
        super().__init__()
        self._ups = [_Up(cast("nn.ConvTranspose3d", up), dtype) for up in unet.decoder.transpconvs]
        self._stages = _blocks(cast("Iterable[ConvStack]", unet.decoder.stages), dtype)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The encoder's maps, of which the list is emptied, -> the decoder's maps."""
        x = maps.pop()
        decoded = []
        with torch.autocast("cpu", enabled=False):
            for up, stage in zip(self._ups, self._stages, strict=True):
                x = up(x, maps.pop())
                for block in stage:
                    x = block(x)
                decoded.append(x)
        return decoded[::-1]


class _Up(nn.Module):
    """Transposed convolution and concatenation with the encoder's map: (b i h w d), (b s 2h 2w 2d) -> (b o+s 2h 2w 2d)."""

    def __init__(self, up: nn.ConvTranspose3d, dtype: torch.dtype) -> None:
        super().__init__()
        weight = up.weight.detach()  # i o kh kw kd; the kernel is the stride, so windows of the output do not overlap
        self._kernel = tuple(weight.shape[2:])
        self._outputs = weight.shape[1]
        self._weight = weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1).to(dtype).contiguous()
        bias = weight.new_zeros(self._outputs) if up.bias is None else up.bias.detach()
        self._bias = bias.to(dtype).repeat(self._weight.shape[1] // self._outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        b, i, h, w, d = x.shape
        kh, kw, kd = self._kernel
        joined = torch.empty_like(skip[:, :1].expand(-1, self._outputs + skip.shape[1], -1, -1, -1), memory_format=_LAYOUT)
        last = joined.permute(0, 2, 3, 4, 1)  # b h w d c, contiguous
        last[..., self._outputs :] = skip.permute(0, 2, 3, 4, 1)
        parts = last.view(b, h, kh, w, kw, d, kd, -1)[..., : self._outputs].permute(0, 1, 3, 5, 2, 4, 6, 7)
        for index in range(b):  # one row of x at a time, so that the product never exists whole
            rows = x[index].permute(1, 2, 3, 0).reshape(h, -1, i)
            for row in range(h):
                parts[index, row] = torch.addmm(self._bias, rows[row], self._weight).view(w, d, kh, kw, kd, self._outputs)
        return joined
