"""A segmenter made ready for inference on this processor."""

from __future__ import annotations

import copy

import torch

from medlore.models.segmenter.encoders import ENCODERS
from medlore.models.segmenter.network import Segmenter


def ready_for_cpu(network: Segmenter, dtype: torch.dtype = torch.float32) -> Segmenter:
    """A copy for inference on this processor; where it has no oneDNN or the encoder no such form, the network itself.

    Everything but the encoder is shared with `network`, which is left as it is.

    Args:
        network: on the CPU.
        dtype: of the encoder: float32, or bfloat16 on a processor that multiplies it.
    """
    make_ready = ENCODERS[network.config.encoder].ready
    if make_ready is None or not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return network
    ready = copy.copy(network)
    ready._modules = {**network._modules, "backbone": make_ready(network.backbone, dtype)}
    return ready
