"""A loaded segmenter on a device: one volume and some labels in, masks on the volume's own grid out. No files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.geometry import Array, Crop, GridPath, Reorientation, Resampling, Shape
from medlore.data.volumes.intensity import rule_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import MaskRestorer, PackedMasks, Prepared, Resample, prepare
from medlore.data.volumes.training_cache import codes_on_grid
from medlore.data.volumes.window_grid import Start, WindowGrid
from medlore.data.volumes.windows import Rows, sliding_windows
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.ready import ready_for_cpu
from medlore.models.segmenter.vocabulary import WHOLE_BODY
from medlore.runs.hardware import FixedPrecision, Hardware
from medlore.segmenting.first_pass import FirstPass, first_pass_rules, in_their_halves, look_first
from medlore.segmenting.labels import Routes, facts_of_bundle, route_labels
from medlore.segmenting.parts import without_stray_parts
from medlore.segmenting.plan import CasePlan, Grid
from medlore.segmenting.planner import Choices, Planner
from medlore.segmenting.sweep import axis_order, path_in_order, prepared_in_order
from medlore.segmenting.tissues import TissuePass

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
        hardware: device, precision and memory, decided for the run.
        choices: windows and rules.
    """

    def __init__(self, bundle: SegmenterBundle, hardware: Hardware, choices: Choices | None = None) -> None:
        self.bundle, self.hardware = bundle, hardware
        self.facts = facts_of_bundle(bundle)
        self.planner = Planner(self.facts, hardware, choices or Choices())
        self._placed: tuple[str, Segmenter] | None = None
        self._first: SegmentingModel | None = None

    @property
    def device(self) -> str:
        """Where the network runs."""
        return self.hardware.device

    @property
    def precision(self) -> FixedPrecision:
        """Of the network."""
        return self.hardware.precision

    @property
    def published(self) -> bool:
        """Whether the published rules hold throughout."""
        return self.planner.choices.published

    @property
    def memory_bytes(self) -> int:
        """What may be used of the host's memory."""
        return self.hardware.memory_bytes

    def plan(self, volume: Volume, routes: Routes, *, orientation_code: str | None = None, grid: Grid = "original") -> CasePlan:
        """What `segment` will do with a volume: see `Planner.plan`."""
        return self.planner.plan(
            volume.shape,
            volume.affine,
            routes,
            where=str(volume.path),
            orientation_code=orientation_code,
            grid=grid,
            voxel_bytes=volume.array.itemsize,
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
        """Segment one volume: plan it and execute the plan.

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
        plan = self.plan(volume, routes, orientation_code=orientation_code, grid=grid)
        return self.execute(plan, volume, routes, resample=resample, on_window=on_window)

    def execute(
        self,
        plan: CasePlan,
        volume: Volume,
        routes: Routes,
        *,
        resample: Resample = "probability",
        on_window: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Do what a plan says, as it stands.

        Args:
            plan: from `plan`, for this volume and these routes.
            volume: from `read_volume`.
            routes: who answers for which label.
            resample: how masks return to the original grid.
            on_window: called with windows done and windows in all.

        Raises:
            DataError: nothing in the volume.
        """
        start = time.perf_counter()
        first = self._look_first(volume, routes)
        prepared = prepare(
            first.volume,
            routes.modality,  # type: ignore[arg-type]
            orientation_code=plan.rules.orientation_code,
            spacing_mm=plan.rules.spacing_mm,
            rule=rule_of(self.facts.preprocessing),
            published=self.published,
        )
        path = prepared.path if plan.grid == "original" else _network_grid(prepared.path)
        affine = None if plan.grid == "original" else path.affine
        order = axis_order(plan.axis)
        path, swept = path_in_order(path, order), prepared_in_order(prepared, order)
        result = Segmentation(volume, routes, plan, prepared, path.reorientation, affine)
        result.seconds["prepare"] = time.perf_counter() - start
        kept = TissuePass(plan.tissues, path.crop.new_shape)
        self._run(result, swept, path, resample, on_window, kept)
        if plan.tissues:
            _redraw(result, kept, swept, path)
        parts = {} if self.published else self.facts.preprocessing.get("parts", {}).get(routes.modality, {})
        result.masks |= {label: without_stray_parts(*result.masks[label], parts[label]) for label in result.masks if label in parts}
        frame = result.reorientation.apply if plan.grid == "original" else lambda half: codes_on_grid(half, prepared.path)
        result.masks = in_their_halves(result.masks, first.halves, frame)
        return result

    def _look_first(self, volume: Volume, routes: Routes) -> FirstPass:
        """The volume without what lies outside of the brain, where the pack names a first pass; else the volume as it is."""
        rules = None if self.published or routes.modality != "mri" else first_pass_rules(self.facts.preprocessing.get("first_pass"))
        if rules is None:
            return FirstPass(volume)
        if self._first is None:
            self._first = SegmentingModel(load_segmenter(rules.pack), self.hardware)
        finder = self._first

        def ask(whole: Volume, labels: Sequence[str]) -> dict[str, Array]:
            found = finder.segment(whole, labels, routes.modality)
            return {label: found.mask(label) for label in labels}

        return look_first(volume, rules, routes.labels, ask)

    def _run(
        self,
        result: Segmentation,
        prepared: Prepared,
        path: GridPath,
        resample: Resample,
        on_window: Callable[[int, int], None] | None,
        kept: TissuePass,
    ) -> None:
        plan, rules = result.plan, result.plan.rules
        order = axis_order(plan.axis)
        x, y, z = (rules.roi_size[axis] for axis in order)
        windows = WindowGrid(prepared.path.crop.new_shape, (x, y, z), rules.overlap)
        count = len(windows.windows())
        total, done = count * plan.passes, 0
        skip = _Emptiness(prepared, windows.roi_size)
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
                    clock.timed("network", self._predictor(network, queries, order)),
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

    def _predictor(self, network: Segmenter, queries: Tensor, order: Shape) -> Callable[[Tensor], Rows]:
        """Windows whose axes lie in `order` -> rows of logits in that order; the network sees them as it was trained."""
        channels = network.config.image_channels
        there, back = ((0, 1, *(2 + axis for axis in axes)) for axes in (order, np.argsort(order).tolist()))

        def predict(windows: Tensor) -> Rows:
            with torch.no_grad(), self._autocast():
                features = network.encode(windows.permute(back).contiguous().expand(-1, channels, -1, -1, -1))
                parts = [network.mask_embeddings(features, part) for part in queries.split(self.planner.choices.max_queries)]
            embeddings, pixels = torch.cat(parts, dim=1), features.pixels.permute(there)  # b n c, b c x y z

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


def _redraw(result: Segmentation, kept: TissuePass, prepared: Prepared, path: GridPath) -> None:
    """Put the redrawn tissues into the result; those that nobody asked for leave it."""
    started = time.perf_counter()
    redrawn = kept.masks(prepared, path, result.volume.array if result.affine is None else None)
    result.tissues = redrawn.record
    for index, label in enumerate(kept.tissues):
        own = result.masks.pop(label)
        if label in result.routes.labels:
            result.masks[label] = own if redrawn.masks is None else (redrawn.masks, index)
    result.seconds["tissues"] = time.perf_counter() - started


class _Emptiness:
    """Whether a window holds no body; counts those that do not."""

    def __init__(self, prepared: Prepared, roi_size: Shape) -> None:
        self.count = 0
        self._body, self._roi = prepared.body, roi_size

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
