"""The plan of a case, made once: from a header for a dry run, from a volume for a run that executes that very plan (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medlore.data.volumes.geometry import Array, Shape
from medlore.runs.hardware import Hardware
from medlore.segmenting.expectations import CheckLevel, expectations_of
from medlore.segmenting.labels import ModelFacts, Routes, asked_beside, label_around, tissues_of, with_tissues
from medlore.segmenting.plan import CasePlan, Extras, Grid, WindowRules, plan_case
from medlore.segmenting.rules import window_rules


@dataclass(frozen=True)
class Choices:
    """What a user may choose about the windows.

    Args:
        roi_size: windows of another size than the model's own.
        overlap: of the windows; the model's own unless given.
        sw_batch_size: windows at a time.
        max_queries: prompts decoded at a time.
        published: the published rules throughout.
        redraw_tissues: redraw the borders of tissues by grey values where the model's preprocessing names tissues.
        check: how closely the masks are looked at.
        probabilities: keep the probability of each label.
        uncertainty: keep the entropy of every voxel.
    """

    roi_size: Sequence[int] | None = None
    overlap: float | None = None
    sw_batch_size: int = 1
    max_queries: int = 256
    published: bool = False
    redraw_tissues: bool = True
    check: CheckLevel = "quick"
    probabilities: bool = False
    uncertainty: bool = False


@dataclass(frozen=True)
class Planner:
    """Plans cases of one model on one hardware.

    Args:
        facts: of the model.
        hardware: on which the plan will run.
        choices: of the user.
    """

    facts: ModelFacts
    hardware: Hardware
    choices: Choices = Choices()

    def rules(self, modality: str, orientation_code: str | None = None) -> WindowRules:
        """Windows and grid of this model for a modality.

        Raises:
            InputError: windows that the network cannot take.
            DataError: no spacing for the modality.
        """
        return window_rules(
            self.facts,
            modality,
            roi_size=self.choices.roi_size,
            overlap=self.choices.overlap,
            sw_batch_size=self.choices.sw_batch_size,
            orientation_code=orientation_code,
            half=self.hardware.half,
            published=self.choices.published,
        )

    def plan(
        self,
        shape: Shape,
        affine: Array,
        routes: Routes,
        *,
        where: str,
        orientation_code: str | None = None,
        grid: Grid = "original",
        voxel_bytes: int = 4,
    ) -> CasePlan:
        """The plan of one case.

        Args:
            shape: of the image.
            affine: of the image.
            routes: who answers for which label.
            where: name of the image, for errors.
            orientation_code: in which the network sees the volume.
            grid: on which the masks are wanted.
            voxel_bytes: of a voxel as it was read; four cover all types but 64 bits.

        Raises:
            InputError: windows that the network cannot take, or not even one label fits the memory.
            DataError: no spacing for the modality.
        """
        usual = self.choices.redraw_tissues and not self.choices.published
        tissues = tissues_of(self.facts, routes) if usual else ()
        expected = expectations_of(self.facts.preprocessing, routes.modality)
        looked_at = self.choices.check != "none"
        around = label_around(self.facts, routes, expected) if looked_at and not self.choices.published else None
        asked = with_tissues(routes, tissues)
        extras = Extras(
            self.choices.check,
            len(routes.labels),
            judged=looked_at and bool(expected.structures),
            probabilities=self.choices.probabilities,
            uncertainty=self.choices.uncertainty,
        )
        return plan_case(
            shape,
            affine,
            asked if around is None else asked_beside(asked, (around,), expected.structures),
            self.facts.size,
            self.rules(routes.modality, orientation_code),
            memory_bytes=self.hardware.memory_bytes,
            where=where,
            device_memory_bytes=self.hardware.device_memory_bytes,
            tissues=tissues,
            grid=grid,
            modality=routes.modality,
            voxel_bytes=max(voxel_bytes, 4),
            extras=extras,
        )
