"""How a student begins: from its teacher's own weights, thinned out to the student's widths."""

from __future__ import annotations

import torch
from torch import Tensor

from medlore.models.segmenter.network import Segmenter

_JOINED = "projection_layer.0.weight"  # its input is the maps of all stages, one after another


@torch.no_grad()
def start_from_teacher(student: Segmenter, teacher: Segmenter) -> list[str]:
    """Fill a student with evenly spaced entries of the teacher's tensors of the same name; the rest keeps its random draw.

    A channel of the student is then the same channel of the teacher in every layer, because all tensors are thinned by the
    same rule; joined inputs (skip connections, pooled maps) are thinned part by part. A tensor that is larger than the
    teacher's along any axis is left alone.

    Args:
        student: a plain network, changed in place.
        teacher: of any sizes; experts that it has are not read.

    Returns:
        Names of the tensors that were filled.

    Source:
        Xu et al., "Initializing Models with Larger Ones", ICLR 2024 (uniform selection); the parts of joined inputs are ours.
    """
    there = {name.replace(".base_layer.", "."): tensor for name, tensor in teacher.state_dict().items() if ".lora_" not in name}
    parts = [list(model.config.features) for model in (teacher, student)]
    filled = []
    for name, own in student.state_dict().items():
        found = there.get(name)
        if found is None or found.dim() != own.dim() or any(a < b for a, b in zip(found.shape, own.shape, strict=True)):
            continue
        for axis, (many, few) in enumerate(zip(found.shape, own.shape, strict=True)):
            joined = name == _JOINED and axis == 1
            if joined and (len(parts[0]) != len(parts[1]) or any(a < b for a, b in zip(*parts, strict=True))):
                break
            found = found.index_select(axis, _of_parts(*parts) if joined else evenly_spaced(many, few))
        else:
            own.copy_(found)
            filled.append(name)
    return filled


def evenly_spaced(many: int, few: int) -> Tensor:
    """`few` of `many` places, in order.

    Example:
        >>> evenly_spaced(8, 4).tolist()
        [0, 2, 4, 6]
    """
    return torch.arange(few) * many // few


def _of_parts(many: list[int], few: list[int]) -> Tensor:
    starts = [sum(many[:i]) for i in range(len(many))]
    return torch.cat([start + evenly_spaced(a, b) for start, a, b in zip(starts, many, few, strict=True)])
