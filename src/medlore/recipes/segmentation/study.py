"""`medlore decompose` for a segmenter: the teacher, its lighter student with one expert a region, and what they are compared with.

Top to bottom: read and cache the cases; train the teacher or take a given one; train the students; measure them on the test
cases; write the packs and the report. Every finished network is taken over by the next run with the same settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from medlore.assets import PREFIX
from medlore.data.patches import PatchRules
from medlore.errors import InputError, StepError
from medlore.files import atomic_path, read_json, write_json
from medlore.layers.expert_surgery import install_experts
from medlore.models.bundle import SegmenterBundle, load_segmenter
from medlore.models.expert_segmenter import segmenter_with_experts
from medlore.models.segmenter import Segmenter
from medlore.recipes.run import Run, choose_device, read_settings, seed_everything
from medlore.recipes.segmentation.accelerators import make_accelerator
from medlore.recipes.segmentation.batches import make_dealer, make_rules, region_shares
from medlore.recipes.segmentation.cohort import Cohort, check_experts_have_cases, read_cohort
from medlore.recipes.segmentation.expert_ranks import choose_expert_ranks
from medlore.recipes.segmentation.network import PromptedSegmenter, new_prompts
from medlore.recipes.segmentation.packs import write_trained_pack
from medlore.recipes.segmentation.settings import ScheduleSettings, SegmentationSettings
from medlore.recipes.segmentation.table import measure_network
from medlore.recipes.segmentation.training import Plan, Progress, Validate, train_segmenter
from medlore.recipes.segmentation.validation import WindowSettings, make_validation

Narrator = Callable[[str], Progress]


@dataclass(frozen=True)
class SegmentationResult:
    """What a study leaves.

    Attributes:
        packs: `teacher` and `pack` -> folder, as far as they were made.
        table: one row a network and label.
    """

    packs: dict[str, Path]
    table: list[dict[str, Any]]


def silent(_name: str) -> Progress:
    """A narrator that says nothing."""
    return lambda _step, _steps, _text: None


def decompose_segmenter(
    study: str | Path,
    out: str | Path,
    *,
    only: str | None = None,
    narrate: Narrator = silent,
    say: Callable[[str], None] = lambda _text: None,
    **flags: Any,
) -> SegmentationResult:
    """Run a study, or with `only="teacher"` its first stage.

    Args:
        study: YAML file of `SegmentationSettings`; its data paths are relative to it.
        out: folder of the packs, the report, the cache and the checkpoints.
        only: `teacher` stops when the teacher's pack is written.
        narrate: name of a network -> progress of its training.
        say: told of cases that are skipped and of stages.
        flags: settings that override the file.

    Raises:
        InputError: the study or its data cannot be used.
        StepError: a training diverged; the last good checkpoint stays.
    """
    if only not in (None, "teacher"):
        raise InputError("--only", f"{only!r}", "teacher", "leave it out for the whole study")
    settings = read_settings(SegmentationSettings, study, **flags)
    shop = open_workshop(settings, folder=Path(study).resolve().parent, out=Path(out), narrate=narrate, say=say)
    if not shop.writes:
        return _run(shop, only)
    verb = "decompose" if only is None else f"decompose-{only}"
    with Run(
        verb,
        Path(out) if only is None else Path(out) / "teacher-run",
        settings=settings,
        seed=settings.seed,
        device=str(shop.accelerator.device),
    ) as run:
        run.add_input(study)
        done = _run(shop, only)
        for name, pack in done.packs.items():
            run.add_output(name, pack)
        run.results.update(table=done.table, networks=shop.facts, skipped=list(shop.cohort.faults), cases=shop.case_counts())
    return done


@dataclass
class Workshop:
    """What all networks of a study share."""

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

    def finish(
        self,
        name: str,
        network: PromptedSegmenter,
        schedule: ScheduleSettings,
        cohort: Cohort,
        *parts: str,
        teacher: PromptedSegmenter | None = None,
        by_region: bool = True,
    ) -> PromptedSegmenter:
        """Train a network, go on with it, or take over a finished one of the same settings and data."""
        settings, folder = self.settings, self.out / "networks" / name.replace(" ", "-")
        told = [settings.decides(*parts), cohort.fingerprint(), list(cohort.keys), None if teacher is None else _hash(teacher)]
        identity = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        weights, record = folder / "weights.pt", folder / "history.json"
        if record.is_file() and (held := read_json(record)).get("identity") == identity:
            network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            self.facts[name] = {k: v for k, v in held.items() if k != "identity"}
            return network.to(self.accelerator.device).eval()
        checkpoint = folder / f"checkpoint-{identity[:12]}.pt"
        rules = settings_rules(settings)
        dealer = make_dealer(
            cohort, patch_size=settings.patch_size, max_prompts=settings.max_prompts, rules=rules,
            batch_size=schedule.batch_size, mode=settings.batches, seed=settings.seed, by_region=by_region,
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
        history = train_segmenter(
            network, dealer, plan, accelerator=self.accelerator, checkpoint=checkpoint, teacher=teacher, validate=self._validation(cohort),
            progress=self.narrate(name) if self.writes else silent(name), name=name,
        )  # fmt: skip
        if self.writes:
            with atomic_path(weights) as temporary:
                torch.save(network.state_dict(), temporary)
            self.facts[name] = vars(history)
            write_json(record, {"identity": identity, **vars(history)})
            checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return network.eval()

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
    device = choose_device(settings.device)
    cache = out / "cache" if settings.cache is None else folder / settings.cache
    cohort = read_cohort(settings, folder=folder, cache=cache, say=say)
    return Workshop(settings, cohort, out, make_accelerator(device, out / "logs"), narrate)


def _run(shop: Workshop, only: str | None) -> SegmentationResult:
    settings, cohort = shop.settings, shop.cohort
    teacher, packs = _teacher(shop)
    if only == "teacher":
        rows = measure_network("teacher", teacher, cohort, shop.windows(), shop.facts) if shop.writes else []
        return SegmentationResult(packs, rows)
    rows: list[dict[str, Any]] = []
    if "teacher" in settings.variants and shop.writes:
        rows += measure_network("teacher", teacher, cohort, shop.windows(), shop.facts)
    if "shared" in settings.variants:
        plain = shop.finish("shared", _student(shop, teacher.prompts), settings.student, cohort, "student", teacher=teacher)
        rows += measure_network("shared", plain, cohort, shop.windows(), shop.facts) if shop.writes else []
    if "single" in settings.variants:
        for region in cohort.regions:
            part = cohort.only(region)
            single = shop.finish(
                f"single {region}", _student(shop, teacher.prompts), _share(shop, region), part, "student", teacher=teacher
            )
            rows += measure_network(f"single {region}", single, part, shop.windows(), shop.facts) if shop.writes else []
    student = _student(shop, teacher.prompts, experts_like=teacher)
    student = shop.finish("experts", student, settings.student, cohort, "student", "experts", teacher=teacher)
    round_to(student, settings.weights)
    rows += measure_network("experts", student, cohort, shop.windows(), shop.facts) if shop.writes else []
    if shop.writes:
        packs["pack"] = write_trained_pack(shop.out / "pack", student, cohort, settings, role="student with experts")
    return SegmentationResult(packs, rows)


def _share(shop: Workshop, region: str) -> ScheduleSettings:
    """A single-region student takes its region's share of the steps, so that each network sees a region's cases equally often."""
    schedule = shop.settings.student
    return schedule.model_copy(update={"steps": max(round(schedule.steps * region_shares(shop.cohort)[region]), 1)})


def _teacher(shop: Workshop) -> tuple[PromptedSegmenter, dict[str, Path]]:
    """The teacher, frozen, with one row of the table for each prompt of the study."""
    settings, cohort, wanted = shop.settings, shop.cohort, shop.settings.teacher
    if wanted.source is not None:
        return _given_teacher(shop).eval().requires_grad_(requires_grad=False), {}
    config = wanted.sizes.config()
    seed_everything(settings.seed)
    network = PromptedSegmenter(
        Segmenter(config, dropout=0.0), new_prompts(len(cohort.keys), config.query_width, seed=settings.seed), learn_prompts=True
    )
    network = shop.finish("teacher", network, wanted, cohort, "teacher", by_region=False)
    round_to(network, settings.weights)
    packs = {"teacher": write_trained_pack(shop.out / "teacher", network, cohort, settings, role="teacher")} if shop.writes else {}
    return network.requires_grad_(requires_grad=False), packs


def _given_teacher(shop: Workshop) -> PromptedSegmenter:
    wanted = shop.settings.teacher
    source = str(wanted.source)
    bundle = load_segmenter(
        source if source.startswith(PREFIX) else Path(source), text=wanted.text, prompt_embeddings=wanted.prompt_embeddings
    )
    if bundle.config.query_width != shop.settings.student.sizes.query_width:
        came = f"student.sizes.query_width {shop.settings.student.sizes.query_width}"
        raise InputError(
            "student", came, f"the teacher's {bundle.config.query_width}: they share their prompts", "give the student that width"
        )
    model = segmenter_with_experts(bundle.weights, dropout=0.0)
    return PromptedSegmenter(model, queries_of(bundle, shop.cohort.keys), learn_prompts=False)


def queries_of(bundle: SegmenterBundle, keys: tuple[str, ...]) -> Tensor:
    """A pack's embeddings (n, width) of prompts `modality/label`.

    Raises:
        UnknownNameError: a prompt that it does not have.
    """
    pairs = [key.split("/", 1) for key in keys]
    return torch.cat([bundle.queries([label], modality) for modality, label in pairs])


def _student(shop: Workshop, prompts: Tensor, *, experts_like: PromptedSegmenter | None = None) -> PromptedSegmenter:
    settings = shop.settings
    seed_everything(settings.seed)
    model = Segmenter(settings.student.sizes.config(), dropout=0.0)
    if experts_like is not None:
        _install(shop, model, experts_like.segmenter)
    return PromptedSegmenter(model, prompts, learn_prompts=False)


def _install(shop: Workshop, model: Segmenter, teacher: Segmenter) -> None:
    settings, cohort = shop.settings.experts, shop.cohort
    check_experts_have_cases(cohort, cohort.regions)
    labels = labels_by_region(cohort)
    ranks = choose_expert_ranks(settings, model.config, labels, teacher)
    targets = {target for target, _ in ranks}
    install_experts(
        model, experts=list(cohort.regions), ranks=ranks, targets=lambda name, _module: name in targets,
        layout=settings.layout, scaling=settings.scaling, base="trainable",
    )  # fmt: skip
    shop.facts["expert ranks"] = {region: {t: r for (t, e), r in ranks.items() if e == region} for region in cohort.regions}


def labels_by_region(cohort: Cohort) -> dict[str, int]:
    """Region -> number of its prompts."""
    keys = {p.key: p.region for p in cohort.prompts.values()}
    return {region: sum(r == region for r in keys.values()) for region in cohort.regions}


@torch.no_grad()
def round_to(network: PromptedSegmenter, weights: str) -> None:
    """Round the weights to the type that the pack holds, so that what is measured is what is shipped.

    Raises:
        StepError: a value is too large for that type.
    """
    if weights == "fp32":
        return
    for name, value in network.state_dict().items():
        if value.dtype == torch.float32:
            value.copy_(value.half().float())
            if not torch.isfinite(value).all():
                raise StepError(name, "values beyond 65504", "values that fp16 holds", "give `weights: fp32` in the study")


def _hash(network: PromptedSegmenter) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
