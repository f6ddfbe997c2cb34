"""Bottleneck adapters: Houlsby's behind each branch, AdaptFormer's beside the MLP, RepAdapter's behind each norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError, StepError
from medlore.layers.tuning.anatomy import attends_in_windows, blocks_with_parts
from medlore.layers.tuning.attach import Extra, add_to_linear, attach, attached, detach
from medlore.layers.tuning.options import AdapterOptions, AdapterSizes

REP_GROUPS = 2
_LEAST_SHARE = 1e-4  # of the largest singular value of I + M; float32 keeps seven digits, three are left then


class SerialAdapter(Extra):
    """Behind a layer: y + s · up(GELU(down(y))). It answers y until `up`, which starts at zero, has moved.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1 and figure 2. The start is
    exactly the identity here (there: normal, 0.01), and the norms stay frozen, as vision studies have it (there they train).
    """

    def __init__(self, width: int, sizes: AdapterSizes) -> None:
        super().__init__()
        self.down, self.up = _near_identity(width, sizes.bottleneck)
        self.scale, self.dropout = sizes.scale, sizes.dropout

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        inner = F.dropout(F.gelu(self.down(output)), self.dropout, self.training)
        changed: Tensor = output + self.scale * self.up(inner)
        return changed


class ParallelAdapter(Extra):
    """Beside an MLP: MLP(x) + s · up(ReLU(down(x))), x being what the MLP reads.

    Source: Chen et al., "AdaptFormer", NeurIPS 2022, equations 2 and 3.
    """

    def __init__(self, width: int, sizes: AdapterSizes) -> None:
        super().__init__()
        self.down, self.up = _near_identity(width, sizes.bottleneck)
        self.scale, self.dropout = sizes.scale, sizes.dropout

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        inner = F.dropout(F.relu(self.down(inputs[0])), self.dropout, self.training)
        changed: Tensor = output + self.scale * self.up(inner)
        return changed


class RepAdapter(Extra):
    """Behind a norm: y + s · up(down(y)), linear, with `up` in two groups; the layers that read the norm can take it up.

    Source: Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization", 2023, equations 4 to 8.
    """

    def __init__(self, width: int, sizes: AdapterSizes) -> None:
        super().__init__()
        if width % REP_GROUPS or sizes.bottleneck % REP_GROUPS:
            raise InputError(
                "bottleneck",
                f"{sizes.bottleneck} at width {width}",
                f"multiples of {REP_GROUPS}, the groups of RepAdapter",
                "use 8",
            )
        self.down = nn.Linear(width, sizes.bottleneck)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.up = nn.Parameter(torch.zeros(REP_GROUPS, width // REP_GROUPS, sizes.bottleneck // REP_GROUPS))  # g d/g r/g
        self.up_bias = nn.Parameter(torch.zeros(width))
        self.scale, self.dropout = sizes.scale, sizes.dropout

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        inner = F.dropout(self.down(output), self.dropout, self.training)
        changed: Tensor = output + self.scale * F.linear(inner, self.dense_up(), self.up_bias)
        return changed

    def dense_up(self) -> Tensor:
        """The grouped matrix as one of shape (d, r)."""
        dense: Tensor = torch.block_diag(*self.up)
        return dense

    def fold_into(self, readers: Iterable[nn.Module], *, norm: nn.Module | None = None) -> None:
        """Let the linear layers that read the norm answer alone what they answer behind this adapter.

        With M = s U D and v = s (U d + u): W (y + M y + v) + b = (W + W M) y + (b + W v).

        Args:
            readers: these layers.
            norm: takes up v instead, as (I + M)⁻¹ v in its bias. Needed where zeros are put between norm and readers (the windows
                of Swin are filled up with them): they never met the adapter.

        Raises:
            StepError: a shift has to go into the norm, and I + M is nearly singular.
        """
        with torch.no_grad():
            up = self.dense_up()
            matrix = self.scale * up @ self.down.weight
            shift = self.scale * (up @ self.down.bias + self.up_bias)
            before = None if norm is None else _bias_before(matrix, shift)  # may refuse, and nothing is changed yet
            for reader in readers:
                weight: Any = reader.weight
                add_to_linear(reader, weight @ matrix, None if norm is not None else weight @ shift)
            if norm is not None:
                add_to_linear(norm, torch.zeros_like(shift), before)


def _bias_before(matrix: Tensor, shift: Tensor) -> Tensor:
    """(I + M)⁻¹ v in float64, if it keeps the digits that count: the error of a float32 weight grows with the condition of I + M.

    Raises:
        StepError: the adapter all but takes some direction away, and no bias before it can stand for its own.
    """
    whole = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device) + matrix.double()
    values = torch.linalg.svdvals(whole)
    if not bool(values[-1] > _LEAST_SHARE * values[0]):
        came = f"I + M has singular values from {float(values[-1]):.1e} to {float(values[0]):.1e}"
        accepted = f"a smallest one above {_LEAST_SHARE:.0e} of the largest, so that the bias can be moved in front of the adapter"
        raise StepError("merging a RepAdapter", came, accepted, "keep the adapter unmerged, or train it with a smaller learning rate")
    before: Tensor = torch.linalg.solve(whole, shift.double())
    return before


def install_adapters(model: nn.Module, options: AdapterOptions) -> None:
    """Two serial adapters a block: behind the attention's output projection and behind the MLP."""
    sizes = options.sizes()
    for block in blocks_with_parts(model, "--method adapter"):
        for place in (block.output, block.mlp):
            attach(model.get_submodule(place), SerialAdapter(block.width, sizes), name=place)


def install_adaptformer(model: nn.Module, options: AdapterOptions) -> None:
    """One parallel adapter beside each MLP."""
    sizes = options.sizes()
    for block in blocks_with_parts(model, "--method adaptformer"):
        attach(model.get_submodule(block.mlp), ParallelAdapter(block.width, sizes), name=block.mlp)


def install_repadapters(model: nn.Module, options: AdapterOptions) -> None:
    """Two linear adapters a block, behind its norms."""
    sizes = options.sizes()
    for block in blocks_with_parts(model, "--method repadapter"):
        for place in block.norms:
            attach(model.get_submodule(place), RepAdapter(block.width, sizes), name=place)


def fold_repadapters(model: nn.Module) -> nn.Module:
    """Take up every RepAdapter into the layers behind its norm; the network is plain afterwards."""
    blocks = blocks_with_parts(model, "--method repadapter")
    readers = {norm: names for block in blocks for norm, names in zip(block.norms, (block.projections, block.mlp_inputs), strict=True)}
    windowed = {block.norms[0] for block in blocks if attends_in_windows(model.get_submodule(block.attention))}
    for name, module, extra in attached(model):
        if isinstance(extra, RepAdapter):
            extra.fold_into((model.get_submodule(reader) for reader in readers[name]), norm=module if name in windowed else None)
            detach(module)
    return model


def _near_identity(width: int, bottleneck: int) -> tuple[nn.Linear, nn.Linear]:
    """Down (Kaiming) and up (zero)."""
    if bottleneck < 1:
        raise InputError("bottleneck", f"got {bottleneck}", "a whole number from 1", "use 64")
    down, up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return down, up
