"""What all networks of a study share: its settings, its data, its device, and where they are trained and taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlore.data.volumes.patches import PatchRules
from medlore.decomposing.segmenters.batches import make_rules, make_sampler
from medlore.decomposing.segmenters.cohort import Cohort, read_cohort
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.settings import ScheduleSettings, SegmentationSettings
from medlore.decomposing.segmenters.training import SegmenterTrainingPlan, Validate, train_segmenter
from medlore.decomposing.segmenters.validation import WindowSettings, make_validation
from medlore.decomposing.trained_once import TrainedOnce, identity_of
from medlore.errors import InputError
from medlore.extras import is_installed
from medlore.training.accelerator import make_accelerator
from medlore.training.checkpoint import Checkpoint
from medlore.training.watching import Progress

Narrator = Callable[[str], Progress]


def silent(_name: str) -> Progress:
    """A narrator that says nothing."""
    return lambda _step, _steps, _text: None


@dataclass(frozen=True)
class NetworkJob:
    """One network to be trained.

    Attributes:
        name: of the network; its files lie in `networks/NAME`.
        schedule: steps and rates.
        cohort: its data.
        parts: the settings that decide its weights, beside the common ones.
        by_region: whether a patch is asked labels of one region only.
        begins_with: hash of the weights that the training begins with, where they are not drawn from the seed.
    """

    name: str
    schedule: ScheduleSettings
    cohort: Cohort
    parts: tuple[str, ...]
    by_region: bool = True
    begins_with: str = ""


@dataclass
class StudyContext:
    """What all networks of a study share.

    Attributes:
        settings: of the study.
        cohort: its data.
        out: folder of the run.
        accelerator: device and processes.
        narrate: name of a network -> progress of its training.
        facts: what was measured, by network.
        study_folder: from which the paths of the study start.
    """

    settings: SegmentationSettings
    cohort: Cohort
    out: Path
    accelerator: Any
    narrate: Narrator
    facts: dict[str, Any] = field(default_factory=dict)
    study_folder: Path = field(default_factory=Path)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def windows(self) -> WindowSettings:
        """How volumes are gone through in validation."""
        preprocessing = self.settings.full_preprocessing
        x, y, z = (int(v) for v in preprocessing["roi_size"])
        rules = settings_rules(self.settings)
        return WindowSettings((x, y, z), float(preprocessing["overlap"]), self.settings.precision, rules.synthesis, self.settings.seed)

    def case_counts(self) -> dict[str, dict[str, int]]:
        """List -> part -> number of cases."""
        return {name: {part: len(lists[name]) for part, lists in self.cohort.parts.items()} for name in self.cohort.weights}

    @property
    def networks(self) -> TrainedOnce:
        """Where they lie."""
        return TrainedOnce(self.out / "networks", self.accelerator, minutes=self.settings.checkpoint_minutes)

    def identity(self, job: NetworkJob, teacher: PromptedSegmenter | None = None) -> str:
        """A hash of all that decides a network's weights: settings, training data, prompts and who answers them, teacher."""
        taught_by = None if teacher is None else hash_of(teacher)
        decisive: list[Any] = [self.settings.decides(*job.parts), job.cohort.fingerprint(), list(job.cohort.keys), taught_by]
        decisive += [job.begins_with] if job.begins_with else []
        routing = sorted({(prompt.key, prompt.region) for prompt in job.cohort.prompts.values()})
        if job.by_region and len({region for _, region in routing}) > 1:
            decisive.append(routing)
        return identity_of(*decisive)

    def state_of(self, job: NetworkJob, teacher: PromptedSegmenter | None = None) -> str:
        """`trained`, `begun` or `to be trained`: what the next run finds."""
        return self.networks.state_of(_folder_name(job.name), self.identity(job, teacher))

    def finish(self, job: NetworkJob, network: PromptedSegmenter, *, teacher: PromptedSegmenter | None = None) -> PromptedSegmenter:
        """Train a network, go on with it, or take over a finished one of the same settings and data.

        Raises:
            StepError: the training diverged.
            CheckpointError: a finished network whose file is damaged.
        """
        identity = self.identity(job, teacher)

        def train(checkpoint: Checkpoint) -> dict[str, Any]:
            return self._train(job, network, checkpoint, teacher)

        self.facts[job.name] = self.networks.finish(_folder_name(job.name), identity, network, train)
        return network.eval()

    def _train(
        self, job: NetworkJob, network: PromptedSegmenter, checkpoint: Checkpoint, teacher: PromptedSegmenter | None
    ) -> dict[str, Any]:
        settings, schedule = self.settings, job.schedule
        sampler = make_sampler(
            job.cohort, patch_size=settings.patch_size, max_prompts=settings.max_prompts, rules=settings_rules(settings),
            batch_size=schedule.batch_size, mode=settings.batches, seed=settings.seed, by_region=job.by_region,
        )  # fmt: skip
        plan = SegmenterTrainingPlan(
            schedule,
            settings.loss,
            settings.seed,
            settings.precision,
            settings.validate_every,
            settings.checkpoint_minutes,
            settings.workers,
        )
        history = train_segmenter(
            network, sampler, plan, accelerator=self.accelerator, checkpoint=checkpoint, teacher=teacher, name=job.name,
            validate=self._validation(job.cohort), progress=self.narrate(job.name) if self.writes else silent(job.name),
        )  # fmt: skip
        return {name: getattr(history, name) for name in ("losses", "scores", "seconds", "waited")}

    def _validation(self, cohort: Cohort) -> Validate | None:
        return make_validation(cohort, self.windows(), cases=self.settings.validation_cases) if self.writes else None


def settings_rules(settings: SegmentationSettings) -> PatchRules:
    """Rules of drawing a patch, as a study says them."""
    return make_rules(settings.patches, settings.synthesis, settings.full_preprocessing)


def open_context(
    settings: SegmentationSettings, *, folder: Path, out: Path, narrate: Narrator = silent, say: Callable[[str], None] = lambda _text: None
) -> StudyContext:
    """Read the data of a study and make its context.

    Raises:
        InputError: data or rules that cannot be used.
    """
    settings_rules(settings)
    if out.exists() and not out.is_dir():
        raise InputError(str(out), "is a file", "a folder for the outputs", "name another folder")
    cache = out / "cache" if settings.cache is None else folder / settings.cache
    cohort = read_cohort(settings, folder=folder, cache=cache, say=say)
    return StudyContext(settings, cohort, out, _accelerator(settings, out / "logs"), narrate, study_folder=folder)


def _accelerator(settings: SegmentationSettings, logs: Path) -> Any:
    """With a TensorBoard tracker where the package is there; a batch does not ask every expert."""
    track = "tensorboard" if is_installed("tensorboard") else "none"
    accelerator = make_accelerator(settings.device, settings.precision, logs, track=track, absent_parameters=True)
    if track != "none":
        logs.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers("segmentation")
    return accelerator


def hash_of(network: PromptedSegmenter) -> str:
    """Of all weights and prompts."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _folder_name(network: str) -> str:
    return network.replace(" ", "-")
