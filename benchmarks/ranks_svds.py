"""Stable ranks against what a PEFT user would type instead: `scipy.sparse.linalg.svds(W, k=1)`. Processor time of one thread, in turn.

    python -m benchmarks.ranks_svds [--repeats 5] [--keep]

Every row is a network and a spectrum; shapes are weighted by how often they occur. `svds` gives a number without bounds; ours is the
certified integer. The last row draws matrices whose stable rank is within 1e-6 of a rounding edge and counts wrong integers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks._figures import Figure, show
from benchmarks.ranks import SPECTRA, Shapes, draw, published, reference

EDGES = 40


def networks() -> Iterator[tuple[str, Shapes]]:
    """Attention and MLP weights of transformers, and convolutions of a 3D U-Net as out x (in · k³)."""
    for name, width, blocks in (("ViT-S, DINOv2-S", 384, 12), ("ViT-B, DINOv2-B", 768, 12), ("ViT-L, DINOv2-L", 1024, 24)):
        yield f"{name}: projections", {(width, width): 4 * blocks}
        yield f"{name}: fused qkv and MLP", {(3 * width, width): blocks, (4 * width, width): 2 * blocks}
    for name, depths, width in (("Swin-T", (2, 2, 6, 2), 96), ("Swin-B", (2, 2, 18, 2), 128)):
        yield f"{name}: projections", {(width << stage, width << stage): 4 * depth for stage, depth in enumerate(depths)}
    yield "Conv3d of a U-Net", {(64, 864): 1, (64, 1728): 1, (128, 1728): 1, (128, 3456): 1, (256, 3456): 1, (320, 8640): 2}


def of_shape(shape: tuple[int, int], p: float | None, seed: int) -> np.ndarray:
    """A matrix of `benchmarks.ranks`, also a wide one."""
    rows, columns = shape
    return draw(shape, p, seed) if rows >= columns else np.ascontiguousarray(draw((columns, rows), p, seed).T)


def by_svds(W: np.ndarray) -> int:
    """The integer that three words give."""
    from scipy.sparse.linalg import svds

    return round(float(np.vdot(W, W)) / float(svds(W, k=1, return_singular_vectors=False)[0]) ** 2)


def in_turn(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median processor seconds of each."""
    seen: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for kept, function in zip(seen, functions, strict=True):
            start = time.process_time()
            function()
            kept.append(time.process_time() - start)
    return [statistics.median(kept) for kept in seen]


def near_an_edge(seed: int, n: int = 192) -> np.ndarray:
    """A matrix whose stable rank is half-way between two integers but for a millionth."""
    g = np.random.default_rng(seed)
    values = np.arange(1, n + 1.0) ** -g.uniform(0.2, 1.0)
    goal = np.floor((values**2).sum() / values[0] ** 2) + 0.5 + g.uniform(-1e-6, 1e-6)
    values[1:] *= np.sqrt((goal - 1) * values[0] ** 2 / (values[1:] ** 2).sum())
    left, right = (np.linalg.qr(g.standard_normal((n, n)))[0] for _ in range(2))
    return ((left * values) @ right).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results/performance.json")
    given = parser.parse_args()
    import torch
    from threadpoolctl import threadpool_limits

    from medlore.linalg.spectra import stable_rank

    torch.set_num_threads(1)
    cache: dict[tuple[tuple[int, int], float | None], list[float]] = {}
    rows = []
    with threadpool_limits(1):
        for network, shapes in networks():
            for kind, powers in SPECTRA.items():
                totals = np.zeros(4)
                for shape, count in shapes.items():
                    for p in powers:
                        if (shape, p) not in cache:
                            W = of_shape(shape, p, seed=0)
                            ways = [lambda: by_svds(W), lambda: stable_rank(W), lambda: stable_rank(W, proof=True), lambda: np.vdot(W, W)]  # noqa: B023
                            cache[shape, p] = in_turn(ways, given.repeats)
                        totals += count / len(powers) * np.array(cache[shape, p])
                svds, ours, proof, limit = totals * 1e3
                what = f"{network}, {kind}"
                passes = f"one pass {limit:.1f} ms"
                rows.append(Figure(what, f"{ours:.0f} ms", f"svds {svds:.0f} ms", passes, ours / svds, 1.0, "times"))
                rows.append(Figure(f"{what}, with a proof", f"{proof:.0f} ms", f"svds {svds:.0f} ms", passes, proof / svds, 2.0, "times"))
                print(f"{what}: {ours / svds:.2f}, with a proof {proof / svds:.2f}", flush=True)
        edges = [near_an_edge(seed) for seed in range(EDGES)]
        truth = [reference(W) for W in edges]
        wrong = {
            way.__name__: sum(way(W) != right for W, right in zip(edges, truth, strict=True))
            for way in (by_svds, published, lambda W: stable_rank(W).rank)
        }
    svds_wrong, full_wrong, ours_wrong = wrong.values()
    what = f"wrong integers of {EDGES} matrices within 1e-6 of a rounding edge"
    rows.append(Figure(what, str(ours_wrong), f"svds {svds_wrong}, float32 SVD {full_wrong}", "0", float(ours_wrong), 0.0))
    note = f"Processor time of one thread, medians of {given.repeats}, in turn; `limit` is one pass over the weights."
    show("Ranks", "python -m benchmarks.ranks_svds --keep", rows, note=note, kept=given.keep)


if __name__ == "__main__":
    main()
