"""How time and memory grow with labels, slices, windows, cases and matrices: the exponent over a range of each.

    python -m benchmarks.growth [labels|slices|windows|cases|matrices ...] [--keep]

Every point is a process of its own. Time is the processor time of the work (of cases the wall time beside the network), without imports
and loading; memory is the largest resident memory beyond what was resident before the work, without the voxels of the image itself. The
exponent is the slope of a line through the logarithms: 0 is constant, 1 proportional. An exponent of memory counts only what exceeds
16 MiB, since less is the allocator's noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._figures import Figure, show

_NOISE = 16 << 20


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _watched(work: Callable[[], object], *, own: int = 0) -> dict[str, float]:
    """Processor seconds of `work`, and bytes at its peak beyond those before it and its `own`."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before, start = _resident("VmRSS"), time.process_time()
    work()
    seconds, peak = time.process_time() - start, _resident("VmHWM")
    return {"seconds": seconds, "bytes": max(peak - before - own, 0)}


def _volume(path: Path, shape: tuple[int, int, int]) -> Path:
    import nibabel

    array = np.full(shape, -1000, np.int16)
    array[4:-4, 4:-4, 1:-1] = np.random.default_rng(0).normal(40, 60, tuple(n - d for n, d in zip(shape, (8, 8, 2), strict=True)))
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 3.0, 1.0])), path)
    return path


def _segmented(folder: Path, shape: tuple[int, int, int], labels: int) -> dict[str, float]:
    from benchmarks.segment import _small_pack
    from medlore.segmenting.segmenter import load_segmenter

    segmenter = load_segmenter(_small_pack(folder), precision="fp32", check="none")
    names = segmenter.labels("ct")[:labels]
    segmenter.segment(_volume(folder / "warm.nii.gz", (40, 40, 24)), names[:1], modality="ct").save(folder / "warm")
    image = _volume(folder / "image.nii.gz", shape)
    own = 2 * int(np.prod(shape))
    return _watched(lambda: segmenter.segment(image, names, modality="ct").save(folder / "out"), own=own)


def labels(count: int, folder: Path) -> dict[str, float]:
    """Masks asked for in one volume."""
    return _segmented(folder, (96, 96, 48), count)


def slices(count: int, folder: Path) -> dict[str, float]:
    """Slices of one volume, four labels."""
    return _segmented(folder, (72, 72, count), 4)


def windows(count: int, folder: Path) -> dict[str, float]:
    """Windows along the axis of a volume, stitched; the network is a table look-up."""
    import torch

    from medlore.data.volumes.window_grid import WindowGrid
    from medlore.data.volumes.windows import sliding_windows

    roi = (48, 48, 48)
    logits = torch.randn((1, 8, *roi), generator=torch.Generator().manual_seed(0))
    shape = (24 * (count + 1), 48, 48)
    pixels = torch.zeros(1, *shape)

    def work() -> None:
        for slab in sliding_windows(pixels, lambda w: logits, WindowGrid(shape, roi), labels=8):
            (slab.probability > 0.5).any()

    return _watched(work)


def cases(count: int, folder: Path) -> dict[str, float]:
    """Tiny cases of a cohort, all outputs included."""
    from benchmarks.segment import _small_pack
    from medlore.runs.settings_file import read_settings
    from medlore.segmenting.cohort import segment_cases
    from medlore.segmenting.settings import SegmentSettings

    pack = _small_pack(folder)
    asked = {"model": str(pack), "labels": ["liver", "spleen"], "modality": "ct", "precision": "fp32"}
    for name, number in (("warm", 1), ("cases", count)):
        (folder / name).mkdir()
        for index in range(number):
            _volume(folder / name / f"{index}.nii.gz", (24, 24, 12))
    segment_cases(read_settings(SegmentSettings, cases=folder / "warm", out=folder / "warmed", **asked))
    network: list[float] = []
    settings = read_settings(SegmentSettings, cases=folder / "cases", out=folder / "out", **asked)

    def work() -> None:
        entries = segment_cases(settings)["cases"]
        network.extend(entry["phases"]["network"] for entry in entries)

    start = time.perf_counter()
    seen = _watched(work)
    return {**seen, "seconds": time.perf_counter() - start - sum(network)}  # the network's seconds are of the wall clock


def matrices(count: int, folder: Path) -> dict[str, float]:
    """Attention matrices of a checkpoint that are measured and planned."""
    import torch
    from safetensors.torch import save_file

    import medlore

    rng = torch.Generator().manual_seed(0)
    state = {
        f"vit.encoder.layer.{block}.attention.attention.{part}.weight": torch.randn(256, 256, generator=rng)
        for block in range(count // 2)
        for part in ("query", "value")
    }
    save_file(state, folder / "weights.safetensors")
    del state
    return _watched(lambda: medlore.plan_ranks(folder / "weights.safetensors"))


# subject -> what grows, the points, the exponents of time and memory at most
SUBJECTS: dict[str, tuple[Callable[[int, Path], dict[str, float]], tuple[int, ...], float, float]] = {
    "labels": (labels, (4, 16, 64), 1.0, 0.1),
    "slices": (slices, (32, 96, 288), 1.1, 0.1),
    "windows": (windows, (8, 32, 128), 1.1, 0.1),
    "cases": (cases, (8, 32, 128), 1.05, 0.1),
    "matrices": (matrices, (24, 96, 384), 1.05, 0.1),
}


def exponent(points: tuple[int, ...], values: list[float]) -> float:
    """Slope of the logarithms."""
    return float(np.polyfit(np.log(points), np.log(np.maximum(values, 1e-9)), 1)[0])


def _measured(name: str, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.growth", "--one", name, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])}: {done.stderr[-800:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[], metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--one", nargs=2, metavar=("SUBJECT", "COUNT"), help="measure one point in this process")
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results/performance.json")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(SUBJECTS[given.one[0]][0](int(given.one[1]), Path(folder))))
        return
    rows = []
    for name in given.names or SUBJECTS:
        _, points, most_time, most_memory = SUBJECTS[name]
        seen = [_measured(name, count) for count in points]
        seconds, sizes = [s["seconds"] for s in seen], [s["bytes"] for s in seen]
        ends = f"{points[0]} to {points[-1]}"
        figure = f"{seconds[0]:.2f} to {seconds[-1]:.2f} s"
        rows.append(Figure(f"time in {name}, {ends}", figure, value=round(exponent(points, seconds), 2), target=most_time))
        figure = f"{sizes[0] / 2**20:.0f} to {sizes[-1] / 2**20:.0f} MiB"
        slope = exponent(points, [max(size, _NOISE) for size in sizes])
        rows.append(Figure(f"memory in {name}, {ends}", figure, value=round(slope, 2), target=most_memory))
        print(*(row.cells() for row in rows[-2:]), sep="\n", flush=True)
        if name == "cases":
            each = (seconds[-1] - seconds[0]) / (points[-1] - points[0])
            rows.append(Figure("time of a tiny case without the network, all outputs", f"{each:.2f} s", value=each, target=0.2, unit="s"))
    note = "The figure is the exponent; processor time, memory beyond the image itself."
    show("Growth", "python -m benchmarks growth --keep", rows, note=note, kept=given.keep)


if __name__ == "__main__":
    main()
