"""LoRA and its kin, held by PEFT: each function puts one of them into a network by the plan of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from medlore.files import atomic_folder
from medlore.layers.adapter_folder import Factors, write_lora_folder
from medlore.layers.lora.step import quicken
from medlore.layers.tuning.explained_variance import start_from_variance
from medlore.layers.tuning.interface import Request, Tuning, plan_of


def lora(model: nn.Module, request: Request) -> Tuning:
    """Plain LoRA with the ranks and alphas of the plan."""
    return _peft_tuning(_with_factors(model, request), request)


def dylora(model: nn.Module, request: Request) -> Tuning:
    """LoRA that is trained at every smaller rank too: each step works with the first b components, scaled by alpha / b.

    Source: Valipour et al., "DyLoRA", EACL 2023, algorithm 1; all b components train (`nested`), or with the option `single`
    component b alone (there: frozen).
    """
    return lora(model, request if request.partial_update != "off" else replace(request, partial_update="nested"))


def dora(model: nn.Module, request: Request) -> Tuning:
    """LoRA on directions, magnitudes trained apart."""
    return _peft_tuning(_with_factors(model, request, use_dora=True), request)


def eva(model: nn.Module, request: Request) -> Tuning:
    """Directions of largest variance of each layer's input, from one pass over a few batches; ranks are shared out anew.

    The total of the ranks stays. Unlike PEFT's own search, it sees each batch once and always ends (`explained_variance`).

    Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024.
    """
    from peft import EvaConfig

    tuned = _with_factors(model, request, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    start_from_variance(tuned, request.batches(), most=2.0)
    config = tuned.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None  # loading the folder must not ask for data again
    return _peft_tuning(tuned, request)


def pissa(model: nn.Module, request: Request) -> Tuning:
    """Factors start as the leading singular directions, which leave the base; saved as plain LoRA on the untouched base.

    Source: Meng et al., "PiSSA", NeurIPS 2024.
    """
    tuned = _with_factors(model, request, init_lora_weights="pissa")
    start = {name: (a.clone(), b.clone()) for name, (a, b, _) in _factors_of(tuned).items()}

    def difference() -> dict[str, Factors]:
        return {
            name: Factors(torch.cat([a, start[name][0]]), torch.cat([b, -start[name][1]], dim=1), scaling)
            for name, (a, b, scaling) in _factors_of(tuned).items()
        }

    return _peft_tuning(tuned, request, plain=difference)


def adalora(model: nn.Module, request: Request) -> Tuning:
    """Starts at 1.5 times the ranks' mean and prunes singular values to it; saved as plain LoRA of the ranks that are left.

    Source: Zhang et al., "AdaLoRA", ICLR 2023; the schedule follows `request.steps`.
    """
    import peft

    plan = plan_of(request)
    target = max(1, round(plan.uniform_rank))
    config = peft.AdaLoraConfig(
        target_r=target,
        init_r=max(target + 1, round(1.5 * target)),
        tinit=request.steps // 10,
        tfinal=max(1, request.steps // 4),
        deltaT=max(1, request.steps // 100),
        total_step=max(request.steps, 3),
        lora_alpha=max(1, round(plan.layers[0].alpha)),
        lora_dropout=request.dropout,
        target_modules=[layer.name for layer in plan.layers],
        modules_to_save=[request.head],
    )
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "ranknum" in name:  # a constant of the scaling, which PEFT leaves trainable
            parameter.requires_grad_(False)
    allocator = tuned.base_model.rankallocator
    kept = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def state() -> dict[str, Any]:
        # lora_E of pruned directions is zero in the trained tensors; the averages and the pattern decide what comes next
        pattern = tuned.peft_config["default"].rank_pattern  # None before the first pruning
        return {name: dict(getattr(allocator, name)) for name in kept} | {"rank_pattern": dict(pattern or {})}

    def restore(saved: dict[str, Any]) -> None:
        for name in kept:
            setattr(allocator, name, saved[name])
        tuned.peft_config["default"].rank_pattern = saved["rank_pattern"] or None

    def plain() -> dict[str, Factors]:
        found = {}
        for name, module in _adapted(tuned):
            a, e, b = (getattr(module, f"lora_{part}")["default"].detach() for part in "AEB")
            left = e.flatten() != 0
            scaling = module.scaling["default"] / (float(module.ranknum["default"]) + 1e-5)
            if left.any():
                found[name] = Factors((a * e)[left], b[:, left], scaling)
        return found

    tuning = _peft_tuning(tuned, request, plain=plain)
    tuning.state, tuning.restore = state, restore
    tuning.after_backward = tuned.base_model.update_and_allocate
    tuning.penalty = lambda: config.orth_reg_weight * orthogonality(tuned)
    return tuning


def orthogonality(model: nn.Module) -> Tensor:
    """Mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all factors of AdaLoRA.

    PEFT adds it to the loss only where the network computes the loss itself, which ours does not.

    Source: Zhang et al., "AdaLoRA", ICLR 2023, equation 4 (there squared; PEFT's form is taken, for comparable numbers).
    """
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=square.device, dtype=square.dtype)))
    return torch.stack(terms).mean()


def _with_factors(model: nn.Module, request: Request, **options: Any) -> Any:
    import peft

    plan = plan_of(request)
    config = plan.to_lora_config(model=model, check=False, modules_to_save=[request.head], lora_dropout=request.dropout, **options)
    return peft.get_peft_model(model, config)


def _peft_tuning(tuned: Any, request: Request, *, plain: Callable[[], dict[str, Factors]] | None = None) -> Tuning:
    """The tuning of a PEFT model; `plain` gives the factors of an ordinary LoRA where PEFT's own folder would not do."""

    def save(folder: Path) -> None:
        if plain is not None:
            head = tuned.base_model.model.get_submodule(request.head).modules_to_save["default"]
            write_lora_folder(folder, plain(), head={request.head: head}, base=_base_name(tuned))
            return
        tuned.peft_config["default"].base_model_name_or_path = _base_name(tuned)
        with atomic_folder(folder) as temporary:
            tuned.save_pretrained(str(temporary), save_embedding_layers=False)

    def merged() -> nn.Module:
        quick.restore()
        return cast("nn.Module", tuned.merge_and_unload())

    quick = quicken(tuned, logits_only=request.component_masks == "off")  # the masks read every token
    tuning = Tuning(model=tuned, form="adapter", save=save, merged=merged)
    if request.partial_update != "off":
        from medlore.layers.lora.partial_update import install_partial_update

        handle = install_partial_update(tuned, mode=request.partial_update, seed=request.seed)
        tuning.before_step, tuning.state, tuning.restore = handle.draw, handle.state_dict, handle.load_state_dict
    if request.component_masks == "shapley":
        from medlore.layers.tuning.component_masks import install_component_masks

        masks = install_component_masks(tuned, steps=request.steps, seed=request.seed)
        tuning.before_step, tuning.after_backward = masks.draw, masks.observe
        tuning.state, tuning.restore = masks.state_dict, masks.load_state_dict
    return tuning


def _base_name(tuned: Any) -> str:
    return str(getattr(tuned.base_model.model.config, "name_or_path", ""))


def _adapted(tuned: Any) -> Iterable[tuple[str, Any]]:
    """Adapted layers with their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in tuned.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _factors_of(tuned: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, in), B (out, r) and scaling of every adapted layer."""
    return {
        name: (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach(), float(m.scaling["default"]))
        for name, m in _adapted(tuned)
    }
