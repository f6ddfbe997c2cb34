"""What `quality_control.png` costs a case, beside the same picture's planes and outlines drawn with matplotlib.

    python -m benchmarks.picture [--repeats 7] [--keep]

Processor time; the first picture of a process carries the imports and the font, the others are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._figures import Figure, missing, show

LABELS = 4


def a_case(folder: Path) -> Any:
    """A segmented volume of 96 x 96 x 48 with a few labels."""
    import nibabel

    from benchmarks.segment import _small_pack
    from medlore.segmenting.segmenter import load_segmenter

    array = np.full((96, 96, 48), -1000, np.int16)
    array[4:-4, 4:-4, 2:-2] = np.random.default_rng(0).normal(40, 60, (88, 88, 44))
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 3.0, 1.0])), folder / "image.nii.gz")
    segmenter = load_segmenter(_small_pack(folder), precision="fp32")
    return segmenter.segment(folder / "image.nii.gz", segmenter.labels("ct")[:LABELS], modality="ct").segmentation


def ours(result: Any, path: Path) -> None:
    """The picture of the product."""
    from medlore.segmenting.quality_control import write_quality_control

    write_quality_control(path, result, "case")


def matplotlib(result: Any, path: Path) -> None:
    """Three planes with outlines and a legend, the plain way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Sheet
    from matplotlib.lines import Line2D

    figure = Sheet(figsize=(13, 5.2), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    grey = result.volume.array
    masks = [result.mask(label) for label in result.routes.labels]
    for axis, plot in enumerate(figure.subplots(1, 3)):
        index = grey.shape[axis] // 2
        plot.imshow(np.take(grey, index, axis).T, cmap="gray", origin="lower", vmin=-160, vmax=240)
        plot.set_axis_off()
        for number, mask in enumerate(masks):
            plane = np.take(mask, index, axis).T
            if plane.any():
                plot.contour(plane, levels=[0.5], colors=[f"C{number}"])
    figure.legend([Line2D([], [], color=f"C{i}") for i in range(len(masks))], result.routes.labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


WAYS: dict[str, Callable[[Any, Path], None]] = {"ours": ours, "matplotlib": matplotlib}


def _measure(way: str, repeats: int) -> list[float]:
    """Seconds of the first and of the following pictures, in this process."""
    seen = []
    with tempfile.TemporaryDirectory() as name:
        result = a_case(Path(name))
        for _ in range(repeats + 1):
            start = time.process_time()
            WAYS[way](result, Path(name) / "picture.png")
            seen.append(time.process_time() - start)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one", choices=WAYS, help="measure one way in this process")
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results/performance.json")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measure(given.one, given.repeats)))
        return
    seen = {}
    for way in WAYS:
        if way != "ours" and missing(way, "the picture's peer"):
            continue
        command = [sys.executable, "-m", "benchmarks.picture", "--one", way, "--repeats", str(given.repeats)]
        seen[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    rows = []
    for what, number in (("first picture of a process", 0), ("every further picture", 1)):
        seconds = {way: values[0] if number == 0 else statistics.median(values[1:]) for way, values in seen.items()}
        peer = f"matplotlib {seconds['matplotlib']:.2f} s" if "matplotlib" in seconds else ""
        rows.append(Figure(what, f"{seconds['ours']:.2f} s", peer, "", seconds["ours"], 0.15, "s"))
    note = f"Processor time, median of {given.repeats}; {LABELS} labels on noise, whose outlines are longer than those of organs."
    show("The picture of a case", "python -m benchmarks.picture --keep", rows, note=note, kept=given.keep)


if __name__ == "__main__":
    main()
