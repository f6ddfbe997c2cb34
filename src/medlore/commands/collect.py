"""`medlore collect`: one report and one table of a cohort that was segmented in shards."""

from __future__ import annotations

from pathlib import Path

import typer

from medlore.commands.flags import Given, Output, command
from medlore.runs.settings import Settings, setting


class CollectCall(Settings):
    """What is put together."""

    out: Path = setting(..., "The --out folder of `medlore segment --shard`.", argument="OUT")


def collect(given: Given) -> None:
    """Put the shards of a cohort together: one report.json, statistics.csv and statistics.json."""
    call, output = given.read(CollectCall, Output)
    from medlore.commands.screens.segmenting import print_results
    from medlore.segmenting.shards import collect as run

    results = run(call.out)
    print_results(results, call.out, as_json=output.as_json)
    if results["counts"]["failed"]:
        raise typer.Exit(1)


app = command(collect, CollectCall, Output)
