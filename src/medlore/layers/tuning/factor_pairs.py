"""Relatives of LoRA whose update is a plain factor pair in the end: MELoRA, MoSLoRA, CapaBoost. They are saved as LoRA."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError, TargetError
from medlore.layers.adapter_folder import Factors
from medlore.layers.tuning.attach import Foldable, add_to_linear, attach, attached
from medlore.layers.tuning.options import MaskedPairOptions, MiniPairOptions, NoOptions

if TYPE_CHECKING:
    from medlore.ranks.plan import RankPlan

PairKind = Literal["melora", "moslora", "capaboost"]


class FactorPair(Foldable):
    """y + scaling · B A x beside a linear layer; forward, folding and saving go through the same pair."""

    def __init__(self, scaling: float, dropout: float) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout

    @abstractmethod
    def pair(self) -> Factors:
        """The ordinary LoRA pair with the same product."""

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(..., in) and (..., out) -> (..., out)."""
        pair = self.pair()
        x = F.dropout(inputs[0], self.dropout, self.training)
        changed: Tensor = output + pair.scaling * F.linear(F.linear(x, pair.A), pair.B)
        return changed

    def fold(self, base: nn.Module) -> None:
        """Add the product to the weight."""
        with torch.no_grad():
            pair = self.pair()
            add_to_linear(base, pair.scaling * pair.B @ pair.A, None)


class MiniPairs(FactorPair):
    """`count` small pairs along the diagonal, each from its own share of the inputs to its own share of the outputs.

    Of rank `rank` together, with the parameters of rank / count.

    Source: Ren et al., "MELoRA: Mini-Ensemble Low-Rank Adapters", ACL 2024, equations 2 and 3. On a fused qkv matrix the shares
    would cross q, k and v, so only separate projections are taken.
    """

    def __init__(self, layer: nn.Linear, rank: int, scaling: float, dropout: float, options: MiniPairOptions) -> None:
        super().__init__(scaling, dropout)
        count, rows, columns = options.mini_loras, layer.out_features, layer.in_features
        if count < 1 or rank % count or rows % count or columns % count:
            raise InputError(
                "mini_loras",
                f"{count} for rank {rank} on a matrix of {rows} x {columns}",
                "a number that divides rank, rows and columns",
                "choose another number or --rank",
            )
        self.lora_A = nn.Parameter(torch.empty(count, rank // count, columns // count))
        self.lora_B = nn.Parameter(torch.zeros(count, rows // count, rank // count))
        for A in self.lora_A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def pair(self) -> Factors:
        """Block-diagonal factors of full size."""
        return Factors(torch.block_diag(*self.lora_A), torch.block_diag(*self.lora_B), self.scaling)


class MixedPair(FactorPair):
    """B M A with a trained r x r mixer, which starts orthogonal.

    Source: Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation", EMNLP 2024, equation 7; the start is one of the two that
    the paper finds to work (orthogonal, Kaiming).
    """

    def __init__(self, layer: nn.Linear, rank: int, scaling: float, dropout: float, options: NoOptions) -> None:
        super().__init__(scaling, dropout)
        self.lora_A, self.lora_B = _plain_factors(layer, rank)
        self.mixer = nn.Parameter(torch.empty(rank, rank))
        nn.init.orthogonal_(self.mixer)

    def pair(self) -> Factors:
        """The mixer goes into A."""
        return Factors(self.mixer @ self.lora_A, self.lora_B, self.scaling)


class MaskedPair(FactorPair):
    """Σ (B ⊙ N_i)(A ⊙ M_i) over fixed random masks: the parameters of one pair, the rank of several.

    The masks depend on the seed alone and are not stored; a saved adapter holds the masked factors.

    Source: Song et al., "Increasing Model Capacity for Free" (CapaBoost), ICLR 2024, equation 4; two tied layers of density
    0.5.
    """

    masks_in: Tensor
    masks_out: Tensor

    def __init__(self, layer: nn.Linear, rank: int, scaling: float, dropout: float, options: MaskedPairOptions) -> None:
        super().__init__(scaling, dropout)
        count, density = options.tied_layers, options.mask_density
        if count < 1 or not 0 < density <= 1:
            raise InputError(
                "tied_layers and mask_density",
                f"{count} and {density}",
                "a number from 1 and a share above 0, at most 1",
                "use 2 and 0.5",
            )
        self.lora_A, self.lora_B = _plain_factors(layer, rank)
        self.register_buffer("masks_in", torch.rand(count, *self.lora_A.shape) < density, persistent=False)
        self.register_buffer("masks_out", torch.rand(count, *self.lora_B.shape) < density, persistent=False)

    def pair(self) -> Factors:
        """All masked pairs stacked to one of `count` times the rank."""
        A = (self.masks_in * self.lora_A).flatten(0, 1)  # i r in -> (i r) in
        B = (self.masks_out * self.lora_B).permute(1, 0, 2).flatten(1)  # i out r -> out (i r)
        return Factors(A, B, self.scaling)


_KINDS: dict[PairKind, Callable[[nn.Linear, int, float, float, Any], FactorPair]] = {
    "melora": MiniPairs,
    "moslora": MixedPair,
    "capaboost": MaskedPair,
}


def install_pairs(model: nn.Module, kind: PairKind, plan: RankPlan, *, dropout: float, options: Any) -> None:
    """One pair of this kind on each layer of the plan, with its rank and scaling.

    Raises:
        TargetError: a layer that is not linear, or rows of a fused matrix.
    """
    modules = dict(model.named_modules())
    faults = [
        f"{layer.label}: {type(modules.get(layer.name)).__name__}"
        for layer in plan.layers
        if layer.rows is not None or layer.tensor != "weight" or not isinstance(modules.get(layer.name), nn.Linear)
    ]
    if faults:
        raise TargetError(
            f"--method {kind}",
            f"{len(faults)} targets",
            "linear layers, q, k and v apart",
            "choose other --targets, or --method lora",
            faults=faults,
        )
    for layer in plan.layers:
        module: Any = modules[layer.name]
        attach(module, _KINDS[kind](module, layer.rank, plan.scaling(layer), dropout, options), name=layer.name)


def pairs_of(model: nn.Module) -> dict[str, Factors]:
    """Module name -> its pair, for an ordinary LoRA folder."""
    return {name: extra.pair() for name, _, extra in attached(model) if isinstance(extra, FactorPair)}


def _plain_factors(layer: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A as in LoRA (Kaiming), B zero."""
    A = torch.empty(rank, layer.in_features)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return nn.Parameter(A), nn.Parameter(torch.zeros(layer.out_features, rank))
