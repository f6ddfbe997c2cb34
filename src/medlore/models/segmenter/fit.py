"""Whether weights fit a segmenter: names, shapes, factor pairs, finite numbers, sizes that they can have at all."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medlore.errors import CheckpointError
from medlore.linalg.factors import factor_shapes
from medlore.linalg.matricize import Layout
from medlore.models.segmenter.network import SegmenterConfig
from medlore.models.statefile import State

FACTOR = re.compile(r"^(?P<target>.+)\.lora_(?P<side>[AB])_list\.(?P<expert>\d+)$")


def misfits(weights: State, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or of the wrong shape: one line per weight."""
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in weights]
    unexpected = [f"unexpected: {name} {tuple(tensor.shape)}" for name, tensor in weights.items() if name not in expected]
    misshapen = [
        f"misshapen: {name} {tuple(tensor.shape)}, should be {expected[name]}"
        for name, tensor in weights.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    return [*missing, *unexpected, *misshapen]


def not_finite(weights: State) -> list[str]:
    """Weights with NaN or infinity in them: one line each."""
    return [f"not finite: {name}" for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]


def refuse_sizes(config: SegmenterConfig, weights: State, where: str) -> None:
    """Refuse sizes that weights cannot have, before anything of these sizes is made.

    Raises:
        CheckpointError: more layers than tensors, or widths beyond the number of values.
    """
    values = sum(tensor.numel() for tensor in weights.values())
    counts = {"convs_per_stage": config.convs_per_stage, "decoder_layers": config.decoder_layers, "features": len(config.features)}
    widths = [*config.features, config.query_width, config.projection_width, config.mask_width, *config.deep_widths, config.feedforward]
    faults = [f"{name}: {count} for {len(weights)} tensors" for name, count in counts.items() if count > len(weights)]
    faults += [f"a width of {width} for {values} values" for width in widths if width > values]
    if faults:
        raise CheckpointError(
            where, f"{len(faults)} sizes that the weights cannot have", "the sizes of these weights", "export the pack again", faults=faults
        )


def factor_faults(factors: State, weights: State) -> list[str]:
    """Factors without a partner, on no convolution, of the wrong shape, or of an expert that not every layer has."""
    table: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in factors.items():
        if part := FACTOR.fullmatch(name):
            table.setdefault((part["target"], int(part["expert"])), {})[part["side"]] = tensor
    targets, experts = sorted({t for t, _ in table}), range(1 + max((e for _, e in table), default=-1))
    faults = [f"missing: factors of expert {e} at {t}" for t in targets for e in experts if (t, e) not in table]
    for (target, expert), pair in table.items():
        place = f"expert {expert} at {target}"
        base = weights.get(f"{target}.weight")
        if base is None:
            faults.append(f"unexpected: factors of {place}, which is no weight")
        elif set(pair) != {"A", "B"}:
            faults.append(f"missing: lora_{'B' if 'A' in pair else 'A'} of {place}")
        else:
            faults.extend(_pair_faults(place, pair, tuple(base.shape)))
    return faults


def _pair_faults(place: str, pair: dict[str, Tensor], shape: tuple[int, ...], layout: Layout = "interleaved") -> list[str]:
    """Faults under the rank that either factor implies, whichever has fewer."""
    interleaved = layout == "interleaved"
    side = shape[2] if len(shape) > 2 and interleaved else 1
    axis = -1 if interleaved else 1  # of lora_B, that holds the rank
    ranks = (pair["A"].shape[0] if pair["A"].dim() else 0, pair["B"].shape[axis] if pair["B"].dim() > 1 else 0)
    reports = []
    for inner in ranks:
        wanted = dict(zip("AB", factor_shapes(shape, max(1, inner // side), layout), strict=True))
        reports.append(
            [
                f"misshapen: lora_{name} of {place} {tuple(factor.shape)}, should be {wanted[name]}"
                for name, factor in pair.items()
                if tuple(factor.shape) != wanted[name]
            ]
        )
    return min(reports, key=len)


def expert_faults(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scaling: Mapping[str, float], layout: Layout, base: Mapping[str, Tensor]
) -> list[str]:
    """What is wrong with an expert on this base: one line per convolution."""
    faults = []
    for target, (lora_A, lora_B) in pairs.items():
        weight = base.get(f"{target}.weight")
        if weight is None:
            faults.append(f"unexpected: factors of {target}, which is no weight")
        elif target not in scaling:
            faults.append(f"missing: the scaling of {target}")
        else:
            faults.extend(_pair_faults(target, {"A": lora_A, "B": lora_B}, tuple(weight.shape), layout))
    return [*faults, *(f"missing: factors of {target}" for target in scaling if target not in pairs)]
