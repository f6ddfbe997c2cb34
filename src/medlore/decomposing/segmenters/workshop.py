"""What all networks of a study share: its data, its device, and how a network is trained once and taken over afterwards."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from medlore.data.volumes.patches import PatchRules
from medlore.decomposing.segmenters.accelerator import make_accelerator
from medlore.decomposing.segmenters.batches import make_dealer, make_rules
from medlore.decomposing.segmenters.cohort import Cohort, read_cohort
from medlore.decomposing.segmenters.network import PromptedSegmenter
from medlore.decomposing.segmenters.settings import ScheduleSettings, SegmentationSettings
from medlore.decomposing.segmenters.training import Plan, Progress, Validate, train_segmenter
from medlore.decomposing.segmenters.validation import WindowSettings, make_validation
from medlore.errors import CheckpointError, InputError
from medlore.files import atomic_path, read_json, write_json
from medlore.runs.settings import choose_device

Narrator = Callable[[str], Progress]


def silent(_name: str) -> Progress:
    """A narrator that says nothing."""
    return lambda _step, _steps, _text: None


@dataclass(frozen=True)
class Order:
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
class Workshop:
    """What all networks of a study share.

    Attributes:
        settings: of the study.
        cohort: its data.
        out: folder of the run.
        accelerator: device and processes.
        narrate: name of a network -> progress of its training.
        facts: what was measured, by network.
    """

    settings: SegmentationSettings
    cohort: Cohort
    out: Path
    accelerator: Accelerator
    narrate: Narrator
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    def windows(self) -> WindowSettings:
        """How volumes are gone through in validation."""
        told = self.settings.full_preprocessing
        x, y, z = (int(v) for v in told["roi_size"])
        rules = settings_rules(self.settings)
        return WindowSettings((x, y, z), float(told["overlap"]), self.settings.precision, rules.synthesis, self.settings.seed)

    def case_counts(self) -> dict[str, dict[str, int]]:
        """List -> part -> number of cases."""
        return {name: {part: len(lists[name]) for part, lists in self.cohort.parts.items()} for name in self.cohort.weights}

    def identity(self, order: Order, teacher: PromptedSegmenter | None = None) -> str:
        """A hash of all that decides a network's weights: settings, training data, prompts and who answers them, teacher."""
        taught_by = None if teacher is None else hash_of(teacher)
        told: list[Any] = [self.settings.decides(*order.parts), order.cohort.fingerprint(), list(order.cohort.keys), taught_by]
        told += [order.begins_with] if order.begins_with else []
        routing = sorted({(prompt.key, prompt.region) for prompt in order.cohort.prompts.values()})
        if order.by_region and len({region for _, region in routing}) > 1:
            told.append(routing)
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def folder(self, name: str) -> Path:
        """Where a network's files lie."""
        return self.out / "networks" / name.replace(" ", "-")

    def state_of(self, order: Order, teacher: PromptedSegmenter | None = None) -> str:
        """`trained`, `begun` or `to be trained`: what the next run finds."""
        identity, folder = self.identity(order, teacher), self.folder(order.name)
        if _record(folder).get("identity") == identity:
            return "trained"
        return "begun" if _checkpoint(folder, identity).is_file() else "to be trained"

    def finish(self, order: Order, network: PromptedSegmenter, *, teacher: PromptedSegmenter | None = None) -> PromptedSegmenter:
        """Train a network, go on with it, or take over a finished one of the same settings and data.

        Raises:
            StepError: the training diverged.
            CheckpointError: a finished network whose file is damaged.
        """
        identity, folder = self.identity(order, teacher), self.folder(order.name)
        weights, held = folder / "weights.pt", _record(folder)
        if held.get("identity") == identity:
            network.load_state_dict(_read_weights(weights))
            self.facts[order.name] = {k: v for k, v in held.items() if k != "identity"}
            return network.to(self.accelerator.device).eval()
        history = self._train(order, network, _checkpoint(folder, identity), teacher)
        if self.writes:
            with atomic_path(weights) as temporary:
                torch.save(network.state_dict(), temporary)
            self.facts[order.name] = history
            write_json(folder / "history.json", {"identity": identity, **history})
            _checkpoint(folder, identity).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return network.eval()

    def _train(self, order: Order, network: PromptedSegmenter, checkpoint: Path, teacher: PromptedSegmenter | None) -> dict[str, Any]:
        settings, schedule = self.settings, order.schedule
        dealer = make_dealer(
            order.cohort, patch_size=settings.patch_size, max_prompts=settings.max_prompts, rules=settings_rules(settings),
            batch_size=schedule.batch_size, mode=settings.batches, seed=settings.seed, by_region=order.by_region,
        )  # fmt: skip
        plan = Plan(
            schedule,
            settings.loss,
            settings.seed,
            settings.precision,
            settings.validate_every,
            settings.checkpoint_minutes,
            settings.workers,
        )
        told = self.narrate(order.name) if self.writes else silent(order.name)
        history = train_segmenter(
            network, dealer, plan, accelerator=self.accelerator, checkpoint=checkpoint, teacher=teacher,
            validate=self._validation(order.cohort), progress=told, name=order.name,
        )  # fmt: skip
        return vars(history)

    def _validation(self, cohort: Cohort) -> Validate | None:
        return make_validation(cohort, self.windows(), cases=self.settings.validation_cases) if self.writes else None


def settings_rules(settings: SegmentationSettings) -> PatchRules:
    """Rules of drawing a patch, as a study says them."""
    return make_rules(settings.patches, settings.synthesis, settings.full_preprocessing)


def open_workshop(
    settings: SegmentationSettings, *, folder: Path, out: Path, narrate: Narrator = silent, say: Callable[[str], None] = lambda _text: None
) -> Workshop:
    """Read the data of a study and make its workshop.

    Raises:
        InputError: data or rules that cannot be used.
    """
    settings_rules(settings)
    if out.exists() and not out.is_dir():
        raise InputError(str(out), "is a file", "a folder for the outputs", "name another folder")
    device = choose_device(settings.device)
    cache = out / "cache" if settings.cache is None else folder / settings.cache
    cohort = read_cohort(settings, folder=folder, cache=cache, say=say)
    return Workshop(settings, cohort, out, make_accelerator(device, out / "logs"), narrate)


def hash_of(network: PromptedSegmenter) -> str:
    """Of all weights and prompts."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checkpoint(folder: Path, identity: str) -> Path:
    return folder / f"checkpoint-{identity[:12]}.pt"


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "history.json"
    return dict(read_json(path)) if path.is_file() and (folder / "weights.pt").is_file() else {}


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        fix = f"delete {path.parent} and run again: the network is then trained anew"
        raise CheckpointError(str(path), "damaged", "the weights of a finished network", fix) from error
