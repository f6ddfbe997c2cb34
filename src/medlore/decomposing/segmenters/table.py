"""The table of a study: Dice per label on the test cases, parameters, operations and seconds of every network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from medlore.decomposing.segmenters.cohort import Cohort
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.validation import WindowSettings, dice_of_cases
from medlore.layers.experts.layer import ExpertLayer


def measure_network(
    name: str,
    network: PromptedSegmenter,
    cohort: Cohort,
    windows: WindowSettings,
    facts: dict[str, Any],
    *,
    notes: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One row a label: Dice over the test cases. Size and cost of the network go into `facts`.

    Lists without a test case give no row, since what was trained on is not measured; only those that `notes` says something of
    (`no held-out patient`) are shown on their training cases, and their rows carry the note.
    """
    notes = {entry: note for entry, note in (notes or {}).items() if not cohort.parts["test"].get(entry)}
    cases = [*cohort.cases("test"), *((entry, case) for entry, case in cohort.cases("train") if entry in notes)]
    began = time.process_time()
    rows = dice_of_cases(network, cohort, cases, windows)
    seconds = time.process_time() - began
    facts.setdefault(name, {}).update(
        parameters=parameters_of(network),
        window_gflops=round(window_flops(network, windows) / 1e9, 3),
        cpu_seconds_per_volume=round(seconds / len(cases), 3) if cases else None,
        cases=rows,
    )
    return [{"network": name, **row, "note": notes.get(row["list"], "")} for row in _by_label(rows)]


def parameters_of(network: PromptedSegmenter) -> dict[str, int]:
    """Numbers in the shared base, in each expert and in the table of prompts."""
    layers = [m for m in network.segmenter.modules() if isinstance(m, ExpertLayer)]
    experts: dict[str, int] = {}
    for layer in layers:
        for region in layer.lora_A:
            experts[region] = experts.get(region, 0) + layer.lora_A[region].numel() + layer.lora_B[region].numel()
    everything = sum(p.numel() for p in network.segmenter.parameters())
    return {
        "base": everything - sum(experts.values()),
        **{f"expert {r}": n for r, n in experts.items()},
        "prompts": network.prompts.numel(),
    }


def window_flops(network: PromptedSegmenter, windows: WindowSettings) -> int:
    """Floating-point operations of one window and one prompt with merged weights (a multiplication and an addition are two)."""
    device = next(network.parameters()).device
    channels = network.segmenter.config.image_channels
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.segmenter(torch.zeros(1, channels, *windows.roi_size, device=device), network.prompts.detach()[:1])
    return int(counter.get_total_flops())


def _by_label(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["list"], row["region"], row["label"]), []).append(row)
    return [
        {"list": found, "region": region, "label": label, "dice": sum(r["dice"] for r in held) / len(held), "cases": len(held)}
        for (found, region, label), held in groups.items()
    ]
