"""The pictures of README and docs, made from a finished run of the demo.

    make demo                              # or: medlore demo --out runs/demo
    python -m maintenance.pictures --demo runs/demo --out docs/pictures

`halves.svg` is drawn from the texts below, `ranks.png` from the run's rank plan, `masks.png` from its segmented template, and
`demo-page.png` is its page in a headless Chromium.
"""

from __future__ import annotations

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from medlore.data.volumes.geometry import Array, bounding_box
from medlore.data.volumes.preparation import read_volume
from medlore.errors import InputError, MedloreError
from medlore.files import atomic_path, existing_file, read_json, write_text
from medlore.inspecting.ranks import draw_profile
from medlore.pages.colours import label_colour
from medlore.ranks.plan import RankPlan

MOST_BYTES = 1 << 20  # of all pictures together
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGE_SIZE = (1280, 1500)  # pixels of the screenshot

HALVES = (
    (
        "Tune a network on a few labelled images",
        "#0f766e",
        (
            ("Pre-trained weights", "ViT, Swin, CLIP, DINOv2, ..."),
            ("Certified stable ranks", "one rank per layer, without data"),
            ("Few-shot tuning", "five labelled images per class"),
            ("Adapter", "an ordinary PEFT folder"),
        ),
    ),
    (
        "Split a network into experts, and segment with them",
        "#1d4ed8",
        (
            ("Large teacher", "classifier or text-prompted segmenter"),
            ("Shared base + experts", "one low-rank pair per task or region"),
            ("Merged expert", "one ordinary network per task"),
            ("Answers", "classes, or masks on the image's grid"),
        ),
    ),
)
_FONT = 'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif"'
_TIP = (
    '<marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="#475569"/></marker>'
)
_BOX, _GAP, _HIGH, _MARGIN, _ROW = 262, 34, 74, 24, 150


def halves_svg() -> str:
    """The two halves of the product, each as a row of four steps."""
    width = 2 * _MARGIN + 4 * _BOX + 3 * _GAP
    height = 2 * _ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {_FONT}>',
        "<title>The two halves of MedLoRE</title>",
        f'<rect width="{width}" height="{height}" rx="14" fill="#ffffff"/>',
        f"<defs>{_TIP}</defs>",
    ]
    for row, (title, colour, steps) in enumerate(HALVES):
        lines += _row_of_steps(title, colour, steps, top=18 + row * _ROW)
    middle = _MARGIN + 2 * _BOX + _GAP - 18  # ranks of experts come from the same rules as ranks of tuning
    lines.append(_arrow(middle, 18 + 34 + _HIGH, middle, 18 + _ROW + 32, dashed=True))
    lines.append(_text(middle + 10, 18 + _ROW - 16, "the same rank rules", size=13, colour="#475569", anchor="start"))
    return "\n".join([*lines, "</svg>", ""])


def _row_of_steps(title: str, colour: str, steps: Sequence[tuple[str, str]], *, top: float) -> Iterator[str]:
    yield _text(_MARGIN, top + 18, title, size=17, colour=colour, anchor="start", weight=600)
    for index, (name, detail) in enumerate(steps):
        x, y = _MARGIN + index * (_BOX + _GAP), top + 34
        yield f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_HIGH}" rx="10" fill="{colour}12" stroke="{colour}" stroke-width="1.5"/>'
        yield _text(x + _BOX / 2, y + 32, name, size=17, colour="#0f172a", weight=600)
        yield _text(x + _BOX / 2, y + 55, detail, size=13, colour="#334155")
        if index:
            yield _arrow(x - _GAP + 3, y + _HIGH / 2, x - 3, y + _HIGH / 2)


def _text(x: float, y: float, text: str, *, size: int, colour: str, anchor: str = "middle", weight: int = 400) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{html.escape(text)}</text>'


def _arrow(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{x1:g},{y1:g} L{x2:g},{y2:g}" stroke="#475569" stroke-width="1.8"{dash} marker-end="url(#tip)"/>'


def draw_masks(case: Path, path: Path) -> Path:
    """Three planes of a segmented case: each mask a colour over the image, the names below.

    Args:
        case: folder of the case, as `medlore segment` writes it.
        path: the PNG.
    """
    image, codes = read_volume(case / "image.nii.gz"), read_volume(case / "prediction.nii.gz").array.astype(int)
    names = [str(name) for _, name in sorted((int(value), name) for value, name in read_json(case / "labels.json")["labels"].items())]
    box = bounding_box(image.array > 0)
    grey, codes = (array if box is None else box.apply(array) for array in (image.array, codes))
    bright = float(np.percentile(grey[grey > 0], 99.5))
    figure = Figure(figsize=(12.5, 5.3), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    colours = np.array([(0, 0, 0), *(label_colour(index) for index in range(len(names)))]) / 255
    for plot, axis in zip(figure.subplots(1, 3, width_ratios=_widths(grey.shape)), (0, 1, 2), strict=True):
        at = grey.shape[axis] // 2 if axis else round(grey.shape[0] * 0.62)  # beside the midline, where hippocampus and nuclei lie
        picture = np.clip(_plane(grey, axis, at) / bright, 0, 1)[..., None]
        plane = _plane(codes, axis, at)
        share = np.where(plane > 0, 0.55, 0.0)[..., None]
        plot.imshow((1 - share) * picture + share * colours[plane] * (0.35 + 0.65 * picture), origin="lower", interpolation="bilinear")
        for x, end in zip((0.0, 1.0), ("P", "A") if axis == 0 else ("L", "R"), strict=True):
            plot.text(x, 0.5, end, transform=plot.transAxes, color="#ffd24a", fontsize=12, ha="center", va="center")
        plot.set_axis_off()
    handles = [Patch(color=tuple(c / 255 for c in label_colour(index))) for index in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=12, frameon=False, labelcolor="white")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, facecolor="black", format="png")
    return path


def _plane(array: Array, axis: int, index: int) -> Any:
    """Rows up, columns across; the axes of the template are RAS."""
    return np.take(array, index, axis=axis).T


def _widths(shape: Sequence[int]) -> tuple[float, float, float]:
    return shape[1] / shape[2], shape[0] / shape[2], shape[0] / shape[1]


def photograph(page: Path, path: Path) -> Path:
    """A page in a headless Chromium, whose network is off.

    Raises:
        InputError: there is no Chromium.
    """
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        raise InputError("demo-page.png", "no Chromium on this machine", f"one of {', '.join(BROWSERS)}", "install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        shot = Path(profile) / "shot.png"
        command = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={PAGE_SIZE[0]},{PAGE_SIZE[1]}", "--virtual-time-budget=20000",
            f"--screenshot={shot}", page.resolve().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300)  # noqa: S603  # nosec B603 # a browser of this machine, and our own page
        with atomic_path(path) as temporary:
            shutil.copyfile(shot, temporary)
    return path


def make_pictures(demo: Path, out: Path) -> list[Path]:
    """All pictures.

    Args:
        demo: folder of a finished demo.
        out: folder of the pictures.

    Raises:
        InputError: the demo is not whole, there is no Chromium, or the pictures are larger than `MOST_BYTES` together.
    """
    for name in ("plan.json", "page.html", "template/prediction.nii.gz"):
        existing_file(demo / name, where="--demo")
    out.mkdir(parents=True, exist_ok=True)
    made = [
        draw_profile(RankPlan.load(demo / "plan.json"), out / "ranks.png"),
        draw_masks(demo / "template", out / "masks.png"),
        photograph(demo / "page.html", out / "demo-page.png"),
    ]
    made.append(write_text(out / "halves.svg", halves_svg()))
    size = sum(path.stat().st_size for path in made)
    if size > MOST_BYTES:
        raise InputError("--out", f"{size} bytes of pictures", f"at most {MOST_BYTES}", "draw them smaller")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m maintenance.pictures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of a finished demo")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    given = parser.parse_args(arguments)
    try:
        made = make_pictures(given.demo, given.out)
    except MedloreError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    for path in made:
        print(f"{path}: {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
