"""The door from a RankPlan to a PEFT model, right for fused qkv too: q and v get factor pairs of their own, k gets none.

PEFT would train one factor pair over the stacked q, k, v rows of a timm `qkv` or of the `in_proj_weight` of
`nn.MultiheadAttention`. Here `lora_A` and `lora_B` of such a layer hold one trained pair for each part, and show themselves
to PEFT, in merging and on disk, as the one ordinary pair that has the same product::

    lora_A = [A_q]      lora_B = [s_q·B_q    0   ]     rank r_q + r_v, alpha = rank, so PEFT's scaling is 1
             [A_v]               [   0       0   ]     (rows of k)
                                 [   0    s_v·B_v]

So a saved adapter loads in plain PEFT with the same output. Training it further in plain PEFT fills the zeros: q, k and v then
share components, and the adapter can no longer be loaded through this door.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from torch import nn

from medlore.errors import CheckpointError, InputError, TargetError
from medlore.files import atomic_folder, existing_file
from medlore.layers.lora.fused_attention import AttentionLora, forbid_fast_path, times_out_proj_is_added
from medlore.layers.lora.fused_factors import BlockFactor, StackedFactor
from medlore.ranks.export import PeftModule, peft_modules
from medlore.ranks.plan import RankPlan
from medlore.ranks.planned import PlannedLayer

if TYPE_CHECKING:
    from peft import PeftModel

PLAN_FILE = "rank_plan.json"
_LAST_TO_ADD_TWICE = Version("0.21.2")


def get_peft_model(
    model: nn.Module, plan: RankPlan, *, check: bool = True, adapter_name: str = "default", **lora_options: Any
) -> PeftModel:
    """A PEFT model with the ranks of a plan; `model` is changed in place, as PEFT does it.

    Args:
        model: the model that is to be tuned.
        plan: ranks and alphas; its names are matched to the model by structure where they differ.
        check: refuse a model whose planned weights are not those of the plan.
        adapter_name: PEFT's name of the adapter.
        lora_options: further fields of `peft.LoraConfig` (`lora_dropout`, `modules_to_save`, ...).

    Returns:
        A `peft.PeftModel`, with all that PEFT offers. On fused qkv matrices q and v are trained apart and k not at all.

    Raises:
        TargetError: the plan does not fit the model, or belongs to other weights.
        InputError: an option that the plan decides, or one that fused matrices do not allow.

    Examples:
        >>> import medlore, torch
        >>> block = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"qkv": torch.nn.Linear(8, 24), "proj": torch.nn.Linear(8, 8)})})
        >>> model = get_peft_model(block, medlore.plan_ranks(block, rule="uniform:2"))
        >>> sorted(name.split("lora_")[1] for name, p in model.named_parameters() if p.requires_grad and "qkv" in name)
        ['A.default.q', 'A.default.v', 'B.default.q', 'B.default.v']
    """
    import peft

    plan = plan.for_model(model, check=check)
    _refuse_lone_output(model, plan)
    wide = [m for m in peft_modules(plan.layers) if m.kind != "single"]
    if wide:
        _check_options(lora_options)
    config = plan.to_lora_config(folded=bool(wide), **lora_options)
    if any(m.kind == "attention" for m in wide):
        config._register_custom_module({nn.MultiheadAttention: AttentionLora})
    tuned = peft.get_peft_model(model, config, adapter_name=adapter_name)
    for module in wide:
        _split(tuned.base_model.model.get_submodule(module.name), module, plan, adapter_name)
        forbid_fast_path(tuned.base_model.model, module.name)
    return tuned


def save_adapter(model: PeftModel, plan: RankPlan, folder: str | Path) -> Path:
    """Write a PEFT adapter folder with its plan beside it (`rank_plan.json`), whole or not at all."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        plan.save(temporary / PLAN_FILE)
    return Path(folder)


def load_adapter(
    model: nn.Module, folder: str | Path, *, plan: RankPlan | None = None, check: bool = True, trainable: bool = False
) -> PeftModel:
    """Load a saved adapter through the door, so that q and v stay apart when training goes on.

    Args:
        model: the base model, without adapters.
        folder: a PEFT folder; `rank_plan.json` in it is used unless `plan` is given.
        plan: the plan that the adapter was made with.
        check: refuse a model whose planned weights are not those of the plan.
        trainable: whether the factors may be trained further.

    Raises:
        InputError: a file is missing.
        CheckpointError: the adapter was made for another plan or model, or was trained further in plain PEFT.
    """
    import peft

    folder = Path(folder)
    existing_file(folder / "adapter_config.json")
    plan = RankPlan.load(folder / PLAN_FILE) if plan is None else plan
    saved = peft.PeftConfig.from_pretrained(str(folder))
    kept = ("modules_to_save", "lora_dropout", "bias", "task_type", "use_dora")
    options = {name: getattr(saved, name) for name in kept if getattr(saved, name, None)}
    tuned = get_peft_model(model, plan, check=check, inference_mode=not trainable, **options)
    weights = peft.utils.load_peft_weights(str(folder), device="cpu")
    try:
        report = peft.set_peft_model_state_dict(tuned, weights)
    except RuntimeError as error:  # torch's load_state_dict gathers all misfits into one
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise _other_adapter(folder, f"{len(faults)} tensors do not fit", faults) from error
    absent = [k for k in report.missing_keys if "lora_" in k]
    if absent or report.unexpected_keys:
        faults = [f"missing: {k}" for k in absent] + [f"not expected: {k}" for k in report.unexpected_keys]
        raise _other_adapter(folder, f"{len(faults)} tensors do not fit", faults)
    _correct_out_proj(tuned, getattr(saved, "peft_version", None))
    return tuned


def _split(layer: Any, module: PeftModule, plan: RankPlan, adapter: str) -> None:
    """Replace PEFT's one factor pair by one pair for each part (and the pair of the output projection of an attention)."""
    inside = [p for p in module.parts if p.rows is not None]
    _replace_pair(layer, adapter, inside, plan, module.rank)
    if module.kind == "attention":
        outside = [p for p in module.parts if p.rows is None]
        _replace_pair(layer.get_base_layer().out_proj, adapter, outside, plan, module.rank, counted=times_out_proj_is_added())


def _correct_out_proj(model: nn.Module, written_by: str | None) -> None:
    """Files hold the output projection as the PEFT that wrote them counts it; see `times_out_proj_is_added`."""
    here = times_out_proj_is_added()
    old = written_by is None or Version(written_by) <= _LAST_TO_ADD_TWICE
    written = 2 if old else here
    if written == here:
        return
    for layer in [m for m in model.modules() if isinstance(m, AttentionLora)]:
        for factor in layer.get_base_layer().out_proj.lora_B.values():
            for parameter in factor.parameters():
                parameter.data.mul_(written / here)


def _replace_pair(layer: Any, adapter: str, parts: list[PlannedLayer], plan: RankPlan, rank: int, *, counted: int = 1) -> None:
    """One trained pair for each part; `counted` is how often PEFT adds the product to the base weight."""
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    trains = layer.lora_A[adapter].weight.requires_grad
    rows: dict[str, tuple[int, int]] = {p.part: p.rows or (0, B.shape[0]) for p in parts}
    scalings: dict[str, float] = {p.part: plan.scaling(p) / counted for p in parts}
    ends: dict[str, tuple[int, int]] = {}
    for p in parts:
        start = max((end for _, end in ends.values()), default=0)
        ends[p.part] = (start, start + p.rank)
    stacked = {name: A[a:b] for name, (a, b) in ends.items()}
    blocks = {name: B[slice(*rows[name]), a:b] / scalings[name] for name, (a, b) in ends.items()}
    layer.lora_A[adapter] = StackedFactor(stacked, in_features=A.shape[1], rank=rank, like=A)
    layer.lora_B[adapter] = BlockFactor(
        blocks, rows=rows, scalings=scalings, out_features=B.shape[0], rank=rank, like=B, use_rslora=plan.use_rslora
    )
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        factor.requires_grad_(trains)
        factor.train(layer.training)


def _refuse_lone_output(model: nn.Module, plan: RankPlan) -> None:
    """The output projection of `nn.MultiheadAttention` is read, never called: an adapter on it alone would do nothing."""
    owners = {layer.name for layer in plan.layers if layer.tensor == "in_proj_weight"}
    lone = [
        x.name
        for x in plan.layers
        if x.name.endswith("out_proj")
        and x.name.removesuffix(".out_proj") not in owners
        and isinstance(model.get_submodule(x.name.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if lone:
        raise TargetError(
            f"plan of {plan.source}",
            f"{len(lone)} output projections of nn.MultiheadAttention without their q, k, v",
            "targets that hold the attention module too",
            "let the targets match the attention module itself",
            faults=lone,
        )


def _check_options(options: Mapping[str, Any]) -> None:
    init = options.get("init_lora_weights", True)
    if not (isinstance(init, bool) or init == "gaussian"):
        raise InputError(
            "init_lora_weights", f"{init!r} on a fused qkv matrix", "True, False or 'gaussian'", "give it to a model with separate q, k, v"
        )
    if options.get("lora_bias"):
        raise InputError("lora_bias", "True on a fused qkv matrix", "False", "leave it out")


def _other_adapter(folder: Path, came: str, faults: list[str]) -> CheckpointError:
    return CheckpointError(
        str(folder), came, "an adapter that was made with this plan for this model", "load it with peft.PeftModel instead", faults=faults
    )
