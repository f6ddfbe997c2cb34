"""Blending the windows of a volume, the network left out: ours against MONAI's `sliding_window_inference`, at 16 and 64 labels.

    python -m benchmarks.stitching [--repeats 5] [--keep]

Processor time of one thread, in turn in one process; both give masks of one bit a voxel. The limit reads the logits of every window once
and writes the masks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks._figures import Figure, missing, show

SHAPE, ROI = (192, 96, 96), (96, 96, 96)


def ways(labels: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is run, by name."""
    import torch

    from medlore.data.volumes.window_grid import WindowGrid
    from medlore.data.volumes.windows import sliding_windows

    logits = torch.randn((1, labels, *ROI), generator=torch.Generator().manual_seed(0)) * 3
    grid = WindowGrid(SHAPE, ROI)
    volume = torch.zeros(1, *SHAPE)

    def ours() -> Any:
        masks = np.zeros((labels, *SHAPE[:2], SHAPE[2] // 8), np.uint8)
        for slab in sliding_windows(volume, lambda _: logits, grid, labels=labels):
            for label, probability in enumerate(slab.probability):
                masks[label, slab.start : slab.start + len(probability)] = np.packbits((probability > 0.5).numpy(), axis=-1)
        return masks

    def monai() -> Any:
        from monai.inferers import sliding_window_inference

        out = sliding_window_inference(volume[None], ROI, 1, lambda _: torch.sigmoid(logits), overlap=0.5, mode="gaussian")
        return np.packbits((out[0] > 0.5).numpy(), axis=-1)

    def limit() -> Any:
        for _ in grid.windows():
            (logits > 0).numpy()
        return np.packbits(np.zeros((labels, *SHAPE), np.bool_), axis=-1)

    yield "ours", ours
    if not missing("monai", "MONAI"):
        yield "MONAI", monai
    yield "limit", limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results/performance.json")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows = []
    for labels in (16, 64):
        functions = dict(ways(labels))
        seen: dict[str, list[float]] = {name: [] for name in functions}
        for round_ in range(given.repeats + 1):
            for name, function in functions.items():
                start = time.process_time()
                function()
                if round_:  # the first one warms up
                    seen[name].append(time.process_time() - start)
        seconds = {name: statistics.median(kept) for name, kept in seen.items()}
        peer = seconds.get("MONAI")
        words = "" if peer is None else f"MONAI {peer:.2f} s"
        ratio = None if peer is None else seconds["ours"] / peer
        limit = f"{seconds['limit']:.2f} s"
        rows.append(Figure(f"blending, {labels} labels", f"{seconds['ours']:.2f} s", words, limit, ratio, 0.4, "times"))
        del functions
    note = f"Processor time of one thread, medians of {given.repeats} in turn; windows of 96³ over 192 x 96 x 96."
    show("Stitching", "python -m benchmarks.stitching --keep", rows, note=note, kept=given.keep)


if __name__ == "__main__":
    main()
