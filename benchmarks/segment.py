"""Segmenting: blending windows, a whole case, and volume files, each against the published way (time and peak memory).

Every variant runs in a process of its own, in turn, several times; medians of seconds and of peak memory beyond the start
are compared. `python -m benchmarks.segment [stitching|whole|volumes] [--repeats N] [--scale S]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LABELS = 16
_KEPT = tempfile.TemporaryDirectory()  # experts are read from their pack when they are used


# -- stitching: logits of 16 labels, a long volume -----------------------------------------------------------------------


def _stitching_sizes(scale: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    return (int(1056 * scale), 96, 96), (96, 96, 96)


def _logits(roi: tuple[int, int, int]) -> Any:
    import torch

    return torch.randn((1, LABELS, *roi), generator=torch.Generator().manual_seed(0)) * 3


def stitching_published(scale: float) -> Any:
    import torch

    from medlore.data.volumes.window_grid import WindowGrid
    from medlore.data.volumes.windows import published_weights

    shape, roi = _stitching_sizes(scale)
    logits, weights = _logits(roi), published_weights(roi)
    sums, totals = torch.zeros(LABELS, *shape), torch.zeros(LABELS, *shape)
    for x, y, z in WindowGrid(shape, roi).windows():
        box = (slice(None), slice(x, x + roi[0]), slice(y, y + roi[1]), slice(z, z + roi[2]))
        sums[box] += torch.sigmoid(logits)[0] * weights
        totals[box] += weights
    return np.packbits(((sums / totals) > 0.5).float().numpy() > 0)


def stitching_monai(scale: float) -> Any:
    import torch
    from monai.inferers import sliding_window_inference

    shape, roi = _stitching_sizes(scale)
    logits = _logits(roi)
    out = sliding_window_inference(torch.zeros(1, 1, *shape), roi, 1, lambda w: torch.sigmoid(logits), overlap=0.5, mode="gaussian")
    return np.packbits((out[0] > 0.5).numpy())


def stitching_medlore(scale: float, *, published: bool = False) -> Any:
    import torch

    from medlore.data.volumes.window_grid import WindowGrid
    from medlore.data.volumes.windows import sliding_windows

    shape, roi = _stitching_sizes(scale)
    logits = _logits(roi)
    masks = np.zeros((LABELS, *shape[:2], shape[2] // 8), np.uint8)
    grid = WindowGrid(shape, roi)
    for slab in sliding_windows(torch.zeros(1, *shape), lambda w: logits, grid, labels=LABELS, published=published):
        masks[:, slab.start : slab.start + slab.probability.shape[1]] = np.packbits((slab.probability > 0.5).numpy(), axis=-1)
    return masks.ravel()


def stitching_medlore_published(scale: float) -> Any:
    return stitching_medlore(scale, published=True)


# -- a whole case: four labels, LoRKD-Nano scaled down, experts formed for every window or merged once --------------------


def _small_pack(folder: Path) -> Path:
    import importlib.util

    from medlore.models.segmenter.network import SegmenterConfig

    path = Path(__file__).resolve().parents[1] / "tests" / "small_segmenter.py"
    spec = importlib.util.spec_from_file_location("small_segmenter", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sizes = SegmenterConfig(
        (16, 32, 64, 128, 256), strides=(1, 2, 2, 2, 2), patch=16, query_width=96, heads=8, projection_width=96, mask_width=64,
        feedforward=128, decoder_layers=2,
    )  # fmt: skip
    return module.write_small_pack(folder / "pack", roi_size=(48, 48, 32), sizes=sizes)


def _phantom(folder: Path, scale: float) -> Path:
    import nibabel as nib

    rng = np.random.default_rng(0)
    shape = (int(112 * scale), 80, 64)
    array = np.full(shape, -1000, np.int16)
    array[8:-8, 8:-8, 4:-4] = rng.normal(40, 60, (shape[0] - 16, 64, 56))
    nib.save(nib.Nifti1Image(array, np.diag([-0.9, -0.9, 1.5, 1])), folder / "ct.nii.gz")
    return folder / "ct.nii.gz"


_ASKED = ("liver", "spleen", "pancreas", "gallbladder")


def whole_published(scale: float) -> Any:
    """Plain: the kernels of all experts formed and mixed by a one-hot for every window; whole arrays; no merging."""
    import torch

    from medlore.data.volumes.nifti import read_nifti
    from medlore.data.volumes.preparation import prepare
    from medlore.data.volumes.window_grid import WindowGrid
    from medlore.data.volumes.windows import published_weights
    from medlore.models.segmenter.bundle import load_segmenter

    bundle = load_segmenter(_small_pack(Path(_KEPT.name)))
    volume = read_nifti(_phantom(Path(_KEPT.name), scale))
    start, used = time.perf_counter(), time.process_time()
    prepared = prepare(volume, "ct", published=True)
    queries = bundle.queries(_ASKED, "ct")
    grid = WindowGrid(prepared.path.crop.new_shape, tuple(bundle.preprocessing["roi_size"]))
    size = [max(n, r) for n, r in zip(grid.shape, grid.roi_size, strict=True)]
    pixels = torch.zeros(1, *size)
    pixels[(slice(None), *(slice(0, n) for n in grid.shape))] = prepared.pixels
    weights = published_weights(grid.roi_size)
    sums, totals = torch.zeros(len(_ASKED), *size), torch.zeros(len(_ASKED), *size)
    experts = list(bundle.weights.experts)
    network = bundle.network(experts[0])
    for corner in grid.windows():
        box = (slice(None), *(slice(a, a + r) for a, r in zip(corner, grid.roi_size, strict=True)))
        states = [bundle.weights.merged(region) for region in (*experts, *experts)]  # eight experts, as published
        chosen = {k: sum((state[k] * float(i == 0) for i, state in enumerate(states)), torch.zeros(())) for k in states[0]}
        network.load_state_dict(chosen, assign=True)
        with torch.no_grad():
            sums[box] += torch.sigmoid(network(pixels[box][None].expand(-1, 3, -1, -1, -1), queries))[0] * weights
        totals[box] += weights
    masks = ((sums / totals) > 0.5).float()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - used,
        "masks": np.packbits(masks[(slice(None), *(slice(0, n) for n in grid.shape))].numpy() > 0),
    }


def _whole(scale: float, **options: Any) -> Any:
    from medlore.data.volumes.nifti import read_nifti
    from medlore.models.segmenter.bundle import load_segmenter
    from medlore.runs.hardware import decide_hardware
    from medlore.segmenting.model import SegmentingModel
    from medlore.segmenting.planner import Choices

    grid = options.pop("grid", "original")
    bundle = load_segmenter(_small_pack(Path(_KEPT.name)))
    volume = read_nifti(_phantom(Path(_KEPT.name), scale))
    start, used = time.perf_counter(), time.process_time()
    work = "published" if options.get("published") else "inference"
    hardware = decide_hardware("cpu", options.pop("precision", "auto"), work=work)
    result = SegmentingModel(bundle, hardware, Choices(**options)).segment(volume, _ASKED, "ct", grid=grid)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    masks = np.packbits(np.stack([result.mask(label) for label in _ASKED]))
    return {"seconds": seconds, "cpu": cpu, "masks": masks, "phases": result.seconds, "windows": result.windows}


def whole_medlore_fp32(scale: float) -> Any:
    return _whole(scale, precision="fp32")


def whole_medlore_default(scale: float) -> Any:
    return _whole(scale)


def whole_medlore_published_rules(scale: float) -> Any:
    return _whole(scale, precision="fp32", published=True, grid="processed")


def whole_medlore_published_on_image_grid(scale: float) -> Any:
    return _whole(scale, precision="fp32", published=True)


# -- volume files: 512 x 512 x 300, ten labels ----------------------------------------------------------------------------


def _ct_file(scale: float) -> Path:
    path = Path(tempfile.gettempdir()) / f"medlore-bench-{scale}.nii.gz"
    if not path.exists():
        import nibabel as nib
        from scipy import ndimage

        shape = (int(512 * scale), int(512 * scale), int(300 * scale))
        rng = np.random.default_rng(0)
        coarse = rng.normal(0, 300, tuple(-(-n // 16) for n in shape)).astype(np.float32)
        array = ndimage.zoom(coarse, 16, order=1)[tuple(slice(0, n) for n in shape)].astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([-0.8, -0.8, 1.5, 1])), path)
    return path


def _ten_masks(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    return [tuple(slice(int(n * (0.05 + 0.07 * i)), int(n * (0.25 + 0.07 * i))) for n in shape) for i in range(10)]


def volumes_published(scale: float, *, back: bool = False) -> Any:
    """Load as float64, resample with MONAI, write float masks and their sum with nibabel; brought back only on request."""
    import nibabel as nib
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing
    from scipy import ndimage

    path = _ct_file(scale)
    start, used = time.perf_counter(), time.process_time()
    image = nib.load(path)
    tensor = MetaTensor(image.get_fdata()[None].astype(np.float32), affine=image.affine)
    grey = Spacing((1, 1, 3), mode="bilinear")(Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(tensor))[0].numpy()
    with tempfile.TemporaryDirectory() as name:
        total = np.zeros(grey.shape)
        for index, box in enumerate(_ten_masks(grey.shape)):
            mask = np.zeros(grey.shape, np.float32)
            mask[box] = 1
            if back:
                mask = ndimage.affine_transform(mask, [0.8, 0.8, 0.5], output_shape=image.shape, order=0)[::-1, ::-1]
            total = total + mask * (index + 1) if total.shape == mask.shape else mask.astype(float)
            nib.save(nib.Nifti1Image(mask, np.eye(4)), Path(name) / f"{index}.nii.gz")
        nib.save(nib.Nifti1Image(total, np.eye(4)), Path(name) / "all.nii.gz")
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def volumes_published_and_back(scale: float) -> Any:
    """The same with the masks taken back to the image's grid (nearest neighbour), as every user of it must do."""
    return volumes_published(scale, back=True)


def volumes_medlore(scale: float) -> Any:
    """Load, resample, bring ten probability maps back to the file's grid, write ten masks and the label map there."""
    import torch

    from medlore.data.volumes.nifti import read_nifti, write_nifti
    from medlore.data.volumes.preparation import MaskRestorer, prepare

    path = _ct_file(scale)
    start, used = time.perf_counter(), time.process_time()
    volume = read_nifti(path)
    prepared = prepare(volume, "ct")
    shape = prepared.path.crop.new_shape
    restorer = MaskRestorer(prepared.path, 10)
    boxes = _ten_masks(shape)
    making = making_cpu = 0.0  # the slabs are the network's work, not this benchmark's
    for x in range(0, shape[0], 48):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        slab = torch.zeros(10, min(48, shape[0] - x), *shape[1:], dtype=torch.float16)
        for label, box in enumerate(boxes):
            first, last = max(box[0].start - x, 0), max(min(box[0].stop - x, slab.shape[1]), 0)
            slab[label, first:last, box[1], box[2]] = 1
        making += time.perf_counter() - begun
        making_cpu += time.process_time() - begun_cpu
        restorer.add(x, slab)
    turn = prepared.path.reorientation
    values, labels = (np.zeros(volume.shape, np.uint8, order="F") for _ in range(2))
    view, label_view = turn.apply(values), turn.apply(labels)
    with tempfile.TemporaryDirectory() as name:
        for label in range(10):
            crop, mask = restorer.masks.boxed(label) or (None, None)
            if crop is not None and mask is not None:
                crop.apply(view)[...] = mask
                np.copyto(crop.apply(label_view), label + 1, where=mask)
                write_nifti(Path(name) / f"{label}.nii.gz", values, volume)
                crop.apply(view)[...] = 0
        write_nifti(Path(name) / "all.nii.gz", labels, volume)
    return {"seconds": time.perf_counter() - start - making, "cpu": time.process_time() - used - making_cpu}


# -- running ----------------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, list[Callable[[float], Any]]] = {
    "stitching": [stitching_published, stitching_monai, stitching_medlore_published, stitching_medlore],
    "whole": [
        whole_published, whole_medlore_published_rules, whole_medlore_published_on_image_grid, whole_medlore_fp32, whole_medlore_default,
    ],
    "volumes": [volumes_published, volumes_published_and_back, volumes_medlore],
}  # fmt: skip


def _measure(function: Callable[[float], Any], scale: float, keep: str) -> None:
    """In a process of its own: warm the imports, then time one call and watch the resident memory."""
    function(0.12 if function.__name__.startswith("stitching") else 0.2)
    peak, stop = [_resident()], threading.Event()
    before = peak[0]

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    result = function(scale)
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    stop.set()
    watcher.join()
    record: dict[str, Any] = result if isinstance(result, dict) else {"masks": result}
    if "masks" in record:
        np.save(keep, record.pop("masks"))
    print(json.dumps({"wall": record.pop("seconds", seconds), "cpu": record.pop("cpu", cpu), "bytes": peak[0] - before, **record}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(name: str, *, repeats: int, scale: float) -> None:
    functions = BENCHMARKS[name]
    results: dict[str, list[dict[str, Any]]] = {f.__name__: [] for f in functions}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for f in functions:
                keep = str(Path(folder) / f"{f.__name__}.npy")
                command = [sys.executable, "-m", "benchmarks.segment", "--one", f.__name__, "--scale", str(scale), "--keep", keep]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[f.__name__].append(json.loads(done.stdout.splitlines()[-1]))
        base = {key: statistics.median(r[key] for r in results[functions[0].__name__]) for key in ("wall", "cpu", "bytes")}
        print(f"== {name} (scale {scale}, {repeats} repeats, medians; x = times better than {functions[0].__name__})")
        for f in functions:
            got = {key: statistics.median(r[key] for r in results[f.__name__]) for key in ("wall", "cpu", "bytes")}
            print(
                f"{f.__name__:46s} {got['cpu']:7.2f} s cpu ({base['cpu'] / got['cpu']:4.1f}x)  {got['wall']:7.2f} s wall "
                f"({base['wall'] / got['wall']:4.1f}x)  {got['bytes'] / 2**20:7.0f} MiB ({base['bytes'] / got['bytes']:4.1f}x)"
            )
            if "phases" in results[f.__name__][-1]:
                print("    " + ", ".join(f"{k} {v:.2f} s" for k, v in results[f.__name__][-1]["phases"].items()))
        _print_differences(Path(folder), functions)


def _print_differences(folder: Path, functions: list[Callable[[float], Any]]) -> None:
    """Share of voxels in which masks differ from the published way's, or from the published rules on the same grid."""
    found = {f.__name__: np.load(folder / f"{f.__name__}.npy") for f in functions if (folder / f"{f.__name__}.npy").exists()}
    names = list(found)
    for index, name in enumerate(names[1:], start=1):
        alike = [other for other in names[:index] if found[other].shape == found[name].shape]
        for other in dict.fromkeys([*alike[:1], *alike[-1:]]):  # the reference, and the variant one step before
            share = np.unpackbits(found[name] ^ found[other]).mean()
            print(f"    {name}: {share:.2e} of the voxels differ from {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], choices=[[], *BENCHMARKS])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--one")
    parser.add_argument("--keep", default="")
    arguments = parser.parse_args(sys.argv[1:] if sys.argv[0].endswith("segment.py") else [])
    if arguments.one:
        function = next(f for functions in BENCHMARKS.values() for f in functions if f.__name__ == arguments.one)
        _measure(function, arguments.scale, arguments.keep)
        return
    for name in arguments.names or BENCHMARKS:
        run(name, repeats=arguments.repeats, scale=arguments.scale)


if __name__ == "__main__":
    main()
