"""The tuning methods: one table. A new method, with whatever options it has, is one new entry; nothing else must be changed for it.

A method receives a model, a `Request` and its own options, installs itself and returns a `Tuning`: the model to train, what to do
around a step, and how to write what was learnt. The training loop knows nothing else about it.

The table is read by the command line and by settings, so nothing heavy is imported before a method is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from medlore.errors import DataError, InputError, UnknownNameError
from medlore.layers.tuning.options import (
    AdapterOptions,
    AdaptFormerOptions,
    GeneralizedOptions,
    MaskedPairOptions,
    MiniPairOptions,
    NoOptions,
    PartialOptions,
    PromptOptions,
    RepAdapterOptions,
)

if TYPE_CHECKING:
    from torch import nn

    from medlore.layers.tuning.factor_pairs import PairKind
    from medlore.layers.tuning.installed import Add
    from medlore.layers.tuning.interface import Request, Tuning
    from medlore.layers.tuning.modules import AddedModules

Install = Callable[["nn.Module", "Request", Any], "Tuning"]


@dataclass(frozen=True)
class Method:
    """A way of tuning.

    Attributes:
        install: put it into a model: model, request, options.
        rule: of `ranks.rule_table.RULES`, how its ranks are chosen when the user says nothing; None for methods without factors.
        learning_rate: where it starts when the user says nothing.
        caption: one line for help texts and tables.
        options: dataclass of the options that it alone, or it with few others, has; their defaults are its own.
        add: of methods that add modules: put them into a network again, as `medlore.json` describes them.
        alpha: rule of its scaling when the user says nothing.
        scaled: whether alpha and dropout act on its factors.
        partial_update: whether its steps can be partial updates.
        component_masks: whether its components can be masked.
        augments: whether it looks at augmented images; otherwise features are computed once.
        pairs: how many pairs share the rank of one.
    """

    install: Install
    rule: str | None
    learning_rate: float
    caption: str
    options: type[Any] = NoOptions
    add: Add | None = None
    alpha: str = "rank"
    scaled: bool = True
    partial_update: bool = False
    component_masks: bool = False
    augments: bool = True
    pairs: Callable[[Any], int] = lambda _options: 1

    def chosen(self, values: Mapping[str, Any]) -> Any:
        """Its options: of these values those that are its own and are not None; its defaults for the rest.

        Raises:
            pydantic.ValidationError: a value outside its limits.
        """
        import pydantic

        own = {f.name: values[f.name] for f in dataclasses.fields(self.options) if values.get(f.name) is not None}
        return pydantic.TypeAdapter(self.options).validate_python(own)


def install_method(name: str, model: nn.Module, request: Request) -> Tuning:
    """Install the method `name` in `model`.

    Raises:
        UnknownNameError: no such method.
        InputError: a partial update for a method without plain LoRA factors.
    """
    import torch

    from medlore.layers.adapter_folder import quiet_peft

    if name not in METHODS:
        raise UnknownNameError("--method", name, METHODS)
    method = METHODS[name]
    if request.partial_update != "off" and not method.partial_update:
        came = f"{request.partial_update!r} with --method {name}"
        raise InputError("--partial-update", came, named(lambda m: m.partial_update), "leave --partial-update off")
    if request.component_masks != "off" and (not method.component_masks or request.partial_update != "off"):
        came = f"{request.component_masks!r} with --method {name} and --partial-update {request.partial_update}"
        accepted = f"{named(lambda m: m.component_masks)} without a partial update"
        raise InputError("--component-masks", came, accepted, "leave --component-masks off")
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(request.seed)
        return method.install(model, request, method.chosen(request.options))


def add_modules(model: nn.Module, added: AddedModules, head: str) -> None:
    """Add what `added` describes; every new parameter trains.

    Args:
        model: a backbone without additions.
        added: what is added.
        head: module name of its head, to which nothing is added.

    Raises:
        DataError: a description that is none.
        TargetError: the network is not built as the method needs it.
        InputError: sizes that do not fit it.
    """
    import pydantic

    method = METHODS.get(added.kind)
    # earlier versions wrote the options of all methods
    known = {field.name for each in METHODS.values() for field in dataclasses.fields(each.options)}
    strange = sorted(set(added.options) - known)
    if method is None or method.add is None:
        raise DataError("modules.kind", repr(added.kind), named(lambda m: m.add is not None), "tune again with this version")
    if strange:
        raise DataError("modules.options", ", ".join(strange), f"options of {added.kind}", "tune again with this version")
    try:
        options = method.chosen(added.options)
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise DataError("modules.options", f"{len(faults)} faults", f"options of {added.kind}", "tune again", faults=faults) from error
    method.add(model, options, added.ranks, head)


def named(fits: Callable[[Method], bool]) -> str:
    """The methods that fit, as a list in a sentence.

    Example:
        >>> named(lambda method: method.partial_update)
        'sr-lora, lora, rslora or dylora'
    """
    *first, last = (name for name, method in METHODS.items() if fits(method))
    return f"{', '.join(first)} or {last}" if first else last


# ---- LoRA and its kin, through PEFT --------------------------------------------------------------------------------------


def _lora(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import lora

    return lora(model, request)


def _dylora(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import dylora

    return dylora(model, request)


def _dora(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import dora

    return dora(model, request)


def _eva(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import eva

    return eva(model, request)


def _pissa(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import pissa

    return pissa(model, request)


def _adalora(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.low_rank import adalora

    return adalora(model, request)


def _pairs(kind: PairKind, model: nn.Module, request: Request, options: Any) -> Tuning:
    from medlore.layers.tuning.installed import tune_pairs

    return tune_pairs(kind, model, request, options)


# ---- Methods that add modules --------------------------------------------------------------------------------------------


def of_modules(kind: str, add: Add, caption: str, **facts: Any) -> Method:
    """A method that adds modules to a frozen network and trains them and the head.

    Args:
        kind: its name.
        add: puts its modules into a network.
        caption: one line.
        facts: what else `Method` says.
    """

    def install(model: nn.Module, request: Request, options: Any) -> Tuning:
        from medlore.layers.tuning.installed import tune_modules

        return tune_modules(kind, add, model, request, options, ranked=rule is not None)

    rule = facts.pop("rule", None)
    return Method(install, rule, facts.pop("learning_rate", 1e-3), caption, add=add, **facts)


def _add_adapters(model: nn.Module, options: AdapterOptions, _ranks: dict[str, int], _head: str) -> None:
    from medlore.layers.tuning.adapters import install_adapters

    install_adapters(model, options)


def _add_adaptformer(model: nn.Module, options: AdapterOptions, _ranks: dict[str, int], _head: str) -> None:
    from medlore.layers.tuning.adapters import install_adaptformer

    install_adaptformer(model, options)


def _add_repadapters(model: nn.Module, options: AdapterOptions, _ranks: dict[str, int], _head: str) -> None:
    from medlore.layers.tuning.adapters import install_repadapters

    install_repadapters(model, options)


def _add_prompts(model: nn.Module, options: PromptOptions, _ranks: dict[str, int], _head: str, *, deep: bool) -> None:
    from medlore.layers.tuning.prompts import install_prompts

    install_prompts(model, options, deep=deep)


def _add_scale_shift(model: nn.Module, _options: Any, _ranks: dict[str, int], head: str) -> None:
    from medlore.layers.tuning.scale_shift import install_scale_shift

    install_scale_shift(model, head)


def _add_generalized(model: nn.Module, options: GeneralizedOptions, ranks: dict[str, int], _head: str) -> None:
    from medlore.layers.tuning.generalized import install_generalized

    install_generalized(model, options, ranks)


# ---- Methods that train weights of the network itself ---------------------------------------------------------------------


def _layernorm(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.own_weights import layernorm

    return layernorm(model, request)


def _linear_probe(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.own_weights import linear_probe

    return linear_probe(model, request)


def _bitfit(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.own_weights import bitfit

    return bitfit(model, request)


def _partial(model: nn.Module, request: Request, options: PartialOptions) -> Tuning:
    from medlore.layers.tuning.own_weights import partial as last_blocks

    return last_blocks(model, request, options)


def _full(model: nn.Module, request: Request, _options: Any) -> Tuning:
    from medlore.layers.tuning.own_weights import full

    return full(model, request)


METHODS: dict[str, Method] = {
    "sr-lora": Method(
        _lora,
        "stable-rank",
        1e-3,
        "LoRA with the rank of each layer taken from its stable rank",
        partial_update=True,
        component_masks=True,
    ),
    "lora": Method(_lora, "uniform", 1e-3, "LoRA with one rank", partial_update=True),
    "rslora": Method(_lora, "uniform", 1e-3, "LoRA with one rank, scaled by 1/sqrt(rank)", alpha="rslora", partial_update=True),
    "dora": Method(_dora, "uniform", 1e-3, "LoRA on directions, magnitudes trained apart"),
    "adalora": Method(_adalora, "uniform", 1e-3, "LoRA in SVD form whose ranks are pruned during training"),
    "eva": Method(_eva, "uniform", 1e-3, "LoRA that starts from the variance of the layer inputs"),
    "pissa": Method(_pissa, "uniform", 1e-3, "LoRA that starts from the leading singular directions"),
    "dylora": Method(_dylora, "uniform", 1e-3, "LoRA that is trained at every smaller rank too", partial_update=True),
    "melora": Method(
        partial(_pairs, "melora"),
        "uniform",
        1e-3,
        "several small LoRA pairs along the diagonal",
        MiniPairOptions,
        pairs=lambda options: int(options.mini_loras),
    ),
    "moslora": Method(partial(_pairs, "moslora"), "uniform", 1e-3, "LoRA with a trained mixer between its factors"),
    "capaboost": Method(partial(_pairs, "capaboost"), "uniform", 1e-3, "one LoRA pair under several fixed masks", MaskedPairOptions),
    "glora": of_modules(
        "glora",
        _add_generalized,
        "weights and biases changed through five supports",
        rule="uniform",
        options=GeneralizedOptions,
        scaled=False,
    ),
    "adapter": of_modules("adapter", _add_adapters, "bottleneck adapters behind attention and MLP (Houlsby)", options=AdapterOptions),
    "adaptformer": of_modules("adaptformer", _add_adaptformer, "bottleneck adapters beside the MLP", options=AdaptFormerOptions),
    "repadapter": of_modules("repadapter", _add_repadapters, "linear adapters that merge into the next layer", options=RepAdapterOptions),
    "vpt-shallow": of_modules(
        "vpt-shallow",
        partial(_add_prompts, deep=False),
        "prompt tokens in the first block",
        learning_rate=1e-2,
        options=PromptOptions,
    ),
    "vpt-deep": of_modules(
        "vpt-deep", partial(_add_prompts, deep=True), "prompt tokens in every block", learning_rate=1e-2, options=PromptOptions
    ),
    "ssf": of_modules("ssf", _add_scale_shift, "a scale and a shift behind every layer"),
    "layernorm": Method(_layernorm, None, 1e-3, "layer norms and head"),
    "linear-probe": Method(_linear_probe, None, 1e-2, "the head alone, on features that are computed once", augments=False),
    "bitfit": Method(_bitfit, None, 1e-3, "biases and head"),
    "partial": Method(_partial, None, 1e-4, "the last blocks and head", PartialOptions),
    "full": Method(_full, None, 1e-4, "every weight"),
}
