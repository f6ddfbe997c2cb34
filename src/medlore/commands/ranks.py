"""`medlore ranks`: which rank does each layer deserve?"""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer()


@app.command()
def ranks(
    source: str = typer.Argument(
        help="A .safetensors, .bin, .pth, .pt or JAX .npz file, a transformers folder or hub name, or medlore:vit-mini."
    ),
    targets: str = typer.Option("attention", help="attention, attention+mlp, all-linear, conv, or a regular expression for module names."),
    granularity: str = typer.Option("projection", help="projection: one stable rank for each of q, v, output; fused: one for q, k, v."),
    rule: str = typer.Option("stable-rank", help="stable-rank, uniform:K, or given (with --ranks)."),
    given: str | None = typer.Option(
        None, "--ranks", help="Ranks from a file: nested (qkv, output) pairs, a plan, medlore:rank-lists/NAME."
    ),
    scale: float = typer.Option(1.0, help="Factor on the stable ranks."),
    budget: str | None = typer.Option(None, help="Parameters for all factor pairs: 250000, 0.5M, 2% of the model, or uniform:8."),
    alpha: str | None = typer.Option(None, help="rank*C (scaling C, the default with C 1), rslora*C, or a number C (scaling C / rank)."),
    k: bool = typer.Option(False, "--k/--no-k", help="Adapt the key projections too."),
    proof: bool = typer.Option(False, "--proof", help="Certify by proof in place of a failure probability below 1e-12."),
    rounding: str = typer.Option("half-even", help="half-even, half-up, floor or ceil."),
    min_rank: int = typer.Option(1, help="Smallest rank of a layer."),
    max_rank: int | None = typer.Option(None, help="Largest rank of a layer."),
    any_weights: bool = typer.Option(False, "--any-weights", help="Take a given plan although it was computed for other weights."),
    out: Path | None = typer.Option(None, help="Write the plan: plan.json."),
    plot: Path | None = typer.Option(None, help="Draw the ranks by depth: ranks.png."),
    peft: Path | None = typer.Option(None, help="Write adapter_config.json for PEFT into this new folder."),
    seed: int = typer.Option(0, help="Of the random start vectors; the ranks do not depend on it."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Choose LoRA ranks for a model from its weights alone.

    A certified stable rank for every matrix, as a table, a plan file, a picture, a PEFT configuration.
    """
    from medlore.inspecting.ranks import show_ranks

    show_ranks(
        source,
        out=out,
        plot=plot,
        peft=peft,
        as_json=as_json,
        targets=targets,
        granularity=granularity,
        rule=rule,
        ranks=given,
        scale=scale,
        budget=budget,
        alpha=alpha,
        include_k=k,
        proof=proof,
        rounding=rounding,
        min_rank=min_rank,
        max_rank=max_rank,
        check=not any_weights,
        seed=seed,
    )
