"""How long it takes until a command does its work: processor time of fresh processes, medians, in turn.

    python -m benchmarks.start [--repeats 5] [--keep]

"First window" and "first step" end where the progress bar hears of them: everything before it is start-up, the first window itself too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks._figures import Figure, show

_UNTIL_WINDOW = """
import os, sys
from medlore.cli import main
from medlore.commands.screens.segmenting import CaseProgress
CaseProgress.window = lambda *_: os._exit(0)
sys.exit(main())
"""
_UNTIL_STEP = """
import os, sys
from medlore.cli import main
from medlore.training.watching import Watchers
Watchers.step = lambda *_: os._exit(0)
sys.exit(main())
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """What is run, by name."""
    image, photos = _small_volume(folder / "image.nii.gz"), _photographs(folder / "photographs")
    segment = ["segment", "--image", str(image), "--labels", "hippocampus", "--modality", "t1", "--model", "medlore:seg-mini"]
    tune = ["finetune", "--data", str(photos), "--model", "medlore:vit-mini", "--shots", "4", "--epochs", "1"]
    return {
        "bare": ["-c", "pass"],
        "import medlore": ["-c", "import medlore"],
        "medlore --help": ["-m", "medlore", "--help"],
        "segment --dry-run": ["-m", "medlore", *segment, "--out", str(folder / "dry"), "--dry-run"],
        "torch": ["-c", "import torch"],
        "segment": ["-c", _UNTIL_WINDOW, *segment, "--out", str(folder / "masks")],
        "torch and peft": ["-c", "import torch, peft, transformers.models.vit.modeling_vit"],
        "lora": ["-c", _UNTIL_STEP, *tune, "--method", "lora", "--out", str(folder / "lora"), "--overwrite"],
        "bitfit": ["-c", _UNTIL_STEP, *tune, "--method", "bitfit", "--out", str(folder / "bitfit"), "--overwrite"],
    }


def _small_volume(path: Path) -> Path:
    import nibabel

    voxels = np.random.default_rng(0).normal(40, 60, (48, 48, 32)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), path)
    return path


def _photographs(folder: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("first", "second", "third"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def seconds_of(words: list[str]) -> tuple[float, float]:
    """Processor and wall time of one fresh process of Python, everything that it starts included."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    after, wall = os.times(), time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-600:]}")
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="write the table into docs/results/performance.json")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        run = commands(Path(name))
        for _ in range(given.repeats):
            for what, words in run.items():
                seen.setdefault(what, []).append(seconds_of(words))
    cpu, wall = ({what: statistics.median(pair[i] for pair in pairs) for what, pairs in seen.items()} for i in (0, 1))

    def figure(words: str, what: str, beside: str, value: float, target: float, unit: str) -> Figure:
        return Figure(words, f"{cpu[what]:.2f} s", f"{beside} {cpu[beside]:.2f} s", f"wall {wall[what]:.2f} s", value, target, unit)

    beyond = {what: cpu[what] - cpu["bare"] for what in ("import medlore", "medlore --help")}
    rows = [
        figure("`import medlore`, beyond a bare interpreter", "import medlore", "bare", beyond["import medlore"], 0.05, "s"),
        figure("`medlore --help`, beyond a bare interpreter", "medlore --help", "bare", beyond["medlore --help"], 0.25, "s"),
        figure("`medlore segment --dry-run`", "segment --dry-run", "bare", cpu["segment --dry-run"], 1.0, "s"),
        figure("`medlore segment`, first window of a small image", "segment", "torch", cpu["segment"], 4.0, "s"),
        figure("`medlore finetune --method lora`, first step", "lora", "torch and peft", cpu["lora"] / cpu["torch and peft"], 1.3, "times"),
        figure(
            "`medlore finetune --method bitfit`, first step",
            "bitfit",
            "torch and peft",
            cpu["bitfit"] / cpu["torch and peft"],
            1.3,
            "times",
        ),
    ]
    note = f"Processor time, medians of {given.repeats} fresh processes in turn; `torch and peft` imports both and the network's module."
    show("Start", "python -m benchmarks.start --keep", rows, note=note, kept=given.keep)


if __name__ == "__main__":
    main()
