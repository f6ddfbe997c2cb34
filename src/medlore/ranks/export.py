"""A RankPlan as PEFT writes it: one module, one rank, one alpha."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medlore.errors import InputError, TargetError
from medlore.files import atomic_folder
from medlore.ranks.planned import PlannedLayer
from medlore.ranks.rules import AlphaRule

if TYPE_CHECKING:
    from peft import LoraConfig

_WIDE = ("fused", "attention")  # kinds that hold several factor pairs
_DECIDED_BY_PLAN = ("r", "lora_alpha", "target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class PeftModule:
    """One module as PEFT sees it.

    Args:
        name: path of the module that PEFT wraps.
        kind: `single` has one factor pair of our own; `fused` holds several parts in the rows of one matrix; `attention` is an
            `nn.MultiheadAttention`, whose input and output projections PEFT adapts at one common rank; `parameter` is no module but
            the stacked weights of experts.
        parts: its planned factor pairs.
        rank: rank that PEFT gives the module, wide enough for all parts side by side.
    """

    name: str
    kind: Literal["single", "fused", "attention", "parameter"]
    parts: tuple[PlannedLayer, ...]
    rank: int


def peft_modules(layers: Sequence[PlannedLayer]) -> list[PeftModule]:
    """The modules of a plan in its order."""
    attentions = {layer.name for layer in layers if layer.tensor == "in_proj_weight"}
    by_module: dict[str, list[PlannedLayer]] = {}
    for layer in layers:
        owner = layer.name.removesuffix(".out_proj")
        by_module.setdefault(owner if owner in attentions else layer.name, []).append(layer)
    return [_module_of(name, tuple(parts), is_attention=name in attentions) for name, parts in by_module.items()]


def lora_config(
    layers: Sequence[PlannedLayer], rule: AlphaRule, *, source: str, is_jax: bool, folded: bool, options: Mapping[str, Any]
) -> LoraConfig:
    """The PEFT configuration of a plan.

    Args:
        layers: the plan's layers, with the names of the model.
        rule: the plan's rule for alphas.
        source: how messages call the plan.
        is_jax: whether the names are those of a JAX file.
        folded: scalings live inside the factors of fused modules: their alpha is their rank, and rsLoRA is spelled out in alphas.
        options: further fields of `LoraConfig`.

    Raises:
        InputError: an option that the plan decides.
        TargetError: the plan carries names of a JAX file, which no module has.
    """
    from peft import LoraConfig

    taken = sorted(set(options) & set(_DECIDED_BY_PLAN))
    if taken:
        raise InputError("LoRA options", ", ".join(taken), "options that the plan does not decide", "change the plan instead")
    if is_jax:
        raise TargetError(
            source,
            "it has the names of a JAX file",
            "names of modules",
            "pass the model: plan.to_lora_config(model=model)",
        )
    modules = peft_modules(layers)
    parameters = [m.name for m in modules if m.kind == "parameter"]
    if parameters and options.get("lora_dropout"):
        came = f"{options['lora_dropout']} beside experts whose weights are stacked in one parameter ({parameters[0]})"
        raise InputError("lora_dropout", came, "0: PEFT has no dropout there", "leave it out, or plan --targets attention")
    if not folded and any(m.kind in _WIDE for m in modules):
        warnings.warn(
            "PEFT trains one factor pair over q, k and v of a fused matrix; medlore.get_peft_model(model, plan) trains q and v apart",
            stacklevel=4,
        )
    ranks = {_anchored(m.name): m.rank for m in modules}
    alphas = {_anchored(m.name): _alpha(rule, m, folded=folded) for m in modules}
    return LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(alphas.values())),
        target_modules="|".join(re.escape(m.name) for m in modules if m.kind != "parameter") or [],
        target_parameters=parameters or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=rule.kind == "rslora" and not folded,
        **options,
    )


def write_peft_config(config: LoraConfig, folder: str | Path) -> Path:
    """Write `adapter_config.json` into a new folder, for `peft.PeftConfig.from_pretrained`.

    Raises:
        InputError: the folder holds a trained adapter, whose weights the new configuration would not fit.
    """
    refuse_a_trained_adapter(folder)
    with atomic_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
    return Path(folder) / "adapter_config.json"


def refuse_a_trained_adapter(folder: str | Path) -> None:
    """A folder with trained factors is not for a bare configuration; asked before anything is written."""
    if trained := sorted(Path(folder).glob("adapter_model.*")):
        raise InputError(str(folder), f"holds a trained adapter ({trained[0].name})", "a new folder", "name another folder")


def _module_of(name: str, parts: tuple[PlannedLayer, ...], *, is_attention: bool) -> PeftModule:
    inside = [p for p in parts if p.rows is not None]
    rank = sum(p.rank for p in inside) if inside else parts[0].rank
    if is_attention:
        return PeftModule(name, "attention", parts, max([rank, *(p.rank for p in parts if p.rows is None)]))
    if not parts[0].tensor:
        return PeftModule(name, "parameter", parts, rank)
    return PeftModule(name, "fused" if inside else "single", parts, rank)


def _alpha(rule: AlphaRule, module: PeftModule, *, folded: bool) -> float:
    if module.kind in _WIDE:
        return _tidy(float(module.rank) if folded else rule.alpha(module.rank))
    layer = module.parts[0]
    return _tidy(rule.scaling(layer.alpha, layer.rank) * layer.rank if folded else layer.alpha)


def _tidy(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _anchored(name: str) -> str:
    """A PEFT pattern that matches this one module: PEFT lets any prefix stand before a pattern, `^` forbids it."""
    return "^" + re.escape(name)
