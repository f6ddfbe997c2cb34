"""Stable ranks of all attention weights of ViT-L/16 and Swin-B, against the full SVD of the published script.

`python -m benchmarks.ranks [--threads 2] [--samples 2] [--cpu-time]`

For every layout, shape and spectrum `--samples` different matrices are drawn and both ways run on each, in turn; the
medians are multiplied by how often the shape occurs in the network. A ratio is full SVD / certified, checks of the input
and every certificate included. Integers are compared with a float64 SVD of each matrix that was drawn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

Shapes = dict[tuple[int, int], int]  # shape -> how often
SPECTRA: dict[str, tuple[float | None, ...]] = {"flat": (None,), "trained": (0.3, 0.5, 0.7, 1.0)}  # p of j^-p


def networks() -> Iterator[tuple[str, Shapes]]:
    """The attention weights of both networks, qkv fused as the published script sees them, and one projection each (q, k, v, o)."""
    yield "ViT-L fused", {(3072, 1024): 24, (1024, 1024): 24}
    yield "ViT-L projection", {(1024, 1024): 96}
    swin = dict(zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True))
    yield "Swin-B fused", {(rows * d, d): depth for d, depth in swin.items() for rows in (3, 1)}
    yield "Swin-B projection", {(d, d): 4 * depth for d, depth in swin.items()}


def draw(shape: tuple[int, int], p: float | None, seed: int) -> np.ndarray:
    """A Gaussian matrix, or one with random singular vectors and singular values j^-p."""
    g = np.random.default_rng(seed)
    noise = g.standard_normal(shape)
    if p is None:
        return noise.astype(np.float32)
    k = min(shape)
    left = np.linalg.qr(noise)[0]
    right = np.linalg.qr(g.standard_normal((k, k)))[0]
    return ((left * np.arange(1, k + 1.0) ** -p) @ right).astype(np.float32)


def published(W: np.ndarray) -> int:
    """The integer as the published script makes it: all singular values in the weight's own precision."""
    values = np.linalg.svd(W, compute_uv=False)
    return round(float((values**2).sum() / values[0] ** 2))


def reference(W: np.ndarray) -> int:
    """The same in float64: what every integer has to equal."""
    values = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    return round(float((values**2).sum() / values[0] ** 2))


def timed(function: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    """The median of `repeats` runs, in seconds."""
    seen = []
    for _ in range(repeats):
        start = clock()
        function()
        seen.append(clock() - start)
    return statistics.median(seen)


def measure(shape: tuple[int, int], p: float | None, samples: int, clock: Callable[[], float]) -> tuple[float, float, float, list[str]]:
    """Seconds of one full SVD, one certified rank, one proved rank; the ways in which the last two were decided, or a fault."""
    from medlore.linalg.spectra import stable_rank

    seconds: tuple[list[float], ...] = ([], [], [])
    ways = []
    for sample in range(samples):
        W = draw(shape, p, seed=sample)
        found, proof, right = stable_rank(W), stable_rank(W, proof=True), reference(W)
        if not found.rank == proof.rank == right:
            raise SystemExit(f"{shape} p={p} seed {sample}: {found.rank} and {proof.rank}, a full SVD says {right}")
        ways += [found.decided_by, proof.decided_by]
        ways_to_run = (lambda W=W: published(W), lambda W=W: stable_rank(W), lambda W=W: stable_rank(W, proof=True))
        for _ in range(3):  # in turn, so that what else the machine does falls on all of them
            for kept, function, repeats in zip(seconds, ways_to_run, (1, 3, 1), strict=True):
                kept.append(timed(function, clock, repeats))
    svd, fast, proved = (statistics.median(kept) for kept in seconds)
    return svd, fast, proved, ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=2, help="different matrices of each shape and spectrum")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time in place of wall time: for a busy machine, with --threads 1"
    )
    given = parser.parse_args()
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(given.threads)  # its own pool: the limits below do not reach every build of it
    clock = time.process_time if given.cpu_time else time.perf_counter
    with threadpool_limits(given.threads):
        table(given.samples, clock)
    kind = "processor" if given.cpu_time else "wall"
    print(f"{given.threads} threads of {os.cpu_count()}, {kind} time; every integer equals the float64 SVD's")


def table(samples: int, clock: Callable[[], float]) -> None:
    """Print one row per network and kind of spectrum."""
    cache: dict[tuple[tuple[int, int], float | None], tuple[float, float, float, list[str]]] = {}
    print(f"{'network':18s} {'spectrum':8s} {'SVD s':>8s} {'certified s':>12s} {'ratio':>6s} {'with proof':>11s}  decided by")
    for network, shapes in networks():
        for kind, powers in SPECTRA.items():
            totals, ways = np.zeros(3), []
            for shape, count in shapes.items():
                for p in powers:
                    if (shape, p) not in cache:
                        cache[shape, p] = measure(shape, p, samples, clock)
                    *seconds, how = cache[shape, p]
                    totals += count / len(powers) * np.array(seconds)
                    ways += how
            counted = ", ".join(f"{way} {ways.count(way)}" for way in sorted(set(ways)))
            svd, fast, proved = totals
            print(f"{network:18s} {kind:8s} {svd:8.2f} {fast:12.3f} {svd / fast:6.1f} {svd / proved:11.1f}  {counted}", flush=True)


if __name__ == "__main__":
    main()
