"""The tables of docs/evidence.md on the recipe, from the raw cells.

python -m maintenance.recipe_tables docs/results/recipe-{probes,rates,views,guards}.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maintenance.recipe_probes import OWN
from medlore.files import read_json
from medlore.metrics.draws import mean_of_draws

LAST = 4  # blocks that `--features auto` looks at
GAINS = (0.0, 0.5, 1.0, 2.0, 4.0)


def strengths(cells: Mapping[str, Any]) -> str:
    """Mean score and log-likelihood of the test images at each strength, the network's own reading."""
    names = list(next(iter(cells.values()))["strengths"])
    lines = ["| network, shots | cells | " + " | ".join(f"C = {name}" for name in names) + " |", "|---" * (len(names) + 2) + "|"]
    for title, keys in _by_shots(cells).items():
        means = [np.mean([cells[key]["strengths"][name] for key in keys], axis=0) for name in names]
        lines.append(f"| {title} | {len(keys)} | " + " | ".join(f"{score:.3f} / {said:.2f}" for score, said in means) + " |")
    return "\n".join(lines)


def readings(cells: Mapping[str, Any]) -> str:
    """The network's own reading, what cross-validation chooses at several demands, and the best one in hindsight."""
    heads = [f"auto, {gain:g}" for gain in GAINS]
    lines = [
        "| network, shots | own | " + " | ".join(heads) + " | auto (1) minus own | best in hindsight |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for title, keys in _by_shots(cells).items():
        if title.endswith(" 1"):  # nothing can be held out
            continue
        own, own_reading = zip(*(_own(key, cells[key]["cuts"]) for key in keys), strict=True)
        chosen = {gain: [_auto(cells[key]["cuts"], own_reading[i], gain) for i, key in enumerate(keys)] for gain in GAINS}
        best = [max(score for _, score, _ in cells[key]["cuts"].values()) for key in keys]
        difference = mean_of_draws([a - b for a, b in zip(chosen[1.0], own, strict=True)])
        row = [np.mean(own), *(np.mean(chosen[gain]) for gain in GAINS)]
        lines.append(f"| {title} | " + " | ".join(f"{value:.3f}" for value in row) + f" | {difference} | {np.mean(best):.3f} |")
    return "\n".join(lines)


def rates(cells: Mapping[str, Any]) -> str:
    """One training each, beside the probe of the same shots."""
    lines = ["| training | score | probe | difference | seconds |", "|---|---|---|---|---|"]
    for key, cell in cells.items():
        lines.append(
            f"| {key} | {cell['score']:.3f} | {cell['probe']:.3f} | {cell['score'] - cell['probe']:+.3f} | {cell['seconds']:.0f} |"
        )
    return "\n".join(lines)


def views(cells: Mapping[str, Any]) -> str:
    """The probe without and with changed views of each image, on the network's own features and on those that the shots choose."""
    ways = {
        "own": ("own", "plain"),
        "own, views": ("own", "gently"),
        "auto": ("auto", "plain"),
        "auto, views": ("auto", "gently"),
        "auto, stronger views": ("auto", "augmented"),
    }
    lines = [
        f"| network, shots | cells | {' | '.join(ways)} | auto and views minus own | auto and views minus auto |",
        "|---" * (len(ways) + 4) + "|",
    ]
    for title, keys in _by_shots(cells).items():
        means = " | ".join(f"{np.mean([cells[key][part][way][0] for key in keys]):.3f}" for part, way in ways.values())
        against = [
            str(mean_of_draws([cells[key]["auto"]["gently"][0] - cells[key][part]["plain"][0] for key in keys])) for part in ("own", "auto")
        ]
        lines.append(f"| {title} | {len(keys)} | {means} | {' | '.join(against)} |")
    return "\n".join(lines)


def _by_shots(cells: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for network in OWN:
        for shots in (1, 5, 10):
            keys = [key for key in cells if key.startswith(f"{network},") and f", {shots} shots," in key]
            found |= {f"{network}, {shots}": keys} if keys else {}
    return found


def _own(key: str, cuts: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    reading = OWN[key.partition(",")[0]]
    last = max(int(name.split()[0]) for name in cuts)
    return cuts[f"{last} {reading}"][1], reading


def _auto(cuts: Mapping[str, Sequence[float]], own: str, gain: float) -> float:
    last = max(int(name.split()[0]) for name in cuts)
    allowed = [name for name in cuts if last - int(name.split()[0]) < LAST]
    return float(cuts[max(allowed, key=lambda name: cuts[name][0] - gain * (name.split()[1] != own))][1])


def guards(cells: Mapping[str, Any]) -> str:
    """One training each: the probe, the tuned network, and both together, as differences to the probe."""
    names = ("0.25", "0.5", "0.625", "1")
    lines = [
        "| training | probe | tuned | " + " | ".join(f"{name} of the change" for name in names[:-1]) + " | averaged |",
        "|---" * (len(names) + 3) + "|",
    ]
    for key, cell in cells.items():
        probe = cell["shares"]["0"][0]
        said = {name: f"{cell['shares'][name][0] - probe:+.3f}" if name in cell["shares"] else "" for name in names}
        parts = [said["1"], *(said[name] for name in names[:-1]), f"{cell['blend'][0] - probe:+.3f}"]
        lines.append(f"| {key} | {probe:.3f} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Command line."""
    probes, trainings, viewed, guarded = (dict(read_json(Path(name))) for name in arguments)
    sys.stdout.write("\n\n".join([strengths(probes), readings(probes), rates(trainings), views(viewed), guards(guarded)]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
