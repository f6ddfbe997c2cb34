"""`medlore decompose` for a segmenter: the teacher, its lighter student with one expert per region, and what they are compared with.

Top to bottom: read and cache the cases; train the teacher or take a given one; train the students; measure them on the test
cases; write the packs and the report. Every finished network is taken over by the next run with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medlore.assets import PREFIX
from medlore.decomposing.rank_rules import rule_of_variant
from medlore.decomposing.segmenters.batches import region_shares
from medlore.decomposing.segmenters.cohort import Cohort, check_experts_have_cases
from medlore.decomposing.segmenters.context import Narrator, NetworkJob, StudyContext, open_context, silent
from medlore.decomposing.segmenters.expert_ranks import Ranks, choose_expert_ranks, write_plans
from medlore.decomposing.segmenters.initialisation import start_from_teacher
from medlore.decomposing.segmenters.network import PromptedSegmenter, new_prompts
from medlore.decomposing.segmenters.packs import write_trained_pack
from medlore.decomposing.segmenters.settings import SegmentationSettings
from medlore.decomposing.segmenters.table import measure_network
from medlore.decomposing.stored_weights import as_stored
from medlore.errors import InputError
from medlore.layers.experts.surgery import install_experts
from medlore.models.segmenter.bundle import SegmenterBundle, load_segmenter
from medlore.models.segmenter.experts import segmenter_with_experts
from medlore.models.segmenter.network import Segmenter
from medlore.ranks.experts import given_digest
from medlore.runs.hardware import seed_everything
from medlore.runs.output_lock import refuse_held
from medlore.runs.report import Run
from medlore.runs.settings import beside, found_beside
from medlore.runs.settings_file import read_settings

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class SegmentationResult:
    """What a study leaves.

    Attributes:
        packs: `teacher` and `pack` -> folder, as far as they were made.
        table: one row per network and label.
    """

    packs: dict[str, Path]
    table: Rows


def read_study(study: str | Path, *, steps: int | None = None, **flags: Any) -> SegmentationSettings:
    """The settings of a study; `steps` are those of every student.

    Raises:
        InputError: unknown or wrong settings, all at once.
    """
    if steps is not None and steps < 1:
        raise InputError("--steps", str(steps), "at least 1", "give the optimiser steps of every student")
    settings = read_settings(SegmentationSettings, study, **flags)
    settings.check_windows()
    return settings if steps is None else settings.changed(student=settings.student.changed(steps=steps))


def decompose_segmenter(
    study: str | Path,
    out: str | Path,
    *,
    only: str | None = None,
    steps: int | None = None,
    narrate: Narrator = silent,
    say: Callable[[str], None] = lambda _text: None,
    **flags: Any,
) -> SegmentationResult:
    """Run a study, or with `only="teacher"` its first stage.

    Args:
        study: YAML file of `SegmentationSettings`; its data paths are relative to it.
        out: folder of the packs, the report, the cache and the checkpoints.
        only: `teacher` stops when the teacher's pack is written.
        steps: of every student, in place of the study's.
        narrate: name of a network -> progress of its training.
        say: hears of cases that are skipped and of stages.
        flags: settings that override the file.

    Raises:
        InputError: the study or its data cannot be used.
        StepError: a training diverged; the last good checkpoint stays.
    """
    if only not in (None, "teacher"):
        raise InputError("--only", f"{only!r}", "teacher", "leave it out for the whole study")
    settings = read_study(study, steps=steps, **flags)
    verb, folder = ("decompose", Path(out)) if only is None else (f"decompose-{only}", Path(out) / "teacher-run")
    refuse_held(folder)
    context = open_context(settings, folder=Path(study).resolve().parent, out=Path(out), narrate=narrate, say=say)
    if not context.writes:
        return _run(context, only)
    with Run(verb, folder, settings=settings, seed=settings.seed, device=str(context.accelerator.device)) as run:
        run.add_input(study)
        done = _run(context, only)
        for name, pack in done.packs.items():
            run.add_output(name, pack)
        run.results.update(table=done.table, networks=context.facts, skipped=list(context.cohort.faults), cases=context.case_counts())
    return done


def _run(context: StudyContext, only: str | None) -> SegmentationResult:
    """All networks, then the packs, and the measuring last: it takes minutes, and nothing waits for it."""
    teacher, packs = _teacher(context)
    made = [("teacher", teacher, context.cohort)] if only == "teacher" or "teacher" in context.settings.variants else []
    if only is None:
        made += list(_students(context, teacher))
        if context.writes:
            packs["pack"] = write_trained_pack(
                context.out / "pack", made[-1][1], context.cohort, context.settings, role="student with experts"
            )
    return SegmentationResult(packs, [row for name, network, cohort in made for row in measured(context, name, network, cohort)])


def _students(context: StudyContext, teacher: PromptedSegmenter) -> Iterator[tuple[str, PromptedSegmenter, Cohort]]:
    """Name, network and data of every student, trained; the one of the pack comes last."""
    settings, cohort = context.settings, context.cohort
    if "shared" in settings.variants:
        yield "shared", context.finish(plain_job(context), plain_student(context, teacher), teacher=teacher), cohort
    for region in cohort.regions if "single" in settings.variants else ():
        job = single_job(context, region)
        yield job.name, context.finish(job, plain_student(context, teacher), teacher=teacher), job.cohort
    for variant in settings.variants:
        if (rule := rule_of_variant(variant)) is not None:
            other = replace(context, settings=settings.with_rule(rule))
            yield variant, _experts(other, teacher, variant), cohort
    yield "experts", _experts(context, teacher, "experts"), cohort


def measured(context: StudyContext, name: str, network: PromptedSegmenter, cohort: Cohort) -> Rows:
    """Rows of the table, made by the process that writes."""
    notes = {entry.name: entry.note for entry in context.settings.data if entry.note}
    return measure_network(name, network, cohort, context.windows(), context.facts, notes=notes) if context.writes else []


def teacher_job(context: StudyContext) -> NetworkJob:
    """The teacher: asked labels of all regions at once, since it has no experts."""
    begun = context.settings.teacher.start
    begins_with = "" if begun is None else _bundle(context, begun, "teacher.start").sha256
    return NetworkJob("teacher", context.settings.teacher, context.cohort, ("teacher",), by_region=False, begins_with=begins_with)


def plain_job(context: StudyContext) -> NetworkJob:
    """The student without experts."""
    return NetworkJob("shared", context.settings.student, context.cohort, ("student",))


def experts_job(context: StudyContext, name: str = "experts") -> NetworkJob:
    """The student with experts."""
    plans = given_digest(context.settings.experts.given, context.study_folder)
    return NetworkJob(name, context.settings.student, context.cohort, ("student", "experts"), begins_with=plans)


def single_job(context: StudyContext, region: str) -> NetworkJob:
    """A single-region student takes its region's share of the steps, so that each network sees a region's cases equally often."""
    schedule = context.settings.student
    steps = max(round(schedule.steps * region_shares(context.cohort)[region]), 1)
    return NetworkJob(f"single {region}", schedule.changed(steps=steps), context.cohort.only(region), ("student",))


def _teacher(context: StudyContext) -> tuple[PromptedSegmenter, dict[str, Path]]:
    """The teacher, frozen, with one row of the table for each prompt of the study."""
    settings, cohort = context.settings, context.cohort
    if settings.teacher.source is not None:
        return given_teacher(context).eval().requires_grad_(requires_grad=False), {}
    network = context.finish(teacher_job(context), new_teacher(context))
    as_stored(network, settings.weights)
    packs = {"teacher": write_trained_pack(context.out / "teacher", network, cohort, settings, role="teacher")} if context.writes else {}
    return network.requires_grad_(requires_grad=False), packs


def new_teacher(context: StudyContext) -> PromptedSegmenter:
    """A teacher that learns its prompts: untrained, or with the weights and prompts of an earlier stage.

    Raises:
        InputError: the earlier stage has other sizes.
        UnknownNameError: it lacks one of the prompts.
    """
    config, seed, start = context.settings.teacher.sizes.config(), context.settings.seed, context.settings.teacher.start
    seed_everything(seed)
    if start is None:
        return PromptedSegmenter(
            Segmenter(config, dropout=0.0), new_prompts(len(context.cohort.keys), config.query_width, seed=seed), learn_prompts=True
        )
    bundle = _bundle(context, start, "teacher.start")
    if bundle.config != config or bundle.weights.experts:
        experts = f" with {len(bundle.weights.experts)} experts" if bundle.weights.experts else ""
        came = f"{start} of features {list(bundle.config.features)}{experts}"
        raise InputError("teacher.start", came, "a pack of teacher.sizes without experts", "give the pack that an earlier stage wrote")
    return PromptedSegmenter(
        segmenter_with_experts(bundle.weights, dropout=0.0), queries_of(bundle, context.cohort.keys), learn_prompts=True
    )


def _bundle(
    context: StudyContext, named: str, where: str, *, text: Path | None = None, prompt_embeddings: Path | None = None
) -> SegmenterBundle:
    source, start = found_beside(context.study_folder, named, where=where), context.study_folder
    text = None if text is None else beside(start, text)
    prompt_embeddings = None if prompt_embeddings is None else beside(start, prompt_embeddings)
    return load_segmenter(source if source.startswith(PREFIX) else Path(source), text=text, prompt_embeddings=prompt_embeddings)


def given_teacher(context: StudyContext) -> PromptedSegmenter:
    """The teacher that the study names, with its own prompts."""
    wanted = context.settings.teacher
    bundle = _bundle(context, str(wanted.source), "teacher.source", text=wanted.text, prompt_embeddings=wanted.prompt_embeddings)
    if bundle.config.query_width != context.settings.student.sizes.query_width:
        came = f"student.sizes.query_width {context.settings.student.sizes.query_width}"
        raise InputError(
            "student", came, f"the teacher's {bundle.config.query_width}: they share their prompts", "give the student that width"
        )
    model = segmenter_with_experts(bundle.weights, dropout=0.0)
    return PromptedSegmenter(model, queries_of(bundle, context.cohort.keys), learn_prompts=False)


def queries_of(bundle: SegmenterBundle, keys: tuple[str, ...]) -> Tensor:
    """A pack's embeddings (n, width) of prompts `modality/label`.

    Raises:
        UnknownNameError: a prompt that it does not have.
    """
    pairs = [key.split("/", 1) for key in keys]
    return torch.cat([bundle.queries([label], modality) for modality, label in pairs])


def plain_student(context: StudyContext, teacher: PromptedSegmenter) -> PromptedSegmenter:
    """An untrained student without experts, with the teacher's prompts."""
    wanted = context.settings.student
    seed_everything(context.settings.seed)
    model = Segmenter(wanted.sizes.config(), dropout=0.0)
    if wanted.start == "teacher":
        start_from_teacher(model, teacher.segmenter)
    return PromptedSegmenter(model, teacher.prompts, learn_prompts=False)


def _experts(context: StudyContext, teacher: PromptedSegmenter, name: str) -> PromptedSegmenter:
    """A trained student with experts, rounded as it is shipped."""
    check_experts_have_cases(context.cohort, context.cohort.regions)
    student = plain_student(context, teacher)
    wanted, config = context.settings.experts, student.segmenter.config
    ranks = choose_expert_ranks(wanted, config, labels_by_region(context.cohort), teacher.segmenter, folder=context.study_folder)
    context.facts["expert ranks" if name == "experts" else f"ranks of {name}"] = by_region(ranks)
    if context.writes:  # beside the pack a plan file for each expert, which another study can give
        write_plans(context.out / ("ranks" if name == "experts" else f"ranks-{name}"), ranks, wanted, config, source=context.settings.name)
    student = context.finish(experts_job(context, name), with_experts(context, student, ranks), teacher=teacher)
    as_stored(student, context.settings.weights)
    return student


def with_experts(context: StudyContext, student: PromptedSegmenter, ranks: Ranks) -> PromptedSegmenter:
    """The same student with one untrained expert a region."""
    wanted, targets = context.settings.experts, {target for target, _ in ranks}
    install_experts(
        student.segmenter, experts=list(context.cohort.regions), ranks=ranks, targets=lambda name, _module: name in targets,
        layout=wanted.layout, scaling=wanted.scaling, base="trainable",
    )  # fmt: skip
    return PromptedSegmenter(student.segmenter, student.prompts, learn_prompts=False)


def by_region(ranks: Ranks) -> dict[str, dict[str, int]]:
    """Region -> layer -> rank."""
    found: dict[str, dict[str, int]] = {}
    for (target, region), rank in ranks.items():
        found.setdefault(region, {})[target] = rank
    return found


def labels_by_region(cohort: Cohort) -> dict[str, int]:
    """Region -> number of its prompts."""
    keys = {p.key: p.region for p in cohort.prompts.values()}
    return {region: sum(r == region for r in keys.values()) for region in cohort.regions}
