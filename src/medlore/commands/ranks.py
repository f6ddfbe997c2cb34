"""`medlore ranks`: which rank does each layer deserve?"""

from __future__ import annotations

import contextlib
from pathlib import Path

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting

_RULE, _WRITTEN = "Rule", "Written files"


class RanksSettings(Settings):
    """How ranks are chosen; the arguments of `plan_ranks`."""

    source: str = setting(
        ...,
        "A .safetensors, .bin, .pth, .pt or JAX .npz file, a transformers folder or hub name, or medlore:vit-mini.",
        argument="SOURCE",
        path=True,
    )
    targets: str = setting(
        "attention", "attention, attention+mlp, all-linear, conv, or a regular expression for module names.", group=_RULE
    )
    granularity: str = setting(
        "projection", "projection: one stable rank each for q, v and output; fused: one for the stacked q, k, v.", group=_RULE
    )
    rule: str = setting("stable-rank", "stable-rank, uniform:K, or given (with --ranks).", group=_RULE)
    ranks: str | None = setting(
        None, "Ranks from a file: nested (qkv, output) pairs, a plan, medlore:rank-lists/NAME.", group=_RULE, path=True
    )
    scale: float = setting(1.0, "Factor by which the stable ranks are multiplied.", group=_RULE, allow_inf_nan=True)
    budget: str | None = setting(None, "Parameter budget of all factor pairs: 250000, 0.5M, 2% of the model, or uniform:8.", group=_RULE)
    alpha: str | None = setting(None, "rank*C (scaling C, the default with C 1), rslora*C, or a number C (scaling C / rank).", group=_RULE)
    include_k: bool = setting(False, "Adapt the key projections too.", group=_RULE, flags=("--k",))
    proof: bool = setting(False, "Certify by a proof instead of a failure probability below 1e-12.", group=_RULE)
    rounding: str = setting("half-even", "How stable ranks are rounded: half-even, half-up, floor or ceil.", group=_RULE)
    min_rank: int = setting(1, "Smallest rank of a layer.", group=_RULE)
    max_rank: int | None = setting(None, "Largest rank of a layer.", group=_RULE)
    tower: str = setting("auto", "Encoder of an image-text model: vision, text or both; auto takes the image encoder.", group=_RULE)
    ema: bool = setting(False, "Use the moving average of the weights from a torch file that contains both.", group=_RULE)
    any_weights: bool = setting(False, "Accept a given plan although it was computed for other weights.", group=_RULE)
    seed: int = setting(0, "Seed of the random start vectors; the ranks do not depend on it.", group=_RULE)


class RanksOutput(Output):
    """What is written."""

    out: Path | None = setting(None, "Write the plan: plan.json.", group=_WRITTEN)
    plot: Path | None = setting(None, "Draw the ranks by depth: ranks.png.", group=_WRITTEN)
    peft: Path | None = setting(None, "Write adapter_config.json for PEFT into this new folder.", group=_WRITTEN)
    full: bool = setting(False, "Print one line per matrix instead of one per block.")
    quiet: bool = setting(False, "Print only the totals.", flags=("--quiet", "-q"), decides=False)


def ranks(given: Given) -> None:
    """Choose LoRA ranks for a model from its weights alone.

    A certified stable rank for every matrix, as a table, a plan file, a picture, a PEFT configuration.
    """
    settings, output = given.read(RanksSettings, RanksOutput)
    from medlore.commands.screens.answers import print_json
    from medlore.commands.screens.ranks import print_plan, progress_bar
    from medlore.inspecting.ranks import make_plan, summary
    from medlore.runs.output_lock import OutputLock

    options = settings.flat()
    check = not options.pop("any_weights")
    with contextlib.ExitStack() as stack:
        for place in {path.absolute() for path in (output.out, output.plot, output.peft) if path is not None}:
            stack.enter_context(OutputLock.beside(place))
        advance = stack.enter_context(progress_bar())
        plan, written = make_plan(
            options.pop("source"), out=output.out, plot=output.plot, peft=output.peft, progress=advance, check=check, **options
        )
    if output.as_json:
        print_json(summary(plan) | {"written": written})
    else:
        print_plan(plan, written, full=output.full, quiet=output.quiet)


app = command(ranks, RanksSettings, RanksOutput)
