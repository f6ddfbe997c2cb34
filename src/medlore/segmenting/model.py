"""A loaded segmenter on a device: one volume and some labels in, masks on the volume's own grid out. No files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.geometry import Array, Crop, GridPath, Reorientation, Resampling
from medlore.data.volumes.intensity import rule_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import MaskRestorer, PackedMasks, Prepared, Resample, prepare
from medlore.data.volumes.training_cache import codes_on_grid
from medlore.data.volumes.window_grid import Start, WindowGrid
from medlore.data.volumes.windows import Rows, sliding_windows
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.unet3d_inference import ready_for_cpu
from medlore.models.segmenter.vocabulary import WHOLE_BODY
from medlore.segmenting.first_pass import FirstPass, first_pass_rules, in_their_halves, look_first
from medlore.segmenting.labels import ModelFacts, Routes, facts_of_bundle, route_labels, tissues_of, with_tissues
from medlore.segmenting.parts import without_stray_parts
from medlore.segmenting.plan import CasePlan, WindowRules, available_memory, plan_case, usable
from medlore.segmenting.rules import window_rules
from medlore.segmenting.tissues import TissuePass

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Grid = Literal["original", "processed"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EMPTY_SHARE = 1e-4  # a window with fewer voxels of body than this share is skipped


@dataclass(eq=False)
class Segmentation:
    """The masks of one volume.

    Args:
        volume: what was segmented.
        routes: labels, in the order of the label map's values, and who answered for them.
        plan: what it was expected to cost.
        prepared: the record of the way to the network.
        reorientation: from the output grid to the frame in which the masks are held.
        affine: of the output grid; None for the volume's own.
        masks: label -> packed masks and its index in them.
        windows: gone through, all passes together.
        skipped: of them, without body.
        seconds: where the time went.
        tissues: how the borders of tissues were redrawn, for `case.json`; None where none were.
    """

    volume: Volume
    routes: Routes
    plan: CasePlan
    prepared: Prepared
    reorientation: Reorientation
    affine: Array | None
    masks: dict[str, tuple[PackedMasks, int]] = field(default_factory=dict)
    windows: int = 0
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    tissues: dict[str, Any] | None = None

    def voxels(self, label: str) -> int:
        """Number of voxels of a label."""
        packed, index = self.masks[label]
        return int(packed.counts[index])

    def boxed(self, label: str) -> tuple[Crop, Array] | None:
        """The box of a label, in the reoriented frame, and the mask in it; None where it is empty."""
        packed, index = self.masks[label]
        return packed.boxed(index)

    def mask(self, label: str) -> Array:
        """The mask of a label on the output grid, Boolean."""
        packed, index = self.masks[label]
        return self.reorientation.undo(packed.whole(index))

    def voxel_ml(self) -> float:
        """Volume of one voxel of the output grid in millilitres."""
        affine = self.volume.affine if self.affine is None else self.affine
        return float(abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1000)


class SegmentingModel:
    """A segmenter on a device.

    Args:
        bundle: from `load_segmenter`.
        device: cpu, cuda or mps.
        precision: of the network; `auto` is bf16 on a CPU with bf16 instructions and on a GPU, else fp32.
        roi_size: windows of another size than the model's own.
        overlap: of the windows; the model's own unless given.
        sw_batch_size: windows at a time.
        max_queries: prompts decoded at a time.
        memory_bytes: what may be used; four fifths of what is free unless given.
        published: the published rules throughout.
        redraw_tissues: redraw the borders of tissues by grey values where the model's preprocessing names tissues.
    """

    def __init__(  # noqa: PLR0913 - each is a flag of the command
        self,
        bundle: SegmenterBundle,
        *,
        device: str = "cpu",
        precision: Precision = "auto",
        roi_size: Sequence[int] | None = None,
        overlap: float | None = None,
        sw_batch_size: int = 1,
        max_queries: int = 256,
        memory_bytes: int | None = None,
        published: bool = False,
        redraw_tissues: bool = True,
    ) -> None:
        self.redraw_tissues = redraw_tissues and not published
        self.bundle, self.device, self.published = bundle, device, published
        self.facts: ModelFacts = facts_of_bundle(bundle)
        self.precision = choose_precision(precision, device, published=published)
        self.max_queries, self.memory_bytes = max_queries, memory_bytes
        self._batch, self._roi, self._overlap = sw_batch_size, roi_size, overlap
        self._placed: tuple[str, Segmenter] | None = None
        self._first: SegmentingModel | None = None

    def rules(self, modality: str, orientation_code: str | None = None) -> WindowRules:
        """Windows and grid of this model for a modality."""
        return window_rules(
            self.facts,
            modality,
            roi_size=self._roi,
            overlap=self._overlap,
            sw_batch_size=self._batch,
            orientation_code=orientation_code,
            half=self.precision != "fp32",
            published=self.published,
        )

    def segment(
        self,
        volume: Volume,
        labels: Sequence[str],
        modality: str,
        *,
        routes: Routes | None = None,
        orientation_code: str | None = None,
        grid: Grid = "original",
        resample: Resample = "probability",
        on_window: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Segment one volume.

        Args:
            volume: from `read_volume`.
            labels: names, a region's name, or `all`.
            modality: any usual word.
            routes: who answers, if that was chosen before.
            orientation_code: in which the network sees the volume.
            grid: `original` for the grid of the volume, `processed` for the network's.
            resample: how masks return to the original grid.
            on_window: called with windows done and windows in all.

        Raises:
            InputError: unknown labels, or more than fits the memory.
            DataError: nothing in the volume.
        """
        routes = routes or route_labels(self.facts, labels, modality)
        rules = self.rules(routes.modality, orientation_code)
        tissues = tissues_of(self.facts, routes) if self.redraw_tissues else ()
        plan = plan_case(
            volume.shape,
            volume.affine,
            with_tissues(routes, tissues),
            self.facts.size,
            rules,
            memory_bytes=self.memory_bytes or available_memory(),
            where=str(volume.path),
            device_memory_bytes=device_memory(self.device),
            tissues=len(tissues),
        )
        start = time.perf_counter()
        first = self._look_first(volume, routes)
        prepared = prepare(
            first.volume,
            routes.modality,  # type: ignore[arg-type]
            orientation_code=rules.orientation_code,
            spacing_mm=rules.spacing_mm,
            rule=rule_of(self.facts.preprocessing),
            published=self.published,
        )
        path = prepared.path if grid == "original" else _network_grid(prepared.path)
        affine = None if grid == "original" else path.affine
        result = Segmentation(volume, routes, plan, prepared, path.reorientation, affine)
        result.seconds["prepare"] = time.perf_counter() - start
        kept = TissuePass(tissues, path.crop.new_shape)
        self._run(result, rules, path, resample, on_window, kept)
        if tissues:
            _redraw(result, kept, path)
        parts = {} if self.published else self.facts.preprocessing.get("parts", {}).get(routes.modality, {})
        result.masks |= {label: without_stray_parts(*result.masks[label], parts[label]) for label in result.masks if label in parts}
        frame = result.reorientation.apply if grid == "original" else lambda half: codes_on_grid(half, prepared.path)
        result.masks = in_their_halves(result.masks, first.halves, frame)
        return result

    def _look_first(self, volume: Volume, routes: Routes) -> FirstPass:
        """The volume without what lies outside of the brain, where the pack names a first pass; else the volume as it is."""
        rules = None if self.published or routes.modality != "mri" else first_pass_rules(self.facts.preprocessing.get("first_pass"))
        if rules is None:
            return FirstPass(volume)
        if self._first is None:
            self._first = SegmentingModel(load_segmenter(rules.pack), device=self.device, precision=self.precision)
        finder = self._first

        def ask(whole: Volume, labels: Sequence[str]) -> dict[str, Array]:
            found = finder.segment(whole, labels, routes.modality)
            return {label: found.mask(label) for label in labels}

        return look_first(volume, rules, routes.labels, ask)

    def _run(
        self,
        result: Segmentation,
        rules: WindowRules,
        path: GridPath,
        resample: Resample,
        on_window: Callable[[int, int], None] | None,
        kept: TissuePass,
    ) -> None:
        prepared, plan = result.prepared, result.plan
        shape = prepared.path.crop.new_shape
        windows = WindowGrid(shape, rules.roi_size, rules.overlap)
        count = len(windows.windows())
        total, done = count * plan.passes, 0
        skip = _Emptiness(prepared, rules)
        clock = _Clock()
        started = time.perf_counter()
        threshold = float(self.facts.preprocessing.get("threshold", 0.5))
        for region, groups in plan.groups.items():
            network = self._network(region)
            for group in groups:
                restorer = MaskRestorer(path, len(group), resample=resample, threshold=threshold)
                queries = self.bundle.queries(group, result.routes.modality).to(self.device)
                before = done
                slabs = sliding_windows(
                    prepared.pixels,
                    clock.timed("network", self._predictor(network, queries)),
                    windows,
                    labels=len(group),
                    sw_batch_size=rules.sw_batch_size,
                    padding_value=0.0 if self.published else prepared.intensity.air,
                    skip=None if self.published else skip,
                    published=self.published,
                    device=self.device,
                    on_window=None if on_window is None else lambda n, b=before: on_window(b + n, total),  # type: ignore[misc]
                )
                for slab in slabs:
                    with clock.section("restore"):
                        restorer.add(slab.start, slab.probability)
                        kept.keep(group, slab.start, slab.probability)
                result.masks |= {label: (restorer.masks, index) for index, label in enumerate(group)}
                done += count
        result.windows, result.skipped = total, skip.count
        both = time.perf_counter() - started
        result.seconds |= {**clock.seconds, "blend": both - sum(clock.seconds.values())}

    def _network(self, region: str) -> Segmenter:
        """The network of one region on the device; only the last one stays there."""
        if self._placed is None or self._placed[0] != region:
            has_expert = region in self.facts.experts or region == self.bundle.region
            key = region if has_expert else (WHOLE_BODY if self.facts.experts else None)
            network = self.bundle.network(key)
            if self.device != "cpu":
                network = _copy_to(network, self.device)
            elif not self.published:
                network = ready_for_cpu(network, _TYPES.get(self.precision, torch.float32))
            self._placed = (region, network)
        return self._placed[1]

    def _predictor(self, network: Segmenter, queries: Tensor) -> Callable[[Tensor], Rows]:
        channels = network.config.image_channels

        def predict(windows: Tensor) -> Rows:
            with torch.no_grad(), self._autocast():
                features = network.encode(windows.expand(-1, channels, -1, -1, -1))
                parts = [network.mask_embeddings(features, part) for part in queries.split(self.max_queries)]
            embeddings, pixels = torch.cat(parts, dim=1), features.pixels  # b n c, b c x y z

            def rows(index: int, first: int, last: int) -> Tensor:
                block = pixels[index, :, first:last]
                channels_last = block.stride(0) == 1
                flat = block.permute(1, 2, 3, 0).reshape(-1, len(block)).T if channels_last else block.flatten(1)  # c voxels, no copy
                kind = flat.dtype if self.published else torch.float32
                logits = embeddings[index].to(kind) @ flat.to(kind)
                return logits.view(-1, *block.shape[1:])

            return rows

        return predict

    def _autocast(self) -> Any:
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device, dtype=_TYPES[self.precision])


def _redraw(result: Segmentation, kept: TissuePass, path: GridPath) -> None:
    """Put the redrawn tissues into the result; those that nobody asked for leave it."""
    started = time.perf_counter()
    redrawn = kept.masks(result.prepared, path, result.volume.array if result.affine is None else None)
    result.tissues = redrawn.record
    for index, label in enumerate(kept.tissues):
        own = result.masks.pop(label)
        if label in result.routes.labels:
            result.masks[label] = own if redrawn.masks is None else (redrawn.masks, index)
    result.seconds["tissues"] = time.perf_counter() - started


def choose_precision(precision: Precision, device: str, *, published: bool = False) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means here: fp16 on CUDA for the published rules, bf16 where the hardware multiplies it, else fp32."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "fp16" if published or not torch.cuda.is_bf16_supported() else "bf16"
    from medlore.inspecting.doctor import cpu_has_bfloat16

    return "bf16" if device == "cpu" and not published and cpu_has_bfloat16() else "fp32"


def device_memory(device: str) -> int | None:
    """Bytes that may be used on a GPU of its own memory; None for the processor and for MPS, which shares the host's."""
    return usable(torch.cuda.mem_get_info()[0]) if device.startswith("cuda") else None


class _Emptiness:
    """Whether a window holds no body; counts those that do not."""

    def __init__(self, prepared: Prepared, rules: WindowRules) -> None:
        self.count = 0
        self._body, self._roi = prepared.body, rules.roi_size

    def __call__(self, start: Start) -> bool:
        if self._body is None:
            return False
        part = self._body[tuple(slice(a, a + size) for a, size in zip(start, self._roi, strict=True))]
        empty = bool(np.count_nonzero(part) < _EMPTY_SHARE * part.size)
        self.count += empty
        return empty


class _Clock:
    """Seconds by section."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def section(self, name: str) -> _Clock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + time.perf_counter() - self._start

    def timed(self, name: str, function: Callable[[Tensor], Rows]) -> Callable[[Tensor], Rows]:
        def timed(windows: Tensor) -> Rows:
            with self.section(name):
                return function(windows)

        return timed


def _network_grid(path: GridPath) -> GridPath:
    """The identity on the network's cropped grid."""
    shape = path.crop.new_shape
    stay = Reorientation((0, 1, 2), (False, False, False), shape)
    return GridPath(path.network_affine, stay, Resampling(shape, shape, (1.0, 1.0, 1.0)), Crop((0, 0, 0), shape))


def _copy_to(network: Segmenter, device: str) -> Segmenter:
    """A copy on another device; the bundle's own stays where it is."""
    import copy

    return copy.deepcopy(network).to(device)
