"""A loaded segmenter on a device: one volume and some labels in, masks on the volume's own grid out. No files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medlore.data.volumes.geometry import Array, GridPath, Shape
from medlore.data.volumes.intensity import rule_of
from medlore.data.volumes.nifti import Volume
from medlore.data.volumes.preparation import MaskRestorer, PackedMasks, Prepared, Resample, prepare
from medlore.data.volumes.training_cache import codes_on_grid
from medlore.data.volumes.window_grid import WindowGrid
from medlore.data.volumes.windows import Rows, sliding_windows
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.network import Segmenter
from medlore.models.segmenter.ready import ready_for_cpu
from medlore.models.segmenter.vocabulary import WHOLE_BODY
from medlore.runs.hardware import FixedPrecision, Hardware
from medlore.segmenting.brain_mask import inside_brain, refuse_other_labels
from medlore.segmenting.evidence import verdict_of
from medlore.segmenting.expectations import expectations_of
from medlore.segmenting.first_pass import FirstPass, cut_to, first_pass_rules, in_their_halves, look_first
from medlore.segmenting.labels import Routes, facts_of_bundle, route_labels
from medlore.segmenting.pace import Clock, Emptiness
from medlore.segmenting.parts import without_stray_parts
from medlore.segmenting.plan import CasePlan, Grid
from medlore.segmenting.planner import Choices, Planner
from medlore.segmenting.second_opinions import second_opinions, staying
from medlore.segmenting.segmentation import Segmentation
from medlore.segmenting.sweep import axis_order, path_in_order, prepared_in_order
from medlore.segmenting.tissues import TissuePass
from medlore.segmenting.watch import Keeping, ProbabilityWatch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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

    def segment(  # noqa: PLR0913 - each is a choice of the command
        self,
        volume: Volume,
        labels: Sequence[str],
        modality: str,
        *,
        routes: Routes | None = None,
        orientation_code: str | None = None,
        grid: Grid = "original",
        resample: Resample = "probability",
        brain: Array | None = None,
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
            brain: Boolean x y z of the volume's grid: everything of the brain is looked for inside it.
            on_window: called with windows done and windows in all.

        Raises:
            InputError: unknown labels, or more than fits the memory.
            DataError: nothing in the volume.
        """
        routes = routes or route_labels(self.facts, labels, modality)
        plan = self.plan(volume, routes, orientation_code=orientation_code, grid=grid)
        return self.execute(plan, volume, routes, resample=resample, brain=brain, on_window=on_window)

    def execute(
        self,
        plan: CasePlan,
        volume: Volume,
        routes: Routes,
        *,
        resample: Resample = "probability",
        brain: Array | None = None,
        on_window: Callable[[int, int], None] | None = None,
    ) -> Segmentation:
        """Do what a plan says, as it stands.

        Args:
            plan: from `plan`, for this volume and these routes.
            volume: from `read_volume`.
            routes: who answers for which label.
            resample: how masks return to the original grid.
            brain: Boolean x y z of the volume's grid: everything of the brain is looked for inside it.
            on_window: called with windows done and windows in all.

        Raises:
            InputError: a brain, and labels that lie outside of it.
            DataError: nothing in the volume.
        """
        start = time.perf_counter()
        if brain is not None:
            refuse_other_labels(self.facts, routes)
        first = self._look_first(volume if brain is None else inside_brain(volume, brain, routes.modality), routes)
        prepared = prepare(
            first.volume,
            routes.modality,  # type: ignore[arg-type]
            orientation_code=plan.rules.orientation_code,
            spacing_mm=plan.rules.spacing_mm,
            rule=rule_of(self.facts.preprocessing),
            published=self.published,
        )
        path = prepared.path if plan.grid == "original" else staying(prepared.path, prepared.path.crop.new_shape)
        affine = None if plan.grid == "original" else path.affine
        order = axis_order(plan.axis)
        path, swept = path_in_order(path, order), prepared_in_order(prepared, order)
        result = Segmentation(volume, routes, plan, prepared, path, affine)
        result.seconds["prepare"] = time.perf_counter() - start
        kept, watch = TissuePass(plan.tissues, path.crop.new_shape), self._watch(plan, routes, path)
        self._run(result, swept, path, resample, on_window, (kept, watch))
        if plan.tissues:
            _redraw(result, kept, swept, path)
        before = {label: packed.counts[index] for label, (packed, index) in result.masks.items()}
        parts = {} if self.published else self.facts.preprocessing.get("parts", {}).get(routes.modality, {})
        result.masks |= {label: without_stray_parts(*result.masks[label], parts[label]) for label in result.masks if label in parts}
        dropped = {label: float(before[label] - result.voxels(label)) * result.voxel_ml() for label in parts if label in result.masks}

        def framed(mask: Array) -> Array:
            return result.reorientation.apply(mask if plan.grid == "original" else codes_on_grid(mask, prepared.path))

        result.masks = in_their_halves(result.masks, first.halves, framed)
        if brain is not None:
            result.masks = {label: cut_to(*held, framed(brain)) for label, held in result.masks.items()}
        result.brain = first.brain if first.brain is None or plan.grid == "original" else codes_on_grid(first.brain, prepared.path)
        result.maps = watch
        around = brain if brain is not None else first.brain
        self._judge(result, swept, dropped, None if around is None else framed(around))
        result.masks = {label: result.masks[label] for label in routes.labels}
        return result

    def _watch(self, plan: CasePlan, routes: Routes, path: GridPath) -> ProbabilityWatch:
        """Keeps of the probabilities what the plan says."""
        extras = plan.extras
        keeping = Keeping(extras.check != "none", extras.check == "thorough", extras.probabilities, extras.uncertainty)
        threshold = float(self.facts.preprocessing.get("threshold", 0.5))
        return ProbabilityWatch(routes.labels, path.crop.new_shape, keeping, threshold=threshold)

    def _judge(self, result: Segmentation, swept: Prepared, dropped_ml: Mapping[str, float], brain: Array | None) -> None:
        """Put the verdict into the result.

        Args:
            result: with all masks, those too that were asked beside the labels.
            swept: the volume with its axes in the order of the windows.
            dropped_ml: label -> stray parts that were dropped.
            brain: what everything lies inside, in the frame of the masks.
        """
        started = time.perf_counter()
        if result.plan.extras.check == "none":
            return

        def again(prepared: Prepared, path: GridPath) -> dict[str, tuple[PackedMasks, int]]:
            other = replace(result, masks={}, seconds={})
            self._run(other, prepared, path, "probability", None, ())
            return other.masks

        agreement = second_opinions(result, swept, again)
        expected = expectations_of(self.facts.preprocessing, result.routes.modality)
        result.verdict = verdict_of(result, expected, brain=brain, dropped_ml=dropped_ml, agreement=agreement)
        result.seconds["checks"] = time.perf_counter() - started

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
        keepers: Sequence[TissuePass | ProbabilityWatch],
    ) -> None:
        plan, rules = result.plan, result.plan.rules
        order = axis_order(plan.axis)
        x, y, z = (rules.roi_size[axis] for axis in order)
        windows = WindowGrid(prepared.path.crop.new_shape, (x, y, z), rules.overlap)
        count = len(windows.windows())
        total, done = count * plan.passes, 0
        skip = Emptiness(prepared, windows.roi_size)
        clock = Clock()
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
                        for keeper in keepers:
                            keeper.keep(group, slab.start, slab.probability)
                    del slab  # as large as the band: it must not rest beside the maps of the next windows
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


def _copy_to(network: Segmenter, device: str) -> Segmenter:
    """A copy on another device; the bundle's own stays where it is."""
    import copy

    return copy.deepcopy(network).to(device)
